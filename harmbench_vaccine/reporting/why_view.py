"""Terminal view of `hbv why`: the artifacts of a run, and the reason why each was created or reused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.why import Difference, Explanation

from .render import Column, VisibleText, render_table

_KEY = re.compile("[0-9a-f]{20}")
"""The key of an artifact; a reader learns nothing from its digits, and --json has them."""
_LEGEND = "the inputs that differ from those of the nearest earlier artifact: new value (earlier value)"


def why_view(result: Result, explanations: Sequence[Explanation]) -> RenderableType:
    """Show whether each artifact of a run was reused or created, and its inputs that differ from an earlier one."""
    legend = _LEGEND if any(entry.differences for entry in explanations) else ""
    table = render_table(
        ["stage", Column("artifact", least=16), "state", Column("because", least=24, legend=legend)],
        [[entry.stage, entry.name, entry.state, _reason(entry)] for entry in explanations],
    )
    title = f"{result.run}: {result.defense} under {result.attack}"
    return Group(VisibleText(title, style="bold"), table)


def _reason(explanation: Explanation) -> str:
    if explanation.state == "reused":
        return "its inputs are unchanged"
    if explanation.state == "missing":
        return "its inputs are unknown: the artifact was deleted from the store"
    if explanation.nearest is None:
        return "the first artifact of its stage"
    shown = [_describe(change) for change in explanation.differences[:4]]
    more = len(explanation.differences) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def _describe(change: Difference) -> str:
    if all(_KEY.fullmatch(str(value)) for value in (change.value, change.earlier)):
        return f"{change.field}: another artifact"
    relation = "is" if change.value in (None, [], {}) else "="
    return f"{change.field} {relation} {_short(change.value)} ({_short(change.earlier)})"


def _short(value: Any) -> str:
    text = "absent" if value is None else "empty" if value in ([], {}) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
