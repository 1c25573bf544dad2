"""One-line errors for a disk that is full and for files that cannot be written or read."""

from __future__ import annotations

import errno
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
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system lost it",
}
_FULL_PHRASES = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""Texts of torch and its libraries for a write that failed; they do not carry the error number."""


@contextmanager
def readable_disk_errors(content: str, folder: Path) -> Iterator[None]:
    """Translate the disk errors of any library into a one-line error that names the path.

    Args:
        content: Description of the files that the block writes, for the error message.
        folder: The folder of these files, for errors that do not name a path.
    """
    try:
        yield
    except Exception as error:
        if code := _full_disk_error(error):
            raise HbvError(
                f"While writing {content} to {_path_of(error, folder)}, {_FULL[code]}. Finished stages are kept, and "
                "no partial file remains. Free space or raise the limit, then repeat the command."
            ) from error
        if isinstance(error, OSError) and error.errno in _OTHER and error.filename:
            raise HbvError(
                f"While writing {content}: {_OTHER[error.errno]}: {_path_of(error, folder)}. Finished stages are kept. "
                "Correct this path or choose another folder (HBV_HOME), then repeat the command."
            ) from error
        raise


def ensure_space(folder: Path, size: int, content: str) -> None:
    """Check before long work that a file system has space for what the work will write.

    Args:
        folder: A folder that exists.
        size: The number of bytes.
        content: Description of the files, for the error message.

    Raises:
        HbvError: Less space is free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise HbvError(
            f"The disk is full: {content} needs about {size / 1e6:.1f} MB, but {folder} has {free / 1e6:.1f} MB left. "
            "Free space or choose another folder (HBV_HOME), then repeat the command."
        )


def _full_disk_error(error: BaseException | None) -> int | None:
    """Return the code of a full-disk error, also if a library wraps it with its number or only a phrase."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.errno
        for code in _FULL:
            if f"os error {code}" in str(error).lower():
                return code
        if any(phrase in str(error) for phrase in _FULL_PHRASES):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def _path_of(error: BaseException | None, folder: Path) -> str:
    """Return the path that an error or one of its causes names, or the folder."""
    while error is not None:
        if isinstance(error, OSError) and error.filename:
            return str(error.filename2 or error.filename)
        error = error.__cause__ or error.__context__
    return str(folder)
