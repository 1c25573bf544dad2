"""Files that survive a power cut and that every user of a shared folder can read."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .hashing import digest, sha256

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)")


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all: write a temporary file, flush it to the disk, then rename it.

    A symbolic link is followed, an existing file keeps its mode, and the temporary files of killed processes are
    removed.
    """
    path = path.resolve()
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError, PermissionError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def seal(folder: Path, manifest: str, values: Mapping[str, object]) -> None:
    """Flush a finished folder to the disk, then write its manifest, with the hash of every other file.

    The files get the mode that the umask allows: some libraries create files that only their owner can read.

    Args:
        folder: The folder.
        manifest: The name of the manifest, a JSON file.
        values: Further values of the manifest, as plain JSON.
    """
    mode = 0o666 & ~_umask()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with suppress(PermissionError):  # of a file system without modes
                path.chmod(mode)
        flush(path)
    flush(folder)
    description = {**values, "files": _file_hashes(folder, manifest)}
    text = json.dumps({**description, "checksum": digest(description)}, indent=1, ensure_ascii=False)
    write_atomically(folder / manifest, text)


def read_sealed(folder: Path, manifest: str) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it or any file of the folder is not as it was sealed.

    Raises:
        FileNotFoundError: The folder has no manifest.
        OSError: The folder cannot be read.
    """
    try:
        description = json.loads((folder / manifest).read_text(encoding="utf-8"))
        checksum = description.pop("checksum")
        intact = checksum == digest(description) and description["files"] == _file_hashes(folder, manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return description if intact else None


def _file_hashes(folder: Path, manifest: str) -> dict[str, str]:
    """Return file -> SHA-256 for every file below a folder except its manifest."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / manifest
    }


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


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose process on this host has ended."""
    for sibling in path.parent.glob(".*"):
        match = _TEMPORARY.fullmatch(sibling.name)
        if match and match["name"] == path.name and match["host"] == _host() and not _runs(int(match["pid"])):
            sibling.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _host() -> str:
    return socket.gethostname().replace(".", "-") or "host"


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
