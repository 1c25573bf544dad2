"""The state of a sweep, for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.core.progress import format_duration
from harmbench_vaccine.reporting.render import Column, TableGroup, dim_notes, number_column, render_table

from .sweep import SweepStatus


def status_json(status: SweepStatus, seconds_left: float) -> dict[str, Any]:
    """Return the state of a sweep as plain JSON."""
    return {
        "runs": status.runs,
        "finished": status.finished,
        "stages": {
            kind: {"done": status.done[kind], "running": status.running_of(kind), "total": total}
            for kind, total in status.stages.items()
        },
        "workers": [
            {
                "stage": name,
                "holder": lease.holder.name if lease.holder else "",
                "renewed_seconds_ago": round(lease.age),
            }
            for name, lease in status.running.items()
        ],
        "failed": [
            {"stage": failure.name, "attempts": failure.attempts, "parked": failure.is_parked, "reason": failure.reason}
            for failure in status.failures
        ],
        "seconds_left": seconds_left if seconds_left < float("inf") else None,
    }


def status_view(name: str, status: SweepStatus, seconds_left: float) -> RenderableType:
    """Show what is done, running and failed."""
    parked = [failure.name for failure in status.parked]
    rows = [
        [
            kind,
            str(status.done[kind]),
            str(status.running_of(kind)),
            str(sum(failure.startswith(f"{kind}-") for failure in parked)),
            str(total),
        ]
        for kind, total in status.stages.items()
    ]
    columns = [Column("stage"), *map(number_column, ("done", "running", "failed", "of"))]
    notes = [f"{name}: {status.finished} of {status.runs} runs have a result."]
    notes += [
        f"{lease.holder.name if lease.holder else 'A worker'} runs {stage}."
        for stage, lease in sorted(status.running.items())
    ]
    notes += [
        f"{failure.name} failed {failure.attempts} times, last on {failure.worker}: {failure.reason}"
        for failure in status.failures
    ]
    if parked:
        notes.append("Add --retry-failed to try them again.")
    if status.running and seconds_left < float("inf"):
        notes.append(f"About {format_duration(seconds_left)} left.")
    return TableGroup(render_table(columns, rows), *dim_notes(notes))
