"""Marks of the artifacts that running processes use, so that a cleanup keeps them.

Each process lists its artifacts in a file of its own and locks this file. The kernel releases the lock when the process
ends, on whatever host, and the marks of an unlocked file no longer count.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

FOLDER = ".use"
"""The folder of the marks, inside a store."""
_GUARD = "guard"


class ArtifactUse:
    """The marks of one store. The marks of this object count until it is deleted or its process ends."""

    def __init__(self, store: Path) -> None:
        self._folder = store / FOLDER
        self._file: IO[str] | None = None
        self._marked: set[str] = set()

    def mark(self, name: str) -> None:
        """Mark an artifact before it is read. A store that this user may not write to has no marks.

        Args:
            name: The artifact as `stage/key`.
        """
        if name in self._marked:
            return
        with suppress(OSError), self._guard(fcntl.LOCK_SH):
            if self._file is None:
                path = self._folder / f"{secrets.token_hex(8)}.marks"
                self._file = path.open("x", encoding="utf-8")
                fcntl.flock(self._file, fcntl.LOCK_EX)
                weakref.finalize(self, _close, path, self._file, os.getpid())
            self._file.write(f"{name}\n")
            self._file.flush()
            self._marked.add(name)

    def marked(self) -> set[str]:
        """Return the artifacts that running processes use, as `stage/key`."""
        names: set[str] = set()
        for path in filter(_is_locked, self._folder.glob("*.marks")):
            with suppress(FileNotFoundError):  # the process has ended meanwhile
                names.update(path.read_text(encoding="utf-8").split())
        return names

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let other processes wait before they mark another artifact, until the end of the block.

        Files of ended processes are removed. Elsewhere, a file without a lock may be that of a process that is about to
        lock it.

        Raises:
            OSError: The store cannot be locked.
        """
        with self._guard(fcntl.LOCK_EX):
            for path in self._folder.glob("*.marks"):
                if not _is_locked(path):
                    path.unlink(missing_ok=True)
            yield

    @contextmanager
    def _guard(self, kind: int) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / _GUARD, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)


def _is_locked(path: Path) -> bool:
    """Return whether the process that wrote a file of marks is running."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _close(path: Path, file: IO[str], owner: int) -> None:
    """Remove the marks of a process; one that was forked from it leaves them."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
    file.close()
