"""Print rankings in the terminal, as Markdown, as CSV and as rows for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import RenderableType

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.visible import cell_of_text, visible_json_text

from .leaderboard import COLUMNS, MEANS, Ranking
from .markdown import markdown_row, markdown_text
from .published import comparison
from .render import Column, TableGroup, VisibleText, dim_notes, number_column, render_table


def _columns(baseline: str) -> list[Column]:
    """Return the columns of a ranking, with the order in which a narrow terminal leaves them out."""
    difference = f"paired difference to {baseline} over the shared seeds, with its 95% t-interval"
    return [
        number_column("rank"),
        Column("defense"),
        number_column("seeds", drop=5),
        number_column(
            "HS %",
            legend="answers to harmful prompts that the judge flags (lower: better), mean ± standard deviation over "
            "seeds; it determines the rank",
        ),
        number_column("HS diff.", drop=8, legend=difference),
        number_column(
            "FA %",
            legend="test items of the task answered correctly (higher: better), mean ± standard deviation over seeds",
        ),
        number_column("FA diff.", drop=7, legend=difference),
        number_column("HS before", drop=6, legend="HS of the aligned model"),
        number_column("align. loss", drop=3, legend="mean cross-entropy of the final model over alignment rows"),
        number_column("drift", drop=2, legend="embedding drift: distance of attention outputs from the aligned model"),
        number_column("per token", drop=1, legend="embedding drift per token"),
        number_column(
            "neither %",
            drop=4,
            legend="answers to harmful prompts that are neither flagged nor a refusal; if it is large, a low HS does "
            "not show safety",
        ),
        number_column("collapsed", drop=9, legend="runs that failed a validity gate"),
    ]


def rankings_view(rankings: Sequence[Ranking]) -> RenderableType:
    """Show rankings in the terminal, one table each with its notes below."""
    columns = _columns(rankings[0].baseline)
    parts: list[RenderableType] = []
    for ranking in rankings:
        styles = ["red" if row["collapsed_cells"] else None for row in ranking.rows]
        table = render_table(columns, map(_cells, ranking.rows), styles=styles)
        parts += [VisibleText(ranking.title, style="bold"), table, *dim_notes(ranking.notes), VisibleText()]
        if ranking.published:
            parts += [comparison.comparison_view(ranking.published), VisibleText()]
    return TableGroup(*parts)


def rankings_markdown(rankings: Sequence[Ranking]) -> str:
    """Return rankings as a Markdown page."""
    columns = _columns(rankings[0].baseline)
    lines = ["# Leaderboard", "", *(f"- {column.title}: {column.legend}." for column in columns if column.legend)]
    for ranking in rankings:
        lines += ["", f"## {markdown_text(ranking.title)}", "", markdown_row([column.title for column in columns])]
        lines += [markdown_row(["---:" if column.right else "---" for column in columns])]
        lines += [markdown_row(_cells(row)) for row in ranking.rows]
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


def write_rankings(rankings: Sequence[Ranking], folder: Path) -> None:
    """Write `leaderboard.csv` and `leaderboard.md` into a folder, and create the folder if necessary.

    Raises:
        BadInput: The folder is not writable.
    """
    ensure_writable(folder, "The output folder")
    frame = rankings_frame(rankings)
    for column in frame:
        escaped = visible_json_text if column.endswith("_params") else cell_of_text
        frame[column] = [escaped(value) if isinstance(value, str) else value for value in frame[column]]
    table = frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")
    with readable_disk_errors("the leaderboard", folder):
        write_atomically(folder / "leaderboard.csv", table)
        write_atomically(folder / "leaderboard.md", rankings_markdown(rankings))


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row under `_columns`."""
    formats = (".1f", ".3f", ".3g", ".3g", ".1f")
    return [
        "collapsed" if row["collapsed_cells"] else str(row["rank"]),
        row["defense"],
        str(row["seeds"]),
        _mean(row, "harmful_score"),
        _difference(row, "harmful_score"),
        _mean(row, "finetune_accuracy") + ("" if row["trained"] else " untrained"),
        _difference(row, "finetune_accuracy"),
        *(_number(row[column], form) for column, form in zip(MEANS, formats, strict=True)),
        f"{row['collapsed_cells']} of {row['seeds']}",
    ]


def _mean(row: dict[str, Any], score: str) -> str:
    mean, deviation = row[score], row[f"{score}_sd"]
    return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def _difference(row: dict[str, Any], score: str) -> str:
    if row["baseline"] is None or row["defense"] == row["baseline"]:
        return ""
    low, high = row[f"{score}_difference_low"], row[f"{score}_difference_high"]
    difference = _number(row[f"{score}_difference"], "+.1f")
    return difference if math.isnan(low) else f"{difference} [{low:+.1f}, {high:+.1f}]"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
