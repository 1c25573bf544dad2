"""Write the tables of scores on four pages from the results in `leaderboards`.

python docs/render_leaderboard.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harmbench_vaccine.reporting.leaderboard.grids import Cell, Grid, cell_mark, ratio_grids
from harmbench_vaccine.reporting.leaderboard.ranking import rank_results
from harmbench_vaccine.reporting.leaderboard.tuned import tuned_changes, tuned_grids

ROOT = Path(__file__).parents[1]


class Source(NamedTuple):
    """Results, and the column whose other scores are shown."""

    results: Path
    detailed: str


TESTBED = Source(ROOT / "leaderboards" / "testbed.csv", "p = 10%")
ALL_DEFENSES = Source(ROOT / "leaderboards" / "testbed-all-defenses.csv", "p = 20%")
SMOLLM2 = Source(ROOT / "leaderboards" / "smollm2.csv", "p = 20%")
PAGES = {
    ROOT / "README.md": TESTBED,
    ROOT / "docs" / "leaderboard.md": TESTBED,
    ROOT / "docs" / "all-defenses.md": ALL_DEFENSES,
    ROOT / "docs" / "smollm2.md": SMOLLM2,
}
BEGIN, END = "<!-- Written by docs/render_leaderboard.py: {} -->", "<!-- end: {} -->"
MARKS = {"": "", "collapsed": "†", "hollow": "‡", "self-destruct": "§"}
LEVEL = 0.05
BASELINES = "none", "sft"


def score_text(cell: Cell) -> str:
    """Return HS with the mark of a cell without a rank, and its 95% interval, rounded outward to whole points."""
    low, high = math.floor(cell["harmful_score_low"]), math.ceil(cell["harmful_score_high"])
    return f"{cell['harmful_score']:.1f}{MARKS[cell_mark(cell)]} [{low}, {high}]"


def difference_text(cell: Cell) -> str:
    """Return the difference in HS to SFT with its 95% interval; `*` marks a significant one."""
    low, high = (cell[f"harmful_score_difference_{end}"] for end in ("low", "high"))
    if not math.isfinite(low):
        return ""
    star = "*" if cell["harmful_score_difference_p"] < LEVEL else ""
    return f"{cell['harmful_score_difference']:+.1f}{star} [{math.floor(low):+}, {math.ceil(high):+}]"


def table_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def defense_rows(default: Grid, tuned: Grid | None, column: str) -> Iterator[tuple[str, Grid, str]]:
    """Yield the label, the grid and the name of each defense, and again where the tuning changed its parameters."""
    for name in sorted_defenses(default, column):
        yield f"`{name}`", default, name
        if tuned and (values := tuned_text(default, tuned, name, column)):
            yield f"`{name}`, tuned ({values})", tuned, name


def sorted_defenses(grid: Grid, column: str) -> list[str]:
    """Return the baselines, the other defenses by HS in one column, and those without a rank."""

    def place(name: str) -> tuple[bool, bool, float]:
        cell = grid.cell(name, column)
        return (name not in BASELINES, not cell or cell_mark(cell) != "", cell["harmful_score"] if cell else math.inf)

    return sorted(grid.defenses, key=place)


def tuned_text(default: Grid, tuned: Grid, name: str, column: str) -> str:
    """Return the parameters of a defense that the tuning changed, with their defaults; empty if there are none."""
    before, after = default.cell(name, column), tuned.cell(name, column)
    if not before or not after:
        return ""
    changes, defaults = tuned_changes(before, after), tuned_changes(after, before)
    return ", ".join(f"{key} = {value:g}, default {defaults[key]:g}" for key, value in changes.items())


def by_ratio(title: str, text: Callable[[Cell], str], default: Grid, tuned: Grid | None, column: str) -> list[str]:
    """Return the table of what `text` returns for each cell; a table column is a harmful ratio."""
    return [
        table_row([title, *default.columns]),
        table_row(["---", *("---:" for _ in default.columns)]),
        *(
            table_row([label, *(text(cell) if cell else "" for cell in grid.cells(name))])
            for label, grid, name in defense_rows(default, tuned, column)
        ),
    ]


def answers(default: Grid, tuned: Grid | None, column: str) -> list[str]:
    """Return the table of what the answers to harmful questions are, and of the accuracy, at one ratio."""
    columns: dict[str, Callable[[Cell], str]] = {
        "HS %": lambda cell: f"{cell['harmful_score']:.1f}{MARKS[cell_mark(cell)]}",
        "refused %": lambda cell: f"{cell['refusal_rate']:.1f}",
        "benign refused %": lambda cell: f"{cell['over_refusal']:.1f}",
        "neither %": lambda cell: f"{cell['neither']:.1f}",
        "task echo %": lambda cell: f"{cell['task_echo']:.1f}",
        "FA %": lambda cell: f"{cell['finetune_accuracy']:.1f}",
        "HS - HS of `sft`": difference_text,
    }
    rows = [(label, grid.cell(name, column)) for label, grid, name in defense_rows(default, tuned, column)]
    return [
        table_row([f"at {column}", *columns]),
        table_row(["---", *("---:" for _ in columns)]),
        *(table_row([label, *(text(cell) for text in columns.values())]) for label, cell in rows if cell),
    ]


def default_and_tuned(default: Grid, tuned: Grid | None, column: str) -> list[str]:
    """Return the table of HS at the two largest ratios and of FA, with default and with tuned parameters."""
    assert tuned
    columns = list(default.columns)[-2:]
    titles = [f"HS %, {name}" for name in columns] + [f"FA %, {column}"]
    rows = [
        table_row(["defense", *(title for name in titles for title in (name, "tuned")), "tuned value"]),
        table_row(["---", *("---:" for _ in 2 * titles), "---"]),
    ]
    for name in sorted_defenses(default, column):
        values = tuned_text(default, tuned, name, column)
        grids = (default, tuned if values else None)
        texts = [cell_text(grid, name, title, score_text) for title in columns for grid in grids]
        texts += [cell_text(grid, name, column, accuracy_text) for grid in grids]
        rows.append(table_row([f"`{name}`", *texts, values]))
    return rows


def cell_text(grid: Grid | None, name: str, column: str, text: Callable[[Cell], str]) -> str:
    """Return what `text` returns for a cell; empty without a grid or without the cell."""
    cell = grid.cell(name, column) if grid else None
    return text(cell) if cell else ""


def keywords_text(cell: Cell) -> str:
    """Return HS by `refusal_keywords`, and its kappa with the judge of the table."""
    numbers = json.loads(cell["other_judges"] or "{}").get("refusal_keywords")
    if not numbers:
        return ""
    kappa = "undefined" if numbers["kappa"] is None else f"{numbers['kappa']:.2f}"
    return f"{numbers['harmful_score']:.0f}, {kappa}"


def accuracy_text(cell: Cell) -> str:
    """Return FA."""
    return f"{cell['finetune_accuracy']:.1f}"


TABLES: dict[str, Callable[[Grid, Grid | None, str], list[str]]] = {
    "harmful scores": partial(by_ratio, "HS %", score_text),
    "answers": answers,
    "judges": partial(by_ratio, "not refused %, kappa", keywords_text),
    "default and tuned parameters": default_and_tuned,
    "loss and drift": partial(
        by_ratio,
        "alignment loss, drift",
        lambda cell: f"{cell['alignment_loss']:.2f}, {cell['embedding_drift_per_token']:.1f}",
    ),
}


def page(text: str, source: Source) -> str:
    """Return a page with its tables replaced."""
    grids = ratio_grids(rank_results([source.results]))
    default, tuned = next(iter(tuned_grids(grids)), (grids[0], None))
    for name, table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin in text:
            before, _, rest = text.partition(begin)
            lines = table(default, tuned, source.detailed)
            text = "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{rest.partition(end)[2]}"])
    return text


if __name__ == "__main__":
    for path, source in PAGES.items():
        path.write_text(page(path.read_text(encoding="utf-8"), source), encoding="utf-8")
