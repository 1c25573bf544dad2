"""What papers print, from `leaderboards/published/`: listed one table a protocol, and their averages recomputed."""

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
from rich.table import Table
from rich.text import Text

from harmbench_vaccine.core.errors import BadInput

Figure = dict[str, str]
"""A row of `results.csv`: every column as the text that stands there."""

EVIDENCE = (
    *("paper text", "authors' table image", "authors' run log"),
    *("author rebuttal", "paper text (OCR)", "third party"),
)
"""Where a figure was read, from the most direct to the least."""

_PAPER = ("protocol", "paper", "arxiv", "venue")
_NEVER = "Absolute scores never compare across protocols: they depend on alignment data, model, prompts and judge."


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of one of the published CSVs, in a checkout as in an installed package."""
    return rows_of(files("harmbench_vaccine.published") / name)


def rows_of(file: Traversable | Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def load_figures() -> list[Figure]:
    """Every published figure, in the order of the file."""
    return read_table("results.csv")


def select_figures(rows: Sequence[Figure], wanted: Mapping[str, Sequence[str]]) -> list[Figure]:
    """The figures that have, in every column of which something is wanted, one of the wanted values.

    Case does not matter where it tells no two values apart; `Antidote` and `AntiDote` are two defenses.

    Raises:
        BadInput: no figure has such a value.
    """
    kept = {column: {_meant(rows, column, name) for name in names} for column, names in wanted.items() if names}
    return [row for row in rows if all(row[column] in names for column, names in kept.items())]


def _meant(rows: Sequence[Figure], column: str, name: str) -> str:
    values = sorted({row[column] for row in rows} - {""}, key=lambda value: (value.casefold(), value))
    if name in values:
        return name
    spelled: dict[str, list[str]] = defaultdict(list)
    for value in values:
        spelled[value.casefold()].append(value)
    alike = spelled.get(name.casefold(), [])
    if len(alike) == 1:
        return alike[0]
    close = difflib.get_close_matches(name.casefold(), spelled, n=1, cutoff=0.4)
    guess = f" Did you mean {' or '.join(map(repr, spelled[close[0]]))}?" if close else ""
    raise BadInput(f"Unknown {column} {name!r}.{guess} Allowed: {', '.join(values)}.")


def summary(rows: Sequence[Figure], overhead: int) -> dict[str, Any]:
    """How many figures there are, of which papers and protocols, and how they were read.

    `overhead` is the number of figures of time and memory, which stand in a file of their own.
    """
    grouped: dict[tuple[str, str], list[Figure]] = defaultdict(list)
    for row in rows:
        grouped[row["protocol"], row["paper"]].append(row)
    return {
        "figures": len(rows),
        "overhead_figures": overhead,
        "protocols": dict(Counter(row["protocol"] for row in rows)),
        "evidence": _grades(rows),
        "papers": [
            {
                "protocol": protocol,
                "paper": paper,
                "arxiv": own[0]["arxiv"],
                "venue": own[0]["venue"],
                "figures": len(own),
                "metrics": list(dict.fromkeys(row["metric"] for row in own)),
                "evidence": _grades(own),
            }
            for (protocol, paper), own in grouped.items()
        ],
    }


def _grades(rows: Sequence[Figure]) -> dict[str, int]:
    """Grade -> how many figures have it; the most direct first, and one that has no rank yet last."""
    counts = Counter(row["evidence"] for row in rows)
    return {grade: counts[grade] for grade in (*EVIDENCE, *sorted(counts.keys() - EVIDENCE)) if counts[grade]}


# ---------------------------------------------------------------------------------------------------------------------
# Averages

_AVERAGE = re.compile(r"\b(average|avg|mean)\b", re.IGNORECASE)
_TABLE = ("protocol", "paper", "table", "sweep")
_SETTING = ("model", "task", "harmful_ratio", "samples")


@dataclass(frozen=True)
class Average:
    """A printed average with the cells of its row of the paper's table."""

    figure: Figure
    cells: list[Figure]
    missing: str
    """Which of them are not recorded; empty if all are."""

    @property
    def mean(self) -> Decimal:
        """The average of the cells as they are printed."""
        return self._sum / len(self.cells)

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference: half a unit of the last digit of the average and of each cell."""
        slack = len(self.cells) * _half_a_unit(self.figure) + sum(map(_half_a_unit, self.cells))
        return abs(self._sum - len(self.cells) * Decimal(self.figure["value"])) <= slack

    @property
    def _sum(self) -> Decimal:
        return sum((Decimal(cell["value"]) for cell in self.cells), Decimal(0))

    def json(self) -> dict[str, Any]:
        """The average with its cells; without `recomputed` and `holds` if some are missing."""
        place = {key: self.figure[key] for key in (*_TABLE, *_SETTING, "defense", "metric", "unit", "evidence", "note")}
        cells = [{"sweep_value": cell["sweep_value"], "printed": cell["value"]} for cell in self.cells]
        made = {**place, "printed": self.figure["value"], "cells": cells}
        if self.missing:
            return {**made, "missing": self.missing}
        return {**made, "recomputed": float(self.mean), "holds": self.holds}


def _half_a_unit(figure: Figure) -> Decimal:
    exponent = Decimal(figure["value"]).as_tuple().exponent
    return Decimal(1).scaleb(int(exponent)) / 2


def is_average(row: Figure) -> bool:
    """Whether a figure is an average over what its table varies."""
    return any(_AVERAGE.search(row[column]) for column in ("sweep_value", *_SETTING))


def find_averages(rows: Sequence[Figure]) -> list[Average]:
    """Every printed average: a figure whose place in the table says so, such as the sweep value `average`.

    Its cells are the other figures of the same table, sweep, defense and metric; what else it says of its setting (the
    swept column is empty) holds for them too. A cell is missing that another row of the table has, or that a note
    calls omitted.
    """
    tables: dict[tuple[str, ...], list[Figure]] = defaultdict(list)
    for row in rows:
        if not is_average(row):
            tables[_place(row)].append(row)
    found = []
    for row in filter(is_average, rows):
        stated = {column: row[column] for column in _SETTING if row[column] and not _AVERAGE.search(row[column])}
        table = [cell for cell in tables[_place(row)] if all(cell[key] == value for key, value in stated.items())]
        cells = [cell for cell in table if (cell["defense"], cell["metric"]) == (row["defense"], row["metric"])]
        found.append(Average(row, cells, _missing(row, cells, table)))
    return found


def _place(row: Figure) -> tuple[str, ...]:
    return tuple(row[column] for column in _TABLE)


def _missing(row: Figure, cells: Sequence[Figure], table: Sequence[Figure]) -> str:
    if not cells:
        return "none of its cells is recorded"
    there = {cell["sweep_value"] for cell in cells}
    lacking = dict.fromkeys(cell["sweep_value"] for cell in table if cell["sweep_value"] not in there)
    if lacking:
        return f"not recorded: {', '.join(lacking)}"
    return "a column is omitted, says its note" if "omitted" in row["note"] else ""


def check_averages(found: Sequence[Average]) -> dict[str, Any]:
    """How many averages follow from their cells, and those that do not or cannot be checked."""
    whole = [average for average in found if not average.missing]
    wrong = [average for average in whole if not average.holds]
    return {
        "averages": len(found),
        "follow": len(whole) - len(wrong),
        "do_not_follow": [average.json() for average in wrong],
        "not_checkable": [average.json() for average in found if average.missing],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def figure_json(row: Figure) -> dict[str, Any]:
    """A figure with its value as a number, and `printed` as the paper has it."""
    return {**row, "value": float(row["value"]), "printed": row["value"]}


def summary_view(made: Mapping[str, Any]) -> RenderableType:
    """One line a paper and protocol, then what the figures rest on."""
    table = _table("protocol", "paper", "arXiv", "venue", "figures", "evidence")
    for paper in made["papers"]:
        cells = [str(paper[key]) for key in (*_PAPER, "figures")]
        table.add_row(*map(Text, [*cells, _counts(paper["evidence"])]))
    papers = len({paper["paper"] for paper in made["papers"]})
    notes = [
        f"{made['figures']} figures of {papers} papers under {len(made['protocols'])} protocols; "
        f"{made['overhead_figures']} more, of time and memory, are in overhead.csv. {_NEVER}",
        f"Evidence, from the most direct to the least: {_counts(made['evidence'])}.",
        "A filter lists figures: hbv published --paper Vaccine --metric HS. --check recomputes the averages.",
    ]
    return Group(table, *[Text(note, style="dim") for note in notes])


_SHOWN = {
    "table": "table", "model": "model", "task": "task", "setting": "setting", "harmful_ratio": "p", "samples": "n",
    "defense": "defense", "metric": "metric", "value": "value", "unit": "unit", "evidence": "evidence", "mark": "note",
}  # fmt: skip
"""Column of a listing -> its heading."""


def figures_table(rows: Sequence[Figure], limit: int) -> RenderableType:
    """The first `limit` figures, one table for every protocol and paper, with their notes below it."""
    grouped: dict[tuple[str, ...], list[Figure]] = defaultdict(list)
    for row in rows[:limit]:
        grouped[tuple(row[key] for key in _PAPER)].append(row)
    shown: list[RenderableType] = []
    for (protocol, paper, arxiv, venue), own in grouped.items():
        table = _table(*_SHOWN.values())
        marks: dict[str, str] = {"": ""}
        for row in own:
            made = {
                **row,
                "setting": "=".join(filter(None, (row["sweep"], row["sweep_value"]))),
                "mark": marks.setdefault(row["note"], f"[{len(marks)}]"),
            }
            table.add_row(*[Text(made[key]) for key in _SHOWN])
        notes = [Text(f"{mark} {note}", style="dim") for note, mark in marks.items() if note]
        shown += [Text(f"Protocol {protocol}: {paper} ({arxiv}, {venue})", style="bold"), table, *notes, Text()]
    count = f"{min(limit, len(rows))} of {len(rows)} figures{'; --limit shows more' if limit < len(rows) else ''}."
    return Group(*shown, Text(f"{count} {_NEVER}" if rows else "No figure fits all of these.", style="dim"))


def check_view(made: Mapping[str, Any]) -> RenderableType:
    """The averages that do not follow from their cells, and how many do or cannot be checked."""
    wrong, unknown = made["do_not_follow"], made["not_checkable"]
    table = _table("paper", "table", "defense", "metric", "printed", "recomputed", "differs by", "cells", "evidence")
    for average in wrong:
        digits = len(average["printed"].partition(".")[2])
        difference = float(average["printed"]) - average["recomputed"]
        table.add_row(
            *[Text(average[key]) for key in ("paper", "table", "defense", "metric", "printed")],
            _decimals(average["recomputed"], digits),
            ("+" if difference > 0 else "") + _decimals(difference, digits),
            Text(", ".join(f"{cell['sweep_value']}: {cell['printed']}" for cell in average["cells"])),
            Text(average["evidence"]),
        )
    reasons = _counts(Counter(average["missing"] for average in unknown))
    notes = [
        f"{made['averages']} printed averages: {made['follow']} follow from their cells within rounding, "
        f"{len(wrong)} do not, {len(unknown)} cannot be checked{reasons and f' ({reasons})'}.",
    ]
    if wrong:
        notes.append("What is wrong, the average, a cell, or how one of them was copied, the numbers do not tell.")
    return Group(*([table] if wrong else []), *[Text(note, style="dim") for note in notes])


def _decimals(value: float, least: int) -> str:
    """At least as many as are printed, and two more where they are not 0."""
    text = f"{value:.{least + 2}f}"
    return text[:-2] + text[-2:].rstrip("0") if least else f"{value:.2f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _table(*titles: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        number = title in ("figures", "value", "printed", "recomputed", "differs by")
        whole = number or title in ("protocol", "paper")
        table.add_column(title, justify="right" if number else "left", overflow="fold", no_wrap=whole)
    return table
