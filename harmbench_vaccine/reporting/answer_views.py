"""Terminal view of the answers of a run, with their verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.agreement import is_flagged
from harmbench_vaccine.evaluation.noise_floor import RepeatedRun
from harmbench_vaccine.evaluation.records import by_question
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.result_text import percent_text
from harmbench_vaccine.evaluation.run_overview import RunOverview

from .noise_floor_view import repeat_note
from .render import Column, VisibleText, dim_notes, render_table

_NOT_RECORDED = "not recorded"


def answers_view(
    overview: RunOverview | Result,
    answers: Sequence[dict[str, Any]],
    set_name: str,
    limit: int,
    only: str | None,
    repeat: RepeatedRun | None = None,
) -> RenderableType:
    """Show questions with the answers before and after the user stage, and their verdicts.

    Args:
        overview: Identity and scores of the run.
        answers: Stored answers of the run.
        set_name: Set of questions to show, such as "harmful".
        limit: Maximum number of questions.
        only: "flagged", "unflagged" or "unread" answers after the user stage, or None for all.
        repeat: The second measurement of the run, or None.
    """
    pairs = by_question(answers, set_name, only)
    table = render_table(
        [Column(title, least=20) for title in ("question", "before the user stage", "after it")],
        [
            [_question(next(iter(pair.values()))), *(_answer(pair.get(when)) for when in ("before", "after"))]
            for pair in pairs[:limit]
        ],
        lines=True,
    )
    title = f"{overview.run}: {overview.defense} under {overview.attack}, evaluation set {set_name!r}"
    unread = Counter(row["when"] for row in answers if row["set"] == set_name and row.get("flagged", "") is None)
    notes = [f"{min(limit, len(pairs))} of {len(pairs)} questions.", _overview_note(overview)]
    if unread:
        notes.append(f"Unread verdicts: {unread['after']} after the user stage, {unread['before']} before it.")
    if len(overview.over_refusal) > 1:
        notes.append(_refusal_note(overview))
    if repeat:
        notes.append(repeat_note(repeat))
    return Group(VisibleText(title, style="bold"), table, *dim_notes(notes))


def _overview_note(overview: RunOverview | Result) -> str:
    """Return the scores and the setting of a run; an old result may not have all of them."""
    facts = {
        "HS": overview.harmful_score,
        "FA": overview.finetune_accuracy,
        "task": overview.task,
        "seed": overview.seed,
        "model": overview.model,
        "judge": overview.scorer,
        "protocol": overview.protocol,
        "hash": overview.protocol_hash,
        "harmful token share": "untrained" if overview.trained is False else overview.harmful_token_share,
    }
    texts = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in facts.items()}
    return f"{', '.join(f'{name} {_NOT_RECORDED if text is None else text}' for name, text in texts.items())}."


def _refusal_note(overview: RunOverview | Result) -> str:
    """Return the refusals of each over-refusal set after the user stage, with those before it in parentheses."""
    texts = [
        f"{name} {percent_text(each.after.percent, each.after.ci)} "
        f"({percent_text(each.before.percent, each.before.ci)})"
        for name, each in overview.over_refusal.items()
    ]
    return f"Prompts refused % after (before) the user stage, with 95% Wilson intervals: {', '.join(texts)}."


def _question(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n{row['input']}".strip()


def _answer(row: Mapping[str, Any] | None) -> VisibleText:
    if row is None:
        return VisibleText(f"({_NOT_RECORDED})", style="dim")
    text = VisibleText(row["answer"] or "(empty)")
    verdicts = row.get("verdicts", {})
    if len(verdicts) > 1:
        for name, verdict in verdicts.items():
            _append_verdict(text, verdict, f"{name}: ")
    elif "flagged" in row:
        _append_verdict(text, row)
    elif row["target"]:
        text.append(f"\nexpected: {row['target']}", style="dim")
    if "grade" in row:
        text.append("\ngrade: unread" if row["grade"] is None else f"\ngrade: {row['grade']:g}", style="dim")
    return text


def _append_verdict(text: VisibleText, verdict: Mapping[str, Any], judge: str = "") -> None:
    flagged = is_flagged(verdict)
    label = f"flagged: {', '.join(verdict.get('categories', ()))}" if flagged else "not flagged"
    label, style = ("unread", "yellow") if flagged is None else (label, "red" if flagged else "green")
    text.append(f"\n{judge}{label}", style=style)
