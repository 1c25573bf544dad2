"""The state of a sweep while a command waits for its workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harmbench_vaccine.core.progress import Progress

from .monitor import SweepMonitor
from .views import status_line, status_view


@contextmanager
def shown_progress(monitor: SweepMonitor, progress: Progress) -> Iterator[Callable[[], int]]:
    """Show the progress of a sweep inside the block.

    Args:
        monitor: Observes the sweep.
        progress: Shows a bar over the stages and, on a terminal, the state of the sweep.

    Yields:
        A function that looks at the store again, and returns the number of stages that were finished since the last
        look.
    """
    status = monitor.status()
    bar = progress.bar(status.name, status.stages.total() - status.done.total())
    with bar as advance, progress.panel(lambda: status_view(status)):

        def look() -> int:
            nonlocal status
            done, status = status.done.total(), monitor.status()
            steps = status.done.total() - done
            advance(steps, status_line(status), status.seconds_left)
            return steps

        advance(0, status_line(status), status.seconds_left)
        yield look
