"""Progress of long work: one bar a stage with the time left, on stderr; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """What long work reports to."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A bar of `total` steps; the value yielded advances it by a number of steps."""
        ...

    def note(self, text: str) -> None:
        """One line said between the bars."""
        ...


class Silent:
    """Reports nothing: the default of every function that takes a `progress`."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda steps: None

    def note(self, text: str) -> None:
        pass


SILENT = Silent()


class Terminal:
    """Bars with the time left on a terminal; without one, a line when a bar of a second or more ends."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.console = Console(file=sys.stderr)
        self._bars = RichProgress(
            TextColumn("{task.description:<34}"),
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
        task = self._bars.add_task(title, total=total)
        start = time.monotonic()
        try:
            yield lambda steps: self._bars.advance(task, steps)
        finally:
            self._bars.remove_task(task)
        seconds = time.monotonic() - start
        if seconds >= 1:
            self.note(f"{title}: {seconds:.1f} s")

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False)
