"""Signals that end a command: Ctrl-C (SIGINT), SIGTERM of a scheduler, and SIGHUP of a closed terminal.

They raise `Interrupted` in the main thread. Inside `deferred_interruption` they wait until the block is at a point
where it can stop, such as the end of a training step. A second signal ends the process at once.

Only the command line handles signals. In a Python session, Ctrl-C raises `KeyboardInterrupt` as usual.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from . import distributed

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_deferring = False
_waiting = 0  # the signal that arrived in a deferring block; 0: none


class Interrupted(KeyboardInterrupt):
    """The end of the work because of a signal."""

    def __init__(self, number: int) -> None:
        """Store the number of the signal."""
        super().__init__(number)
        self.number = number


@contextmanager
def handled_signals() -> Iterator[None]:
    """Raise `Interrupted` for signals inside the block. A signal that the process ignores, as under nohup, stays so.

    Outside of the main thread, which alone can handle signals, the block changes nothing.
    """
    global _waiting
    _waiting = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = [number for number, handler in previous.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


@contextmanager
def deferred_interruption() -> Iterator[None]:
    """Let signals wait inside the block, until `stop_if_interrupted` or the end of the block."""
    global _deferring
    outer = _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = outer
    if not outer:
        stop_if_interrupted()


def is_interrupted() -> bool:
    """Return whether a signal waits on any rank. All ranks call this function at the same point and agree."""
    global _waiting
    agreed = distributed.largest_over_ranks(_waiting)
    if agreed:  # otherwise a signal that arrived while the ranks compared stays, and counts at the next call
        _waiting = agreed
    return agreed > 0


def stop_if_interrupted() -> None:
    """Raise the signal that waits, if any.

    Raises:
        Interrupted: A signal waits.
    """
    global _waiting
    if _waiting:
        number, _waiting = _waiting, 0
        raise Interrupted(number)


def _handle(number: int, frame: FrameType | None) -> None:
    global _waiting
    for each in _SIGNALS:  # the next signal ends the process, even if it waits in a library
        if signal.getsignal(each) is _handle:
            signal.signal(each, signal.SIG_DFL)
    if _deferring:
        _waiting = number
    else:
        raise Interrupted(number)
