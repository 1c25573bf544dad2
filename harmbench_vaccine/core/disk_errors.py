"""One-line errors for a disk that is full and for files that cannot be written or read."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import HbvError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew over the size limit",
}
_OTHER = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a file is in the place of a folder",
    errno.EISDIR: "a folder is in the place of a file",
    errno.EEXIST: "a file is in the place of a folder",
    errno.ENOTEMPTY: "another folder is in its place",
    errno.ELOOP: "its symbolic links form a loop",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system lost it",
}
_FULL_PHRASES = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""Texts of torch and its libraries for a write that failed; they do not carry the error number."""


class DiskFull(HbvError):
    """A file system has no space left, or a quota or a limit is used up."""


@contextmanager
def readable_disk_errors(content: str, folder: Path) -> Iterator[None]:
    """Translate the disk errors of any library into a one-line error that names the path.

    Args:
        content: Description of the files that the block reads or writes, for the error message.
        folder: The folder of these files, for errors that do not name a path.

    Raises:
        DiskFull: The disk is full.
        HbvError: A file cannot be read or written.
    """
    try:
        yield
    except Exception as error:
        path = _path_of(error, folder)
        if code := _full_disk_error(error):
            raise DiskFull(
                f"While writing {content} to {path}, {_FULL[code]}. Finished stages are kept, and no partial file "
                "remains. Free space or raise the limit, then repeat the command."
            ) from error
        if code := _other_error(error):
            raise HbvError(
                f"Cannot read or write {content}: {_OTHER[code]}: {path}. Finished stages are kept. Correct this path "
                "or choose another folder (HBV_HOME), then repeat the command."
            ) from error
        raise


def ensure_space(folder: Path, size: int, content: str) -> None:
    """Check before long work that a file system has space for what the work will write.

    Args:
        folder: A folder that exists.
        size: The number of bytes.
        content: Description of the files, for the error message.

    Raises:
        DiskFull: Less space is free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DiskFull(
            f"The disk is full: {content} needs about {_readable(size)}, but {folder} has {_readable(free)} left. "
            "Free space or choose another folder (HBV_HOME), then repeat the command."
        )


def _readable(size: int) -> str:
    """Return a number of bytes in kB, MB or GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def _full_disk_error(error: BaseException | None) -> int | None:
    """Return the code of a full-disk error, also if a library wraps it with its number or only a phrase."""
    while error is not None:
        if (code := _error_number(error)) in _FULL:
            return code
        if any(phrase in str(error) for phrase in _FULL_PHRASES):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def _other_error(error: BaseException | None) -> int | None:
    """Return the code of another disk error that names its file or comes from a library in Rust.

    Errors that were handled before, `__context__`, do not count.
    """
    while error is not None:
        names_file = not isinstance(error, OSError) or error.filename
        if (code := _error_number(error)) in _OTHER and names_file:
            return code
        error = error.__cause__
    return None


def _error_number(error: BaseException) -> int | None:
    """Return the number of an operating system's error, which libraries in Rust write into their text."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"os error (\d+)", str(error), re.IGNORECASE)
    return int(match[1]) if match else None


def _path_of(error: BaseException | None, folder: Path) -> str:
    """Return the path that an error or one of its causes names, or the folder."""
    while error is not None:
        if isinstance(error, OSError) and error.filename:
            return str(error.filename2 or error.filename)
        error = error.__cause__ or error.__context__
    return str(folder)
