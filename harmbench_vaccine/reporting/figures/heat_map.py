"""Heat map of the harmful score: a row is a defense, a column an attack."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harmbench_vaccine.reporting.leaderboard.grids import Cell, Grid, cell_mark

from .style import GRID, INK, new_figure, short_name, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIGNS = {"": "", "collapsed": "\N{DAGGER}", "hollow": "\N{DOUBLE DAGGER}", "self-destruct": "\N{SECTION SIGN}"}
_DARK = 70.0
"""Harmful score above which a cell is dark, so that its number is white."""
_LEVEL_TITLES = 4
"""Largest number of columns whose titles are level."""
_CHARACTER = 0.08
"""Width of a character of a title, in inches."""
_FEWEST_ROWS = 3
"""Fewer rows get the height of so many."""


@styled
def plot_heat_map(grid: Grid, note: str = "") -> Figure:
    """Draw the HS of every defense under every attack; the defenses with the lowest average come first.

    Args:
        grid: A grid of `place_grids`.
        note: A text for the title, such as "12 of 90 runs".
    """
    names = sorted(grid.defenses, key=lambda name: _order(grid, name))
    marks = {cell_mark(cell) for name in names for cell in grid.cells(name) if cell}
    legend = [f"{sign} {mark}" for mark, sign in _SIGNS.items() if mark and mark in marks]
    details = grid.title, note, f"{', '.join(legend)}: not ranked" if legend else ""
    width = max(5.5, 2.6 + 0.95 * len(grid.columns))
    titles = list(map(short_name, grid.columns))
    rotated = len(titles) > _LEVEL_TITLES
    titles_height = 0.5 * _CHARACTER * max(map(len, titles)) if rotated else 0.0  # at 30 degrees
    rows_height = 0.27 * max(len(names), _FEWEST_ROWS)
    figure = new_figure(width, 1.5 + rows_height + titles_height, "Harmful score by defense and attack, %", *details)
    axes = figure.subplots()
    values = [[_value(cell) for cell in grid.cells(name)] for name in names]
    axes.set_facecolor(GRID)
    image = axes.imshow(values, cmap="YlOrBr", vmin=0, vmax=100, aspect="auto")
    axes.set_yticks(range(len(names)), list(map(short_name, names)))
    axes.set_xticks(range(len(titles)), titles)
    axes.xaxis.tick_top()
    if rotated:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="left", rotation_mode="anchor")
    for row, name in enumerate(names):
        for column, cell in enumerate(grid.cells(name)):
            color = "white" if _value(cell) > _DARK else INK
            axes.text(column, row, _cell_text(cell), ha="center", va="center", fontsize=7.5, color=color)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 6 / len(names)), aspect=12, label="HS, %")
    bar.outline.set_visible(False)
    return figure


def _order(grid: Grid, name: str) -> tuple[bool, float]:
    """Return a sort key: whether a cell is marked, then the average HS over the cells that exist."""
    cells = [cell for cell in grid.cells(name) if cell]
    return any(map(cell_mark, cells)), sum(cell["harmful_score"] for cell in cells) / len(cells)


def _value(cell: Cell | None) -> float:
    """Return the HS that is shown as a color; NaN, which is gray, without a run and for cells that are not ranked."""
    return cell["harmful_score"] if cell and not cell_mark(cell) else math.nan


def _cell_text(cell: Cell | None) -> str:
    return f"{cell['harmful_score']:.1f}{_SIGNS[cell_mark(cell)]}" if cell else "no run"
