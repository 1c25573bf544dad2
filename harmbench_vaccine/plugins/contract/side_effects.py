"""Observe the side effects of a plug-in: changed files, started programs, and network connections."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .findings import Fails

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod"}
"""Audit events that change a path, which is their first argument."""


@dataclass(eq=False)
class SideEffects:
    """The side effects that were observed, in order."""

    allowed: Path | None = None
    """A folder that may be changed."""
    changes: list[str] = field(default_factory=list)
    """Paths that were written, created, moved or removed."""
    connections: list[str] = field(default_factory=list)
    """Addresses that were connected to."""
    programs: list[str] = field(default_factory=list)
    """Programs that were started."""

    def require_none(self, *, network: bool = False) -> None:
        """Raise `Fails` if there was a side effect.

        Args:
            network: Whether connections are allowed.
        """
        if self.changes:
            raise Fails(f"It changes {self.changes[0]}, and a plug-in may only return values.")
        if self.programs:
            raise Fails(f"It starts the program {self.programs[0]!r}, and a plug-in may only return values.")
        if self.connections and not network:
            raise Fails(f"It connects to {self.connections[0]}, and no parameter names a server.")

    def record(self, event: str, args: tuple[Any, ...]) -> None:
        """Record an audit event if it is a side effect."""
        if event in _CHANGES or (event == "open" and (args[2] or 0) & _WRITES):
            self._record_change(args[0])
        elif event == "socket.connect":
            self.connections.append(str(args[1]))
        elif event == "socket.getaddrinfo":
            self.connections.append(str(args[0]))
        elif event == "subprocess.Popen":
            self.programs.append(os.fsdecode(args[0]))

    def _record_change(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):  # an open file, which was recorded when it was opened
            return
        absolute = Path(os.path.abspath(os.fsdecode(path)))
        is_allowed = self.allowed is not None and absolute.is_relative_to(self.allowed)
        if not (is_allowed or "__pycache__" in absolute.parts or absolute.is_relative_to("/dev")):
            self.changes.append(str(absolute))


_observers: list[SideEffects] = []
"""The observers of the blocks that run now: Python cannot remove an audit hook, so there is one for all of them."""


@contextmanager
def observe_side_effects(allowed: Path | None = None) -> Iterator[SideEffects]:
    """Observe the side effects of the block, in all threads of this process.

    Args:
        allowed: A folder that the block may change.
    """
    _install_audit_hook()
    effects = SideEffects(allowed)
    _observers.append(effects)
    try:
        yield effects
    finally:
        _observers.remove(effects)


@cache
def _install_audit_hook() -> None:
    def record(event: str, args: tuple[Any, ...]) -> None:
        for effects in _observers:
            effects.record(event, args)

    sys.addaudithook(record)
