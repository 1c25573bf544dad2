"""Locks between processes, of one host or of several: the kernel releases them when their process dies."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"
_NEW = 60.0
"""Seconds in which a new folder may not have its lock yet."""


def file_mode() -> int:
    """Return the mode that the umask gives to a new file. The umask can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


def shared_lock(path: Path) -> FileLock:
    """Return a lock that all users with write access to its folder can take."""
    return FileLock(path, mode=file_mode())


def temporary_folder(prefix: str) -> tuple[Path, FileLock]:
    """Create a temporary folder, and remove those of the same prefix whose process has ended.

    Args:
        prefix: The beginning of the folder's name.

    Returns:
        The folder, and the lock that marks it as used while its process lives.
    """
    for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(Timeout, OSError):  # it is in use, or of another user
            if time.time() - other.stat().st_mtime > _NEW:
                with FileLock(other / _LOCK).acquire(timeout=0):
                    shutil.rmtree(other)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    lock = FileLock(folder / _LOCK)
    lock.acquire()
    return folder, lock
