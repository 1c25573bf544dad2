"""Files that survive a power cut and that every user of a shared folder can read."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from .hashing import digest, sha256
from .locks import file_mode


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all: write a temporary file, flush it to the disk, then rename it.

    A symbolic link is followed, an existing file keeps its mode and, where this user may set them, its owner and group.
    The temporary files of killed processes are removed.
    """
    path = Path(os.path.realpath(path))
    _remove_abandoned(path)
    temporary, file = _open_temporary(path)
    try:
        with file:  # closing it releases the lock, so it is renamed before
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                _copy_ownership(path, temporary)
            os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _copy_ownership(source: Path, target: Path) -> None:
    """Give a file the mode of another one, and its group and owner as far as this user may."""
    status = source.stat()
    for user, group in ((-1, status.st_gid), (status.st_uid, -1)):
        with suppress(PermissionError):
            os.chown(target, user, group)
    with suppress(PermissionError):
        target.chmod(stat.S_IMODE(status.st_mode))


def seal(folder: Path, manifest: str, values: Mapping[str, object]) -> None:
    """Flush a finished folder to the disk (see `flush_folder`), then write its manifest, with the hash of every file.

    Args:
        folder: The folder.
        manifest: The name of the manifest, a JSON file.
        values: Further values of the manifest, as plain JSON.
    """
    flush_folder(folder)
    description = {**values, "files": _file_hashes(folder, manifest)}
    text = json.dumps({**description, "checksum": digest(description)}, indent=1, ensure_ascii=False)
    write_atomically(folder / manifest, text)


def read_sealed(folder: Path, manifest: str) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it or any file of the folder is not as it was sealed.

    Raises:
        FileNotFoundError: The folder has no manifest.
        OSError: The folder or one of its files cannot be read, so that nothing is known about it.
    """
    try:
        description = json.loads((folder / manifest).read_text(encoding="utf-8"))
        checksum = description.pop("checksum")
        intact = checksum == digest(description) and description["files"] == _file_hashes(folder, manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return description if intact else None


def flush_folder(folder: Path) -> None:
    """Write a folder with everything below it from the memory of the operating system to the disk.

    The files get the mode that the umask allows: some libraries create files that only their owner can read.
    """
    mode = file_mode()
    for parent, files in _walk(folder):
        for path in files:
            with suppress(PermissionError):  # of a file system without modes
                path.chmod(mode)
            flush(path)
        flush(parent)


def flush(path: Path) -> None:
    """Write a file or the entries of a folder from the memory of the operating system to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------


def _file_hashes(folder: Path, manifest: str) -> dict[str, str]:
    """Return file -> SHA-256 for every file below a folder except its manifest."""
    paths = sorted(path for _, files in _walk(folder) for path in files if path != folder / manifest)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield every folder below a folder, the deepest first, with its files.

    Raises:
        OSError: A folder cannot be read; `Path.rglob` would take it for empty.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, topdown=False, onerror=fail):
        yield Path(parent), [path for name in names if (path := Path(parent, name)).is_file()]


def _open_temporary(path: Path) -> tuple[Path, TextIO]:
    """Open a new file next to `path`, locked as long as it is open."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.tmp")
        file = temporary.open("x", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, file
        file.close()  # another process took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose process, on any host, has ended: no process locks them."""
    for temporary in path.parent.glob(f"{_prefix(path)}*.tmp"):
        with suppress(OSError), temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def _prefix(path: Path) -> str:
    """Return the prefix of the temporary files of a file; it is short for a name of any length."""
    return f".{zlib.crc32(os.fsencode(path.name)):08x}."
