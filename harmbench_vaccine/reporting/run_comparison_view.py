"""Terminal view of `hbv compare`: differences of two sides, and the questions on which they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.result_text import interval_text
from harmbench_vaccine.evaluation.run_comparison import Flip, RunComparison, ScoreDifference

from .render import Column, VisibleText, dim_notes, number_column, render_fields, render_table

LABELS = {"harmful_score": "HS", "finetune_accuracy": "FA", "refusal_rate": "refused"}
"""Names of the scores in tables."""
_MOST_NUMBERS = 20
_METHODS = {
    "mcnemar": "One seed: p is by the exact McNemar test over the differing questions, and the interval is over "
    "questions only. It does not extend to a new training.",
    "questions": "One seed: the interval is over clusters of questions only. It does not extend to a new training.",
    "pooled": "Fewer than 5 shared seeds: the spread between seeds is pooled over the stored defenses of the table.",
    "two_way": "The interval includes the variation between seeds and between questions (two-way clusters).",
}
_JUDGED_TWICE = "One run: p is by the exact McNemar test over the questions on which the judges differ."


def run_comparison_view(comparison: RunComparison) -> RenderableType:
    """Show the scores of both sides, their differences and the numbers of the questions that flip."""
    is_one_run = len({run for pair in comparison.runs for run in pair}) == 1
    table = render_table(
        [
            Column("score"),
            *(number_column(title) for title in ("first %", "second %")),
            number_column("difference", legend="second minus first in points, with its 95% interval"),
            number_column("p"),
            number_column("flips", legend="questions with a higher (+) and a lower (-) value in the second"),
        ],
        [_cells(each) for each in comparison.scores],
    )
    pairs = [f"{first} and {second}" for first, second in comparison.runs]
    heads = render_fields([("first", comparison.first), ("second", comparison.second), ("runs", "\n".join(pairs))])
    notes = dict.fromkeys(_JUDGED_TWICE if is_one_run else _note(each) for each in comparison.scores)
    flips = [line for each in comparison.scores for line in _flip_lines(each)]
    return Group(heads, VisibleText(), table, *dim_notes([*flips, *notes, *comparison.notes]))


def _note(each: ScoreDifference) -> str:
    return f"{LABELS[each.score]}: {_METHODS[each.method]}" if each.method == "questions" else _METHODS[each.method]


def _cells(each: ScoreDifference) -> list[str]:
    up = sum(flip.second > flip.first for flip in each.flips)
    return [
        LABELS[each.score],
        f"{each.first:.1f}",
        f"{each.second:.1f}",
        f"{each.difference:+.1f} {interval_text(each.low, each.high, '+')}",
        "<0.001" if each.p_value < 0.001 else f"{each.p_value:.3f}",
        f"+{up} -{len(each.flips) - up}",
    ]


def _flip_lines(each: ScoreDifference) -> list[str]:
    """Return the numbers of the questions that flip, by seed."""
    by_seed: dict[int, list[Flip]] = defaultdict(list)
    for flip in each.flips:
        by_seed[flip.seed].append(flip)
    return [
        f"{LABELS[each.score]} flips, seed {seed}: {position_list([flip.number for flip in flips])}."
        for seed, flips in by_seed.items()
    ]


def position_list(numbers: Sequence[int]) -> str:
    """Return the positions of questions as text, at most the first 20."""
    shown = ", ".join(map(str, numbers[:_MOST_NUMBERS]))
    return shown if len(numbers) <= _MOST_NUMBERS else f"{shown} and {len(numbers) - _MOST_NUMBERS} more (--json)"
