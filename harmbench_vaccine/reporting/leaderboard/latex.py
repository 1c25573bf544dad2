r"""Write rankings as LaTeX tables in the layout of the papers, with the package booktabs.

A row is a defense; a pair of columns is the HS and the FA under one attack, or on one task; the last pair is their
average. Below every score is its 95% interval, rounded outward to whole points. The costs of the defenses are separate
tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from harmbench_vaccine.core.visible import visible

from .costs import COST_COLUMNS, CostTable, cost_cells
from .grids import Cell, Grid, cell_mark, file_names, paper_grids
from .ranking import Ranking

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after `\\` it would begin an argument
    "]": "{]}",
    "--": "-{}-",
    **{character: rf"\{character}" for character in "&%$#_{}"},
}
_SPECIAL = re.compile("|".join(map(re.escape, sorted(_ESCAPES, key=len, reverse=True))))
_MARKS = {"collapsed": r"$\dagger$", "self-destruct": r"$\S$", "hollow": r"$\ddagger$"}
_SCORES = {"harmful_score": min, "finetune_accuracy": max}
"""The scores of a pair of columns, each with the function that selects the better of two."""
_MOST_PAIRS = 6
"""Pairs of columns that fit on a page; more are divided into several tables."""


def latex_text(text: str) -> str:
    """Return a text as LaTeX that prints it as it is, on one line."""
    line = visible(re.sub(r"\s+", " ", text).strip())
    return _SPECIAL.sub(lambda match: _ESCAPES[match[0]], line)


def rankings_latex(rankings: Sequence[Ranking], note: str = "") -> str:
    r"""Return rankings as LaTeX, to be read by `\input`: one table per place and task, or one for all tasks.

    Args:
        rankings: The rankings.
        note: A sentence for every caption, such as "12 of 90 runs".
    """
    grids = paper_grids(rankings)
    lines = ["% Written by hbv leaderboard. Required in the preamble: \\usepackage{booktabs}"]
    for grid, name in zip(grids, file_names(grids), strict=True):
        label = f"tab:leaderboard{name and f'-{name}'}"
        columns = list(grid.columns)
        parts = [columns[start : start + _MOST_PAIRS] for start in range(0, len(columns), _MOST_PAIRS)]
        for number, part in enumerate(parts, start=1):
            part_label = label if len(parts) == 1 else f"{label}-{number}"
            lines += ["", *_Table(grid, part, number == len(parts)).lines(part_label, note)]
    return "\n".join(lines) + "\n"


def costs_latex(tables: Sequence[CostTable]) -> str:
    r"""Return the costs of defenses as LaTeX, to be read by `\input`: one table for each protocol, model and device."""
    lines = ["% Written by hbv leaderboard. Required in the preamble: \\usepackage{booktabs}"]
    for number, table in enumerate(tables, start=1):
        label = "tab:costs" if len(tables) == 1 else f"tab:costs-{number}"
        legends = [f"{column.title}: {column.legend}." for column in COST_COLUMNS if column.legend]
        caption = latex_text(" ".join([f"{table.title}.", *table.notes, *legends]))
        lines += ["", r"\begin{table*}[t]", r"\centering\small\setlength{\tabcolsep}{4pt}"]
        lines += [rf"\caption{{{caption}}}", rf"\label{{{label}}}"]
        lines += [rf"\begin{{tabular}}{{{''.join('r' if column.right else 'l' for column in COST_COLUMNS)}}}"]
        lines += [r"\toprule", _latex_row([column.title for column in COST_COLUMNS]), r"\midrule"]
        lines += [*(_latex_row(cost_cells(row)) for row in table.rows), r"\bottomrule"]
        lines += [r"\end{tabular}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"


@dataclass(frozen=True)
class _Table:
    """One table: some columns of a grid, and the average over all of them."""

    grid: Grid
    columns: Sequence[str]
    has_average: bool
    """Whether the average over all columns of the grid is the last pair."""

    def lines(self, label: str, note: str) -> Iterator[str]:
        """Yield the lines of the table environment."""
        pairs = [*map(_column_title, self.columns), *(["average"] if self._shows_average else [])]
        environment = "table" if len(pairs) <= 3 else "table*"
        yield rf"\begin{{{environment}}}[t]"
        yield r"\centering\small\setlength{\tabcolsep}{4pt}"
        yield rf"\caption{{{self._caption(note)}}}"
        yield rf"\label{{{label}}}"
        yield rf"\begin{{tabular}}{{l{'rr' * len(pairs)}}}"
        yield r"\toprule"
        yield "".join(rf" & \multicolumn{{2}}{{c}}{{{title}}}" for title in pairs) + r" \\"
        yield " ".join(rf"\cmidrule(lr){{{2 * index + 2}-{2 * index + 3}}}" for index in range(len(pairs)))
        yield "Defense" + " & HS & FA" * len(pairs) + r" \\"
        yield r"\midrule"
        for defense in self.grid.defenses:
            yield from self._rows(defense)
        yield r"\bottomrule"
        yield r"\end{tabular}"
        yield rf"\end{{{environment}}}"

    @property
    def _shows_average(self) -> bool:
        return self.has_average and len(self.grid.columns) > 1

    def _caption(self, note: str) -> str:
        seeds = sorted({cell["seeds"] for cell in self._shown_cells()})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        sentences = [
            f"HS (harmful score, %, lower is better) and FA (finetune accuracy, %, higher is better): {self.grid.title}"
            f"{note and f'; {note}'}.",
            f"Mean over {count} {'seed' if seeds == [1] else 'seeds'}, with 95% intervals below, rounded outward.",
            "Bold: the best of a column. Scores with the same letter do not differ significantly in HS (5%, Holm).",
        ]
        marks = {cell_mark(cell) for cell in self._shown_cells()}
        legends = [rf"{_MARKS[mark]}: {mark} in at least one run, not ranked." for mark in _MARKS if mark in marks]
        if not all(cell["trained"] for cell in self._shown_cells()):
            legends.append("(u): the attack replaces the user stage, so the task is not learned.")
        return " ".join([*map(latex_text, sentences), *legends])

    def _shown_cells(self) -> list[Cell]:
        cells = (self.grid.cell(defense, column) for defense in self.grid.defenses for column in self.columns)
        return [cell for cell in cells if cell]

    def _rows(self, defense: str) -> Iterator[str]:
        """Yield the row of a defense, and the row of its intervals."""
        scores, intervals = [latex_text(defense)], [""]
        for column in self.columns:
            cell = self.grid.cell(defense, column)
            for score in _SCORES:
                scores.append(self._score(cell, column, score) if cell else "--")
                intervals.append(_interval(cell, score) if cell else "")
        if self._shows_average:
            scores += [self._average(defense, score) for score in _SCORES]
            intervals += ["", ""]
        yield " & ".join(scores) + r" \\"
        yield " & ".join(intervals).rstrip() + r" \\[2pt]"

    def _score(self, cell: Cell, column: str, score: str) -> str:
        text = f"{cell[score]:.1f}"
        if text == self._best(column, score) and not cell_mark(cell):
            text = rf"\textbf{{{text}}}"
        if score == "finetune_accuracy":
            return text if cell["trained"] else f"{text} (u)"
        superscript = _MARKS.get(cell_mark(cell)) or self._letter(cell, column)
        return rf"{text}\textsuperscript{{{superscript}}}"

    def _best(self, column: str, score: str) -> str | None:
        """Return the best score of a column as it is printed; marked cells do not count."""
        values = [row[score] for row in self.grid.columns[column].rows if not cell_mark(row)]
        return f"{_SCORES[score](values):.1f}" if values else None

    def _letter(self, cell: Cell, column: str) -> str:
        """Return the letter of the tie group of a ranked cell."""
        firsts = sorted({row["tie_first"] for row in self.grid.columns[column].rows if not cell_mark(row)})
        index = firsts.index(cell["tie_first"])
        return ascii_lowercase[index] if index < len(ascii_lowercase) else str(index + 1)

    def _average(self, defense: str, score: str) -> str:
        value = self.grid.average(defense, score)
        if math.isnan(value):
            return "--"
        marks = {cell_mark(cell) for cell in self.grid.cells(defense) if cell}
        superscript = "".join(sign for mark, sign in _MARKS.items() if mark in marks)
        text = f"{value:.1f}"
        if superscript:
            return rf"{text}\textsuperscript{{{superscript}}}"
        return rf"\textbf{{{text}}}" if text == self._best_average(score) else text

    def _best_average(self, score: str) -> str | None:
        """Return the best average of the defenses that have every cell, none of them marked."""
        averages = [
            self.grid.average(defense, score)
            for defense in self.grid.defenses
            if not any(cell is None or cell_mark(cell) for cell in self.grid.cells(defense))
        ]
        return f"{_SCORES[score](averages):.1f}" if averages else None


def _column_title(column: str) -> str:
    ratio = re.fullmatch(r"ratio=([\d.e+-]+)", column)
    return f"$p = {ratio[1]}$" if ratio else latex_text(column)


def _interval(cell: Cell, score: str) -> str:
    low, high = math.floor(cell[f"{score}_low"]), math.ceil(cell[f"{score}_high"])
    return rf"{{\scriptsize [{low}, {high}]}}"
