"""Progress in Python programs, and in a notebook: lines of finished work and the open bars, in one output of the cell.

The bars of a notebook need no widgets.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from html import escape

from .errors import BadInput, shortened
from .progress import PAUSE, SILENT, Advance, BarState, Lines, Progress, Terminal
from .visible import visible

_REFRESH = 0.2
"""Seconds between two updates: every update is a message to the browser, and a training stage has hundreds of steps."""


class NotebookBars:
    """Bars as HTML. A finished bar leaves a line if it took a second."""

    def __init__(self, show: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare a receiver.

        Args:
            show: Replaces the output by this HTML.
            clock: Returns the time in seconds.
        """
        self._show, self._clock = show, clock
        self._lines: list[str] = []
        self._bars: list[BarState] = []
        self._shown = -_REFRESH

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show a bar, and a line at its end if it took a second."""
        state = BarState(title, total, self._clock)

        def advance(steps: int, detail: str = "", seconds_left: float | None = None) -> None:
            state.advance(steps, detail, seconds_left)
            if self._clock() - self._shown >= _REFRESH:
                self._update()

        self._bars.append(state)
        self._update()
        try:
            yield advance
        finally:
            self._bars.remove(state)
            self._update()
        if state.elapsed >= PAUSE:
            self.note(state.summary())

    def note(self, text: str) -> None:
        """Add a line above the bars."""
        self._lines.append(text)
        self._update()

    def detail(self, text: str) -> None:
        """Show nothing."""

    def panel(self, render: Callable[[], object]) -> AbstractContextManager[None]:
        """Show nothing: it is a table for a terminal."""
        return nullcontext()

    def _update(self) -> None:
        self._shown = self._clock()
        lines = [f'<div style="opacity: 0.7">{_text(line)}</div>' for line in self._lines]
        self._show("".join([*lines, *map(_bar, self._bars)]))


@contextmanager
def python_progress(progress: bool | Progress) -> Iterator[Progress]:
    """Open the receiver of progress: bars in a notebook or a terminal, and lines on stderr elsewhere.

    Args:
        progress: Whether to show progress, or a receiver of it.

    Raises:
        BadInput: It is something else.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not isinstance(progress, bool):
        if not hasattr(progress, "bar"):
            raise BadInput(f"Argument progress is {shortened(repr(progress))}; allowed: True, False, a receiver.")
        yield progress
    elif not progress:
        yield SILENT
    elif console.is_jupyter:
        yield notebook_bars()
    elif console.is_interactive:
        with Terminal() as terminal:
            yield terminal
    else:
        yield Lines(lambda line: print(line, file=console.file, flush=True))


def notebook_bars() -> NotebookBars:
    """Return bars in the output of the current cell of a notebook."""
    from IPython.display import HTML, display

    with warnings.catch_warnings():
        # Other libraries import it. It asks for widgets that only its own bars need.
        warnings.filterwarnings("ignore", message="IProgress not found")
        import tqdm.auto  # noqa: F401

    output = display(HTML(""), display_id=True)
    return NotebookBars(lambda html: output.update(HTML(html)))


def _bar(state: BarState) -> str:
    element = f'<progress value="{state.done}" max="{max(1, state.total)}"></progress>'
    return f"<div>{_text(state.title)} {element} {state.done}/{state.total} {_text(state.detail_and_time())}</div>"


def _text(text: str) -> str:
    return escape(visible(" ".join(text.splitlines())))
