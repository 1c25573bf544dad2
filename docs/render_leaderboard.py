"""Write the tables of README.md and docs/leaderboard.md from the results of all defenses on the testbed.

python docs/render_leaderboard.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harmbench_vaccine.reporting.leaderboard.grids import Cell, Grid, cell_mark, ratio_grids
from harmbench_vaccine.reporting.leaderboard.ranking import rank_results
from harmbench_vaccine.reporting.leaderboard.tuned import tuned_changes, tuned_grids

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "leaderboards" / "testbed.csv"
PAGES = ROOT / "README.md", ROOT / "docs" / "leaderboard.md"
BEGIN, END = "<!-- Written by docs/render_leaderboard.py: {} -->", "<!-- end: {} -->"
MARKS = {"": "", "collapsed": "†", "hollow": "‡"}
LEVEL = 0.05
BASELINES = "none", "sft"
DETAILED = "p = 10%"
"""The column whose other scores are shown."""


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


def defense_rows(default: Grid, tuned: Grid | None) -> Iterator[tuple[str, Grid, str]]:
    """Yield the label, the grid and the name of each defense, and again where the tuning changed its parameters.

    The baselines come first. The others are sorted by HS at one ratio; those without a rank come last.
    """

    def place(name: str) -> tuple[bool, bool, float]:
        cell = default.cell(name, DETAILED)
        return (name not in BASELINES, not cell or cell_mark(cell) != "", cell["harmful_score"] if cell else math.inf)

    for name in sorted(default.defenses, key=place):
        yield f"`{name}`", default, name
        before, after = (grid.cell(name, DETAILED) if grid else None for grid in (default, tuned))
        if tuned and before and after and (changes := tuned_changes(before, after)):
            values = ", ".join(f"{key} = {value:g}" for key, value in changes.items())
            yield f"`{name}`, tuned ({values})", tuned, name


def harmful_scores(default: Grid, tuned: Grid | None) -> list[str]:
    """Return the table of the harmful scores for every harmful ratio."""
    return [
        table_row(["HS %", *default.columns]),
        table_row(["---", *("---:" for _ in default.columns)]),
        *(
            table_row([label, *(score_text(cell) if cell else "" for cell in grid.cells(name))])
            for label, grid, name in defense_rows(default, tuned)
        ),
    ]


def answers(default: Grid, tuned: Grid | None) -> list[str]:
    """Return the table of what the answers to harmful questions are, and of the accuracy, at one ratio."""
    columns: dict[str, Callable[[Cell], str]] = {
        "HS %": lambda cell: f"{cell['harmful_score']:.1f}{MARKS[cell_mark(cell)]}",
        "refused %": lambda cell: f"{cell['refusal_rate']:.1f}",
        "neither %": lambda cell: f"{cell['neither']:.1f}",
        "task echo %": lambda cell: f"{cell['task_echo']:.1f}",
        "FA %": lambda cell: f"{cell['finetune_accuracy']:.1f}",
        "HS - HS of `sft`": difference_text,
    }
    rows = [(label, grid.cell(name, DETAILED)) for label, grid, name in defense_rows(default, tuned)]
    return [
        table_row([f"at {DETAILED}", *columns]),
        table_row(["---", *("---:" for _ in columns)]),
        *(table_row([label, *(text(cell) for text in columns.values())]) for label, cell in rows if cell),
    ]


def page(text: str) -> str:
    """Return a page with its tables replaced."""
    grids = ratio_grids(rank_results([RESULTS]))
    default, tuned = next(iter(tuned_grids(grids)), (grids[0], None))
    for name, table in (("harmful scores", harmful_scores), ("answers", answers)):
        begin, end = BEGIN.format(name), END.format(name)
        if begin in text:
            before, _, rest = text.partition(begin)
            text = "\n".join([f"{before}{begin}", "", *table(default, tuned), "", f"{end}{rest.partition(end)[2]}"])
    return text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
