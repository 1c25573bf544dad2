"""Print rankings in the terminal, as Markdown, as CSV and as rows for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import pandas as pd
from rich.console import RenderableType

from harmbench_vaccine.evaluation.result_text import interval_text
from harmbench_vaccine.reporting.markdown import markdown_row, markdown_text
from harmbench_vaccine.reporting.published import comparison
from harmbench_vaccine.reporting.render import Column, TableGroup, VisibleText, dim_notes, number_column, render_table

from .grids import cell_mark
from .noise import MARK
from .ranking import COLUMNS, Ranking


def _columns(rankings: Sequence[Ranking]) -> list[Column]:
    """Return the columns of rankings, with the order in which a narrow terminal leaves them out."""
    baseline = rankings[0].baseline
    difference = f"difference to {baseline} with its 95% interval; * after Holm's correction at the level 5%"
    return [
        number_column("rank", legend="group of ranks of defenses that do not differ significantly in HS"),
        Column("defense"),
        number_column("seeds", drop=6),
        number_column(
            "HS %",
            legend="answers to harmful prompts that the judge flags (lower: better), mean over seeds with its 95% "
            "interval; it determines the rank",
        ),
        number_column("HS diff.", drop=12, legend=difference),
        number_column("FA %", legend="test items of the task answered correctly (higher: better), mean over seeds"),
        number_column("FA interval", drop=8, legend="95% interval of FA"),
        number_column("FA diff.", drop=9, legend=f"{difference}; with the opposite sign, the safety tax"),
        number_column("HS before", drop=5, legend="HS of the aligned model"),
        number_column("refused %", drop=10, legend="harmful prompts that are refused"),
        number_column("benign refused %", drop=5, legend="benign prompts that are refused"),
        number_column(
            "neither %",
            drop=7,
            legend="answers to harmful prompts that are neither flagged nor a refusal; if it is large, a low HS does "
            "not show safety",
        ),
        number_column("echo %", drop=4, legend="answers to harmful prompts that equal a response of the user's rows"),
        number_column("harmful tokens %", drop=4, legend="response tokens of the user stage that are in harmful rows"),
        number_column("align. loss", drop=3, legend="mean cross-entropy of the final model over alignment rows"),
        number_column("drift", drop=2, legend="embedding drift: distance of attention outputs from the aligned model"),
        number_column("per token", drop=1, legend="embedding drift per token"),
        number_column("Pareto", drop=11, legend="yes: no ranked defense is better in HS or FA without being worse"),
        *(
            number_column(f"HS % by {judge}", drop=0, legend="and Cohen's kappa with the judge of the ranking")
            for judge in _other_judges(rankings)
        ),
    ]


def _other_judges(rankings: Sequence[Ranking]) -> list[str]:
    """Return the judges but the headline one, in the order of their first row."""
    return list(dict.fromkeys(judge for ranking in rankings for row in ranking.rows for judge in _judge_numbers(row)))


def _judge_numbers(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the numbers of the other judges of a row."""
    numbers: dict[str, dict[str, float | None]] = json.loads(row["other_judges"] or "{}")
    return numbers


def rankings_view(rankings: Sequence[Ranking]) -> RenderableType:
    """Show rankings in the terminal, one table each with its notes below."""
    columns, judges = _columns(rankings), _other_judges(rankings)
    parts: list[RenderableType] = []
    for ranking in rankings:
        styles = ["red" if row["rank"] is None else None for row in ranking.rows]
        table = render_table(columns, [_cells(row, judges) for row in ranking.rows], styles=styles)
        parts += [VisibleText(ranking.title, style="bold"), table, *dim_notes(ranking.notes), VisibleText()]
        if ranking.published:
            parts += [comparison.comparison_view(ranking.published), VisibleText()]
    return TableGroup(*parts)


def rankings_markdown(rankings: Sequence[Ranking], note: str = "") -> str:
    """Return rankings as a Markdown page; the title has a note such as "12 of 90 runs"."""
    columns, judges = _columns(rankings), _other_judges(rankings)
    lines = [
        f"# Leaderboard{note and f': {note}'}",
        "",
        *(f"- {column.title}: {column.legend}." for column in columns if column.legend),
    ]
    for ranking in rankings:
        lines += ["", f"## {markdown_text(ranking.title)}", "", markdown_row([column.title for column in columns])]
        lines += [markdown_row(["---:" if column.right else "---" for column in columns])]
        lines += [markdown_row(_cells(row, judges)) for row in ranking.rows]
        if ranking.notes:
            lines += ["", *(f"- {markdown_text(note)}" for note in ranking.notes)]
        if ranking.published:
            lines += _comparison_lines(comparison.comparison_sheet(ranking.published))
    return "\n".join(lines) + "\n"


def _comparison_lines(sheet: comparison.ComparisonSheet) -> list[str]:
    lines = []
    if sheet.rows:
        lines += ["", f"### {markdown_text(sheet.title)}", ""]
        lines += [markdown_row(sheet.head), markdown_row(["---"] * len(sheet.head)), *map(markdown_row, sheet.rows)]
    return [*lines, "", *(f"- {markdown_text(note)}" for note in sheet.notes)]


def ranking_rows(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """Return the rows of all rankings; after a comparison with the columns `comparison.COLUMNS` too."""
    return [
        row | compared.to_columns() if compared else row
        for ranking in rankings
        for row, compared in zip_longest(ranking.rows, ranking.published)
    ]


def rankings_frame(rankings: Sequence[Ranking]) -> pd.DataFrame:
    """Return the rows of all rankings as a data frame with the columns `COLUMNS` and those of a comparison."""
    compared = comparison.COLUMNS if any(ranking.published for ranking in rankings) else {}
    return pd.DataFrame(ranking_rows(rankings), columns=[*COLUMNS, *compared])


def _cells(row: dict[str, Any], judges: Sequence[str]) -> list[str]:
    """Return the cells of a row under `_columns`, with those of the other judges."""
    return [
        _rank(row),
        row["defense"],
        str(row["seeds"]),
        _score(row, "harmful_score"),
        _difference(row, "harmful_score"),
        f"{row['finetune_accuracy']:.1f}" + ("" if row["trained"] else " untrained"),
        _interval(row, "finetune_accuracy"),
        _difference(row, "finetune_accuracy"),
        _number(row["harmful_score_before"], ".1f"),
        *(
            _number(row[column], ".1f")
            for column in ("refusal_rate", "over_refusal", "neither", "task_echo", "harmful_token_share")
        ),
        *(
            _number(row[column], form)
            for column, form in (
                ("alignment_loss", ".3f"),
                ("embedding_drift", ".3g"),
                ("embedding_drift_per_token", ".3g"),
            )
        ),
        "yes" if row["pareto"] else "",
        *(_judge_score(_judge_numbers(row).get(judge)) for judge in judges),
    ]


def _judge_score(numbers: dict[str, float | None] | None) -> str:
    """Return HS by another judge with its kappa."""
    if numbers is None:
        return ""
    kappa = numbers["kappa"]
    return f"{numbers['harmful_score']:.1f}, kappa {'undefined' if kappa is None else format(kappa, '.2f')}"


def _rank(row: dict[str, Any]) -> str:
    """Return the group of ties, or why a defense has no rank."""
    if row["rank"] is None:
        return cell_mark(row)
    first, last = row["tie_first"], row["tie_last"]
    return str(first) if first == last else f"{first}-{last}"


def _score(row: dict[str, Any], score: str) -> str:
    return f"{row[score]:.1f} {_interval(row, score)}"


def _interval(row: dict[str, Any], score: str) -> str:
    return interval_text(row[f"{score}_low"], row[f"{score}_high"])


def _difference(row: dict[str, Any], score: str) -> str:
    value = row[f"{score}_difference"]
    if math.isnan(value):
        return ""
    low, high, p_value = (row[f"{score}_difference_{end}"] for end in ("low", "high", "p"))
    mark = MARK if abs(value) < row[f"{score}_floor"] else "*" if p_value < 0.05 else ""
    return f"{value:+.1f} {interval_text(low, high, '+')}{mark}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
