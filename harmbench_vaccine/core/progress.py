"""Progress of long work on stderr: one bar per stage with the remaining time, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .visible import visible

Advance = Callable[[int], None]


class Progress(Protocol):
    """The receiver of progress reports."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show a bar of `total` steps. The block receives a function that advances the bar by a number of steps."""
        ...

    def note(self, text: str) -> None:
        """Print one line between the bars."""
        ...


class Silent:
    """A receiver that reports nothing: the default of every `progress` parameter."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda steps: None

    def note(self, text: str) -> None:
        pass


SILENT = Silent()


class Terminal:
    """Bars with the remaining time on a terminal; elsewhere, one line for every bar that took a second or more."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.console = Console(file=sys.stderr)
        self._bars = RichProgress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        task = self._bars.add_task(visible(title), total=total)
        start = time.monotonic()
        try:
            yield lambda steps: self._bars.advance(task, steps)
        finally:
            self._bars.remove_task(task)
        seconds = time.monotonic() - start
        if seconds >= 1:
            self.note(f"{title}: {seconds:.1f} s")

    def note(self, text: str) -> None:
        self.console.print(
            visible(" ".join(text.splitlines())), style="dim", highlight=False, markup=False, emoji=False
        )
