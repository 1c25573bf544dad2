"""Terminal views of the store: space, artifacts, cleanups, and damaged artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from rich.console import Group, RenderableType

from harmbench_vaccine.core.store_contents import StoredArtifact
from harmbench_vaccine.evaluation.store_cleanup import Cleanup, Verification
from harmbench_vaccine.evaluation.store_usage import SpaceRow, StoreUsage, age_of

from .render import Column, VisibleText, dim_notes, number_column, render_table

_SHOWN_RUNS = 3


def space_view(
    title: str, rows: Sequence[SpaceRow], others: Sequence[SpaceRow], total: int, notes: Sequence[str]
) -> RenderableType:
    """Show the space of groups of artifacts, of everything else, and of the store.

    Args:
        title: What the groups are, such as "stage".
        rows: The groups.
        others: Unfinished stages and caches.
        total: Bytes of the store.
        notes: Notes below the table.
    """
    is_shared = any(row.exclusive is not None for row in rows)
    if is_shared:
        notes = [*notes, "only: what becomes free if no other run needs it. Runs share artifacts."]
    table = render_table(
        [Column(title, wrap=False), number_column("artifacts", drop=1), *map(number_column, ("size", "only"))],
        [
            *(
                [row.name, str(row.artifacts), readable_size(row.size), _exclusive(row)]
                for row in sorted(rows, key=lambda row: -row.size)
            ),
            *([row.name, "", readable_size(row.size), ""] for row in others),
            [VisibleText("total", style="bold"), "", readable_size(total), ""],
        ],
    )
    return Group(table, *dim_notes(notes))


def artifacts_view(usage: StoreUsage, artifacts: Sequence[StoredArtifact]) -> RenderableType:
    """Show artifacts with their size, age and the runs that need them."""
    if not artifacts:
        return VisibleText("No artifact matches.")
    return render_table(
        [
            *(Column("stage", wrap=False), Column("key", wrap=False)),
            *(number_column("size"), number_column("age", drop=1)),
            Column("needed by"),
        ],
        [
            [
                *(artifact.stage, artifact.key, readable_size(usage.size([artifact.name]))),
                *(readable_age(age_of(artifact.created)), _users(usage, artifact)),
            ]
            for artifact in artifacts
        ],
    )


def cleanup_view(cleanup: Cleanup, is_done: bool) -> RenderableType:
    """Show what a cleanup removed, or would remove."""
    parts: list[RenderableType] = []
    rows = [
        *([item.stage, item.key, readable_age(age_of(item.created)), "artifact"] for item in cleanup.artifacts),
        *([item.stage, item.key, readable_age(age_of(item.modified)), "unfinished"] for item in cleanup.unfinished),
    ]
    if rows:
        columns = [Column("stage", wrap=False), Column("key", wrap=False), number_column("age"), Column("kind", drop=1)]
        parts.append(render_table(columns, rows))
    if not rows:
        summary = "Nothing to remove."
    elif is_done:
        summary = f"Removed {_count(len(rows), 'folder')}: {readable_size(cleanup.size)}."
    else:
        summary = (
            f"Would remove {_count(len(rows), 'folder')}: {readable_size(cleanup.size)}. Add --yes to remove them."
        )
    notes = list(cleanup.notes)
    if cleanup.dropped and rows:
        notes.append(
            f"The results and answers of {', '.join(cleanup.dropped)} stay. Repeating such a run computes what was "
            "removed again."
        )
    if cleanup.in_use:
        names = ", ".join(artifact.name for artifact in cleanup.in_use)
        notes.append(f"Kept, because a running process uses them: {names}.")
    return Group(*parts, VisibleText(summary), *dim_notes(notes))


def verification_view(verification: Verification) -> RenderableType:
    """Show the faults of a store, and a summary."""
    parts: list[RenderableType] = []
    rows = []
    for fault in verification.faults:
        detail = "removed" if fault.repaired else fault.detail
        rows.append([fault.state, *fault.name.split("/"), _listed(fault.runs) or "no run", detail])
    if rows:
        identity = [Column(title, wrap=False) for title in ("state", "stage", "key")]
        columns = [*identity, Column("needed by"), Column("detail")]
        parts.append(render_table(columns, rows))
    damaged = [fault for fault in verification.faults if fault.state in ("damaged", "unreadable")]
    summary = f"{_count(verification.artifacts, 'artifact')}, {len(damaged)} damaged."
    notes = []
    states = {fault.state for fault in verification.faults if not fault.repaired}
    if "damaged" in states:
        notes.append("`hbv store verify --repair` removes damaged artifacts.")
    if "unreadable" in states:
        notes.append("Correct the permissions or the disk of an unreadable artifact.")
    if any(fault.repaired or fault.state == "missing" for fault in verification.faults):
        notes.append("Repeat the `hbv run` command of a run to create its artifacts again.")
    if any(fault.state == "orphaned" for fault in verification.faults):
        notes.append("An orphaned artifact is intact. `hbv store gc` removes it if no run needs it.")
    return Group(*parts, VisibleText(summary), *dim_notes(notes))


def readable_size(size: int) -> str:
    """Return a number of bytes in the largest unit that it fills."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def readable_age(age: timedelta) -> str:
    """Return a duration in days, hours or minutes."""
    minutes = max(0, int(age.total_seconds() // 60))
    for unit, name in ((24 * 60, "d"), (60, "h")):
        if minutes >= unit:
            return f"{minutes // unit} {name}"
    return f"{minutes} min"


def _exclusive(row: SpaceRow) -> str:
    return "" if row.exclusive is None else readable_size(row.exclusive)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _users(usage: StoreUsage, artifact: StoredArtifact) -> str:
    users = usage.users(artifact.name)
    if artifact.name == usage.testbed:
        users.append("every testbed run")
    return _listed(users) or "no run"


def _listed(runs: Sequence[str]) -> str:
    """Return the first runs of a list, and the number of the others."""
    others = len(runs) - _SHOWN_RUNS
    return ", ".join(runs[:_SHOWN_RUNS]) + (f" and {others} more" if others > 0 else "")
