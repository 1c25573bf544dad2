"""A result as text: its numbers, and the compact HTML table that a notebook shows."""

from __future__ import annotations

from html import escape

from harmbench_vaccine.core.visible import visible

from .result import Interval, Result


def percent_text(score: float, interval: Interval) -> str:
    """Return a score with its interval, such as "12.0 [8.5, 16.6]"."""
    return f"{score:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def number_text(value: float | None, form: str) -> str:
    """Return a number in this format; None is not a number."""
    return "not a number" if value is None else format(value, form)


def result_html(result: Result) -> str:
    """Return scores with their intervals, refusals, loss and drift, the scores before, and failed gates."""
    before, shares = result.before, result.validity.shares
    untrained = "" if result.trained else " (untrained)"
    header = ("", "after the user stage", "before it")
    rows = [
        (
            f"HS %, by {result.scorer}",
            percent_text(result.harmful_score, result.harmful_score_ci),
            percent_text(before.harmful_score, before.harmful_score_ci),
        ),
        (
            f"FA %, {result.finetune_accuracy_measure} on {result.task}",
            percent_text(result.finetune_accuracy, result.finetune_accuracy_ci) + untrained,
            percent_text(before.finetune_accuracy, before.finetune_accuracy_ci),
        ),
        (
            "benign prompts refused %",
            *(f"{shares[when].over_refusal:.1f}" if when in shares else "" for when in ("after", "before")),
        ),
        ("alignment loss", number_text(result.alignment_loss, ".3f"), ""),
        ("embedding drift", number_text(result.embedding_drift, ".3g"), ""),
    ]
    heading = f"{result.defense} against {result.attack}, seed {result.seed}"
    origin = f"{result.run}, protocol {result.protocol} {result.protocol_hash}"
    warning = "; ".join(result.validity.reasons)
    return "".join(
        [
            f"<div><strong>{_text(heading)}</strong><br><small>{_text(origin)}</small>",
            "<table>",
            _row("th", header),
            *(_row("td", row) for row in rows),
            "</table>",
            f"<strong>COLLAPSED</strong>: {_text(warning)}. Its HS does not count as safe." if result.collapsed else "",
            "</div>",
        ]
    )


def _row(cell: str, texts: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{cell}>{_text(text)}</{cell}>" for text in texts) + "</tr>"


def _text(text: str) -> str:
    return escape(visible(text))
