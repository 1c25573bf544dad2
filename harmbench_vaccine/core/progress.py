"""Progress of long work: the protocol that all work reports to, and its receivers for a terminal and for plain lines.

Each part of the work is a bar of some number of steps. A terminal shows it as a bar; elsewhere, and in a log file, it
is a few lines: one at its start, then one after every 10% of its steps or every minute, and one at its end.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from .visible import visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import ProgressColumn

SHARE, PAUSE, LONGEST_PAUSE = 0.1, 1.0, 60.0
"""A line follows the last one of its bar after this share of the steps, but not before `PAUSE` seconds, or after
`LONGEST_PAUSE` seconds."""


class Advance(Protocol):
    """Reports that steps of a bar are finished."""

    def __call__(self, steps: int, detail: str = "", seconds_left: float | None = None) -> None:
        """Advance the bar.

        Args:
            steps: Number of steps since the last call. Those of the first call count as finished earlier, such as
                the steps before the checkpoint of a resumed stage: the speed of the bar does not include them.
            detail: A short text about the work at this step, such as "loss 0.532".
            seconds_left: Time until the end, if the caller knows it better than the speed of the bar does; infinite if
                it is unknown.
        """
        ...


class Progress(Protocol):
    """The receiver of progress reports."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show a bar of `total` steps. The block receives a function that advances the bar."""
        ...

    def note(self, text: str) -> None:
        """Print one line between the bars."""
        ...

    def detail(self, text: str) -> None:
        """Print one line that only a verbose receiver shows."""
        ...

    def panel(self, render: Callable[[], RenderableType]) -> AbstractContextManager[None]:
        """Show what `render` returns below the bars of a terminal inside the block; other receivers show nothing."""
        ...


class Silent:
    """A receiver that reports nothing: the default of every `progress` parameter."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show nothing."""
        yield lambda steps, detail="", seconds_left=None: None

    def note(self, text: str) -> None:
        """Print nothing."""

    def detail(self, text: str) -> None:
        """Print nothing."""

    def panel(self, render: Callable[[], RenderableType]) -> AbstractContextManager[None]:
        """Show nothing."""
        return nullcontext()


SILENT = Silent()


@dataclass
class BarState:
    """The position of a bar, and the time that it needs."""

    title: str
    total: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    text: str = ""
    """The detail of the last step."""
    start: float = field(init=False)
    _first: tuple[float, int] | None = field(default=None, init=False)
    """Time and position of the first call of `advance`: the speed of the bar counts from there."""
    _last: float = field(default=0.0, init=False)
    _end: float | None = field(default=None, init=False)
    """The end that the caller expects."""

    def __post_init__(self) -> None:
        self.start = self.clock()

    def advance(self, steps: int, detail: str = "", seconds_left: float | None = None) -> None:
        """Move the bar (see `Advance`)."""
        self.done += steps
        self.text = detail
        self._last = self.clock()
        if self._first is None:
            self._first = self._last, self.done
        self._end = None if seconds_left is None else self._last + seconds_left

    @property
    def elapsed(self) -> float:
        """Seconds since the bar was opened."""
        return self.clock() - self.start

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None if they are unknown, or longer than they were estimated."""
        end = self._end
        if end is None and self._first is not None and self.done > self._first[1]:
            time_of_first, position = self._first
            per_step = (self._last - time_of_first) / (self.done - position)
            end = self._last + per_step * max(0, self.total - self.done)
        if end is None or not math.isfinite(end) or end < self.clock():
            return None
        return end - self.clock()

    def detail_and_time(self) -> str:
        """Return the last detail and the remaining time, such as "loss 0.532, 2 min left"."""
        left = self.seconds_left
        return ", ".join(filter(None, [self.text, "" if left is None else f"{format_duration(left)} left"]))

    def line(self) -> str:
        """Return the position as one line: "finetune vaccine: step 120 of 400, loss 0.532, 2 min left"."""
        position = f"{self.title}: step {self.done} of {self.total}"
        return ", ".join(filter(None, [position, self.detail_and_time()]))

    def summary(self) -> str:
        """Return the time that the finished bar took as one line: "finetune vaccine: done in 12 s, loss 0.532"."""
        return ", ".join(filter(None, [f"{self.title}: done in {format_duration(self.elapsed)}", self.text]))


def format_duration(seconds: float) -> str:
    """Return a time in at most two units: "45 s", "12 min", "3 h 5 min", "2 d 4 h"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


class Lines:
    """Plain lines, for a log file and where stderr is not a terminal.

    A bar has a line when it starts, then one after every 10% of its steps or every minute, whichever comes first, but
    not within a second of the last one, and one at its end if it took a second. A verbose receiver has one for every
    step.
    """

    def __init__(
        self, write: Callable[[str], None], *, verbose: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare a receiver.

        Args:
            write: Writes one line.
            verbose: Whether every step and every `detail` has a line.
            clock: Returns the time in seconds.
        """
        self._write_line, self._verbose, self._clock = write, verbose, clock

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Write the lines of a bar; a bar without steps has none."""
        state = BarState(title, total, self._clock)
        last = state.start, 0  # time and position of the last line

        def advance(steps: int, detail: str = "", seconds_left: float | None = None) -> None:
            nonlocal last
            state.advance(steps, detail, seconds_left)
            if (self._verbose and steps) or (state.done < total and self._is_due(state, *last)):
                last = self._clock(), state.done
                self._write(state.line())

        if total:
            self._write(f"{title}: {total} {'step' if total == 1 else 'steps'}")
        yield advance
        if state.elapsed >= PAUSE:
            self._write(state.summary())

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(text)

    def detail(self, text: str) -> None:
        """Write a line if the receiver is verbose."""
        if self._verbose:
            self._write(text)

    def panel(self, render: Callable[[], RenderableType]) -> AbstractContextManager[None]:
        """Show nothing."""
        return nullcontext()

    def _write(self, text: str) -> None:
        self._write_line(_one_line(text))

    def _is_due(self, state: BarState, written: float, position: int) -> bool:
        pause = self._clock() - written
        return pause >= LONGEST_PAUSE or (pause >= PAUSE and state.done - position >= SHARE * state.total)


class Terminal:
    """Bars with the remaining time, in the width of the terminal."""

    def __init__(self, *, verbose: bool = False) -> None:
        """Prepare the bars; they are shown inside a `with` block.

        Args:
            verbose: Whether `detail` prints.
        """
        from rich.console import Console
        from rich.progress import Progress as RichProgress

        self.console = Console(file=sys.stderr)
        self._verbose = verbose
        self._panels: list[Callable[[], RenderableType]] = []
        panels = self._panels

        class Bars(RichProgress):
            """The bars, and the panels below them."""

            def get_renderables(self) -> Iterator[RenderableType]:
                yield from super().get_renderables()
                for render in panels:
                    yield render()

        self._bars = Bars(
            *_columns(self.console.width),
            console=self.console,
            expand=True,
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # a redirected stdout keeps the results
        )

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show a bar, and a line at its end if it took a second."""
        state = BarState(title, total)
        task = self._bars.add_task(_one_line(title), total=total, visible=total > 0, state=state)

        def advance(steps: int, detail: str = "", seconds_left: float | None = None) -> None:
            state.advance(steps, detail, seconds_left)
            self._bars.advance(task, steps)

        try:
            yield advance
        finally:
            self._bars.remove_task(task)
        if state.elapsed >= PAUSE:
            self.note(state.summary())

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        style = None if self.console.no_color else "dim"
        self.console.print(_one_line(text), style=style, highlight=False, markup=False, emoji=False)

    def detail(self, text: str) -> None:
        """Print a line above the bars if the receiver is verbose."""
        if self._verbose:
            self.note(text)

    @contextmanager
    def panel(self, render: Callable[[], RenderableType]) -> Iterator[None]:
        """Show what `render` returns below the bars."""
        self._panels.append(render)
        try:
            yield
        finally:
            self._panels.remove(render)


class Receivers:
    """Several receivers of the same reports, such as a terminal and a log file."""

    def __init__(self, receivers: Sequence[Progress]) -> None:
        self._receivers = receivers

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Open a bar in every receiver."""
        with ExitStack() as bars:
            calls = [bars.enter_context(receiver.bar(title, total)) for receiver in self._receivers]

            def advance(steps: int, detail: str = "", seconds_left: float | None = None) -> None:
                for call in calls:
                    call(steps, detail, seconds_left)

            yield advance

    def note(self, text: str) -> None:
        """Send a note to every receiver."""
        for receiver in self._receivers:
            receiver.note(text)

    def detail(self, text: str) -> None:
        """Send a detail to every receiver."""
        for receiver in self._receivers:
            receiver.detail(text)

    @contextmanager
    def panel(self, render: Callable[[], RenderableType]) -> Iterator[None]:
        """Show a panel in every receiver."""
        with ExitStack() as panels:
            for receiver in self._receivers:
                panels.enter_context(receiver.panel(render))
            yield


class Labeled:
    """A receiver that adds a label to the title of each bar, such as the prompts that a bar of answers counts."""

    def __init__(self, receiver: Progress, label: str) -> None:
        self._receiver, self._label = receiver, label

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Open a bar whose title ends with the label."""
        return self._receiver.bar(f"{title}: {self._label}", total)

    def note(self, text: str) -> None:
        """Send the note without the label."""
        self._receiver.note(text)

    def detail(self, text: str) -> None:
        """Send the detail without the label."""
        self._receiver.detail(text)

    def panel(self, render: Callable[[], RenderableType]) -> AbstractContextManager[None]:
        """Show the panel without the label."""
        return self._receiver.panel(render)


def _one_line(text: str) -> str:
    return visible(" ".join(text.splitlines()))


def _columns(width: int) -> list[ProgressColumn]:
    """Return the columns of a bar; the title takes the rest of the width, and ends with an ellipsis if it is longer."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class StateColumn(ProgressColumn):
        """The detail of the last step, and the time left."""

        def render(self, task: Task) -> Text:
            return Text(_one_line(task.fields["state"].detail_and_time()))

    title = Column(ratio=1, min_width=8, no_wrap=True, overflow="ellipsis")
    return [
        TextColumn("{task.description}", markup=False, table_column=title),
        *([BarColumn(bar_width=min(30, width // 6))] if width >= 72 else []),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        *([TimeElapsedColumn(table_column=Column(no_wrap=True))] if width >= 90 else []),
        StateColumn(Column(no_wrap=True, justify="right")),
    ]
