"""Published figures from `leaderboards/published/`: load, filter, list, and recompute their averages."""

from __future__ import annotations

import csv
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.core.errors import BadInput, allowed_names

from ..render import Column, VisibleText, dim_notes, number_column, numbers, render_table

Figure = dict[str, str]
"""A row of `results.csv`: the text of every column."""

EVIDENCE = (
    *("paper text", "authors' table image", "authors' run log"),
    *("author rebuttal", "paper text (OCR)", "third party"),
)
"""Sources of a figure, from the most direct to the least."""

_PAPER = ("protocol", "paper", "arxiv", "venue")
_NEVER = "Absolute scores never compare across protocols: they depend on alignment data, model, prompts and judge."


def load_table(name: str) -> list[dict[str, str]]:
    """Load one of the published CSVs, from a checkout or an installed package."""
    return load_csv(files("harmbench_vaccine.published") / name)


def load_csv(file: Traversable | Path) -> list[dict[str, str]]:
    """Load the rows of a CSV."""
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def load_figures() -> list[Figure]:
    """Load every published figure, in the order of the file."""
    return load_table("results.csv")


def select_figures(rows: Sequence[Figure], filters: Mapping[str, Sequence[str]]) -> list[Figure]:
    """Select figures by column values.

    Case is ignored unless two values differ only in case: `Antidote` and `AntiDote` are two defenses.

    Args:
        rows: Figures to select from.
        filters: Column -> allowed values; an empty sequence allows all.

    Raises:
        BadInput: No figure has such a value.
    """
    allowed = {
        column: {_known_value(rows, column, name) for name in names} for column, names in filters.items() if names
    }
    return [row for row in rows if all(row[column] in names for column, names in allowed.items())]


def _known_value(rows: Sequence[Figure], column: str, name: str) -> str:
    values = sorted({row[column] for row in rows} - {""}, key=lambda value: (value.casefold(), value))
    if name in values:
        return name
    spellings: dict[str, list[str]] = defaultdict(list)
    for value in values:
        spellings[value.casefold()].append(value)
    candidates = spellings.get(name.casefold(), [])
    if len(candidates) == 1:
        return candidates[0]
    close = difflib.get_close_matches(name.casefold(), spellings, n=1, cutoff=0.4)
    guess = f" Did you mean {' or '.join(map(repr, spellings[close[0]]))}?" if close else ""
    raise BadInput(f"Unknown {column} {name!r}.{guess} Allowed: {allowed_names(name, values)}.")


def summarize_figures(rows: Sequence[Figure], overhead: int) -> dict[str, Any]:
    """Count figures by protocol, paper and evidence.

    Args:
        rows: The figures.
        overhead: Number of figures on time and memory, which are in `overhead.csv`.
    """
    groups: dict[tuple[str, str], list[Figure]] = defaultdict(list)
    for row in rows:
        groups[row["protocol"], row["paper"]].append(row)
    return {
        "figures": len(rows),
        "overhead_figures": overhead,
        "protocols": dict(Counter(row["protocol"] for row in rows)),
        "evidence": _evidence_counts(rows),
        "papers": [
            {
                "protocol": protocol,
                "paper": paper,
                "arxiv": figures[0]["arxiv"],
                "venue": figures[0]["venue"],
                "figures": len(figures),
                "metrics": list(dict.fromkeys(row["metric"] for row in figures)),
                "evidence": _evidence_counts(figures),
            }
            for (protocol, paper), figures in groups.items()
        ],
    }


def _evidence_counts(rows: Sequence[Figure]) -> dict[str, int]:
    """Return source -> number of figures; the most direct source first, unknown sources last."""
    counts = Counter(row["evidence"] for row in rows)
    return {source: counts[source] for source in (*EVIDENCE, *sorted(counts.keys() - EVIDENCE)) if counts[source]}


# ---------------------------------------------------------------------------------------------------------------------
# Averages

_AVERAGE = re.compile(r"\b(average|avg|mean)\b", re.IGNORECASE)
_TABLE = ("protocol", "paper", "table", "sweep")
_SETTING = ("model", "task", "harmful_ratio", "samples")


@dataclass(frozen=True)
class Average:
    """A printed average with the figures that it averages."""

    figure: Figure
    parts: list[Figure]
    """The other figures in its row of the paper's table."""
    missing: str
    """The parts that are not recorded; empty if all are."""

    @property
    def mean(self) -> Decimal:
        """The mean of the printed parts."""
        return self._sum / len(self.parts)

    @property
    def follows(self) -> bool:
        """True if rounding explains the difference: half a unit of the last digit of the average and of each part."""
        slack = len(self.parts) * _half_a_unit(self.figure) + sum(map(_half_a_unit, self.parts))
        return abs(self._sum - len(self.parts) * Decimal(self.figure["value"])) <= slack

    @property
    def _sum(self) -> Decimal:
        return sum((Decimal(part["value"]) for part in self.parts), Decimal(0))

    def to_json(self) -> dict[str, Any]:
        """Return the average with its parts; without `recomputed` and `holds` if parts are missing."""
        columns = (*_TABLE, *_SETTING, "defense", "metric", "unit", "evidence", "note")
        cells = [{"sweep_value": part["sweep_value"], "printed": part["value"]} for part in self.parts]
        values = {**{key: self.figure[key] for key in columns}, "printed": self.figure["value"], "cells": cells}
        if self.missing:
            return {**values, "missing": self.missing}
        return {**values, "recomputed": float(self.mean), "holds": self.follows}


def _half_a_unit(figure: Figure) -> Decimal:
    exponent = Decimal(figure["value"]).as_tuple().exponent
    return Decimal(1).scaleb(int(exponent)) / 2


def is_average(row: Figure) -> bool:
    """Return whether a figure is an average over a column that its table varies."""
    return any(_AVERAGE.search(row[column]) for column in ("sweep_value", *_SETTING))


def find_averages(rows: Sequence[Figure]) -> list[Average]:
    """Find every printed average: a figure with `average` as its sweep value or in its setting.

    Its parts are the other figures of the same table, sweep, defense and metric, in the setting that the average states
    (the swept column is empty). A part is missing if a different row of the table has it, or if a note mentions an
    omitted column.
    """
    tables: dict[tuple[str, ...], list[Figure]] = defaultdict(list)
    for row in rows:
        if not is_average(row):
            tables[_table_key(row)].append(row)
    averages = []
    for row in filter(is_average, rows):
        stated = {column: row[column] for column in _SETTING if row[column] and not _AVERAGE.search(row[column])}
        table = [figure for figure in tables[_table_key(row)] if stated.items() <= figure.items()]
        parts = [part for part in table if (part["defense"], part["metric"]) == (row["defense"], row["metric"])]
        averages.append(Average(row, parts, _missing_parts(row, parts, table)))
    return averages


def _table_key(row: Figure) -> tuple[str, ...]:
    return tuple(row[column] for column in _TABLE)


def _missing_parts(row: Figure, parts: Sequence[Figure], table: Sequence[Figure]) -> str:
    if not parts:
        return "none of its cells is recorded"
    recorded = {part["sweep_value"] for part in parts}
    missing = dict.fromkeys(figure["sweep_value"] for figure in table if figure["sweep_value"] not in recorded)
    if missing:
        return f"not recorded: {', '.join(missing)}"
    return "a column is omitted according to its note" if "omitted" in row["note"] else ""


def check_averages(averages: Sequence[Average]) -> dict[str, Any]:
    """Recompute averages.

    Returns:
        The number of averages, the number that follow from their cells, and lists of those that do not follow or
        cannot be checked.
    """
    complete = [average for average in averages if not average.missing]
    wrong = [average for average in complete if not average.follows]
    return {
        "averages": len(averages),
        "follow": len(complete) - len(wrong),
        "do_not_follow": [average.to_json() for average in wrong],
        "not_checkable": [average.to_json() for average in averages if average.missing],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Views


def figure_json(row: Figure) -> dict[str, Any]:
    """Return a figure with `value` as a number and `printed` as the paper's text."""
    return {**row, "value": float(row["value"]), "printed": row["value"]}


def summary_view(summary: Mapping[str, Any]) -> RenderableType:
    """Show one row per paper and protocol, then the counts by evidence.

    Args:
        summary: The output of `summarize_figures`.
    """
    table = render_table(
        [
            *(Column("protocol", wrap=False), Column("paper", least=16)),
            *(Column("arXiv", wrap=False, drop=2), Column("venue", drop=1)),
            *numbers("figures"),
            Column("evidence", least=16),
        ],
        [
            [*(str(paper[key]) for key in (*_PAPER, "figures")), _format_counts(paper["evidence"])]
            for paper in summary["papers"]
        ],
    )
    papers = len({paper["paper"] for paper in summary["papers"]})
    notes = [
        f"{summary['figures']} figures of {papers} papers under {len(summary['protocols'])} protocols; "
        f"{summary['overhead_figures']} more, of time and memory, are in overhead.csv. {_NEVER}",
        f"Evidence, from the most direct to the least: {_format_counts(summary['evidence'])}.",
        "A filter lists figures: hbv published --paper Vaccine --metric HS. --check recomputes the averages.",
    ]
    return Group(table, *dim_notes(notes))


_FIGURE_COLUMNS = {
    "table": Column("table", drop=4, least=8),
    "model": Column("model", drop=5),
    "task": Column("task", least=5),
    "setting": Column("setting"),
    "harmful_ratio": Column("p", wrap=False),
    "samples": Column("n", wrap=False, drop=3),
    "defense": Column("defense"),
    "metric": Column("metric", least=6),
    "value": number_column("value"),
    "unit": Column("unit", drop=1, least=4),
    "evidence": Column("evidence", drop=2, least=8),
    "mark": Column("note"),
}


def figures_table(rows: Sequence[Figure], limit: int) -> RenderableType:
    """Show the first `limit` figures, one table per protocol and paper, each with its notes below."""
    groups: dict[tuple[str, ...], list[Figure]] = defaultdict(list)
    for row in rows[:limit]:
        groups[tuple(row[key] for key in _PAPER)].append(row)
    parts: list[RenderableType] = []
    for (protocol, paper, arxiv, venue), figures in groups.items():
        marks = {"": ""}
        for row in figures:
            marks.setdefault(row["note"], f"[{len(marks)}]")
        cells = [
            {**row, "setting": "=".join(filter(None, (row["sweep"], row["sweep_value"]))), "mark": marks[row["note"]]}
            for row in figures
        ]
        table = render_table(
            list(_FIGURE_COLUMNS.values()), [[row[key] for key in _FIGURE_COLUMNS] for row in cells], gap=1
        )
        notes = dim_notes(f"{mark} {note}" for note, mark in marks.items() if note)
        parts += [
            VisibleText(f"Protocol {protocol}: {paper} ({arxiv}, {venue})", style="bold"),
            table,
            *notes,
            VisibleText(),
        ]
    count = f"{min(limit, len(rows))} of {len(rows)} figures{'; --limit shows more' if limit < len(rows) else ''}."
    return Group(*parts, *dim_notes([f"{count} {_NEVER}" if rows else "No figure matches all filters."]))


def check_view(outcome: Mapping[str, Any]) -> RenderableType:
    """Show the averages that do not follow from their cells, and the counts of the others.

    Args:
        outcome: The output of `check_averages`.
    """
    wrong, unknown = outcome["do_not_follow"], outcome["not_checkable"]
    rows = []
    for average in wrong:
        digits = len(average["printed"].partition(".")[2])
        difference = float(average["printed"]) - average["recomputed"]
        rows.append(
            [
                *(average[key] for key in ("paper", "table", "defense", "metric", "printed")),
                _decimals(average["recomputed"], digits),
                ("+" if difference > 0 else "") + _decimals(difference, digits),
                ", ".join(f"{cell['sweep_value']}: {cell['printed']}" for cell in average["cells"]),
                average["evidence"],
            ]
        )
    counts = Counter(average["missing"] for average in unknown)
    reasons = "; ".join(f"{count}: {reason}" for reason, count in counts.items())
    notes = [
        f"{outcome['averages']} printed averages: {outcome['follow']} follow from their cells within rounding, "
        f"{len(wrong)} do not, {len(unknown)} cannot be checked{reasons and f' ({reasons})'}.",
    ]
    if not wrong:
        return Group(*dim_notes(notes))
    table = render_table(
        [
            *(Column("paper", wrap=False), Column("table", least=8), Column("defense"), Column("metric", least=6)),
            *numbers("printed", "recomputed", "differs by"),
            *(Column("cells", least=24, drop=2), Column("evidence", drop=1)),
        ],
        rows,
        gap=1,
    )
    notes.append("The numbers do not show whether the average, a cell, or a copy of one of them is wrong.")
    return Group(table, *dim_notes(notes))


def _decimals(value: float, least: int) -> str:
    """Format a number with `least` decimals, and up to two more if they are not 0."""
    text = f"{value:.{least + 2}f}"
    return text[:-2] + text[-2:].rstrip("0") if least else f"{value:.2f}"


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
