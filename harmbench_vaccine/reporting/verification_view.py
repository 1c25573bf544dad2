"""Terminal view of `hbv verify`: what was compared, what differs, and what could not be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.verification import VerifiedRun

from .render import Column, VisibleText, dim_notes, render_table


def verified_runs_view(outcomes: Sequence[VerifiedRun]) -> RenderableType:
    """Show the outcome for each run."""
    parts: list[RenderableType] = []
    for outcome in outcomes:
        state = "differs" if outcome.mismatches else "verified" if outcome.checked else "not verified"
        parts.append(VisibleText(f"{outcome.run}: {state}", style="bold"))
        if outcome.mismatches:
            rows = [[entry.field, _text(entry.stored), _text(entry.computed)] for entry in outcome.mismatches]
            parts.append(render_table([Column("field", least=16), "stored", "computed"], rows))
        notes = [f"Compared: {'; '.join(outcome.checked)}."] if outcome.checked else []
        notes += [f"Not verified: {reason.rstrip('.')}." for reason in outcome.reasons]
        parts += dim_notes(notes)
    return Group(*parts)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
