"""The state of a sweep, for the terminal and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from harmbench_vaccine.core.progress import format_duration
from harmbench_vaccine.reporting.render import Column, TableGroup, dim_notes, number_column, render_table

from .suite import load_suite, suite_names

if TYPE_CHECKING:
    from .failures import Failure
    from .leases import Lease
    from .monitor import SweepStatus

_SHOWN_WORKERS = 12
"""Workers that the view lists; it counts the others."""


def status_json(status: SweepStatus) -> dict[str, Any]:
    """Return the state of a sweep as plain JSON."""
    return {
        "sweep": status.name,
        "runs": status.runs,
        "finished": status.finished,
        "stages": status.count_kinds(),
        "workers": [
            {
                "stage": name,
                "label": status.labels[name],
                "holder": _holder(lease),
                "seconds": round(lease.held),
                "renewed_seconds_ago": round(lease.age),
            }
            for name, lease in status.running.items()
        ],
        "failed": [
            {
                "stage": failure.name,
                "label": status.labels[failure.name],
                "attempts": failure.attempts,
                "parked": failure.is_parked,
                "reason": failure.reason,
            }
            for failure in status.failures
        ],
        "seconds_left": status.time_left,
    }


def status_view(status: SweepStatus) -> RenderableType:
    """Show what is done, running and failed, and what each worker does."""
    counts = [[kind, *map(str, numbers.values())] for kind, numbers in status.count_kinds().items()]
    tables = [render_table([Column("stage"), *map(number_column, ("done", "running", "failed", "of"))], counts)]
    leases = sorted(status.running.items(), key=lambda item: -item[1].held)
    if leases:
        rows = [
            [_holder(lease), status.labels[name], format_duration(lease.held)]
            for name, lease in leases[:_SHOWN_WORKERS]
        ]
        columns = [Column("worker"), Column("works on"), number_column("for")]
        tables.append(render_table(columns, rows))
    others = len(leases) - _SHOWN_WORKERS
    notes = [
        *([f"{others} more workers"] if others > 0 else []),
        *(_failure_note(failure, status) for failure in status.failures),
        *(["--retry-failed tries failed stages again."] if status.parked else []),
    ]
    return TableGroup(*tables, *dim_notes(notes))


def status_line(status: SweepStatus) -> str:
    """Return the progress of a sweep as one line: "12 of 90 runs, 2 stages running, 1 failed"."""
    running = f"{len(status.running)} {'stage' if len(status.running) == 1 else 'stages'} running"
    parts = [f"{status.finished} of {status.runs} runs", running]
    return ", ".join([*parts, *([f"{len(status.parked)} failed"] if status.parked else [])])


def time_left_text(status: SweepStatus) -> str:
    """Return the time left as text; empty if it is not known."""
    return "" if status.time_left is None else f", about {format_duration(status.time_left)} left"


def suites_view() -> RenderableType:
    """Show the suites that ship with the package."""
    suites = [load_suite(name) for name in suite_names()]
    rows = [[suite.name, str(len(suite.specs())), ", ".join(suite.protocols), suite.title] for suite in suites]
    columns = [Column("suite", wrap=False), number_column("runs"), Column("protocol", drop=1), Column("title")]
    return TableGroup(render_table(columns, rows))


def _holder(lease: Lease) -> str:
    return lease.holder.name if lease.holder else "unknown"


def _failure_note(failure: Failure, status: SweepStatus) -> str:
    times = "once" if failure.attempts == 1 else f"{failure.attempts} times"
    state = "" if failure.is_parked else " and is tried again"
    return f"{status.labels[failure.name]} failed {times}, last on {failure.worker}{state}: {failure.reason}"
