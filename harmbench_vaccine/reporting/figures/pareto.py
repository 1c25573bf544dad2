"""Harmful score against finetune accuracy, with error bars and the Pareto front: one panel per attack."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harmbench_vaccine.reporting.leaderboard.grids import Cell, Grid, cell_mark

from .style import (
    ACCURACY,
    GRAY,
    INK,
    MUTED,
    Label,
    label_gap,
    new_figure,
    panel_grid,
    short_name,
    styled,
    write_labels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2
_PANEL = (4.4, 3.6)
"""Width and least height of a panel in inches."""
_MARGIN = 0.9
"""Height of the title and of the numbers of a panel."""
_FONT = 7
_LEAST_RANGE = 4.0
"""Points of FA that the horizontal axis shows at least."""


@styled
def plot_pareto(grid: Grid, note: str = "") -> Figure:
    """Draw the defenses by HS and FA with 95% intervals; the line connects those that no other one dominates.

    Args:
        grid: A grid of `task_grids`.
        note: A text for the title, such as "12 of 90 runs".
    """
    columns = min(_COLUMNS, len(grid.columns))
    rows = math.ceil(len(grid.columns) / columns)
    title = "HS against FA; blue: Pareto front; bars: 95% intervals; the best is at the bottom right"
    names = max(len(ranking.rows) for ranking in grid.columns.values())
    height = max(_PANEL[1], _MARGIN + label_gap(_FONT) * names)
    figure = new_figure(max(7.0, columns * _PANEL[0]), 0.7 + rows * height, title, grid.title, note)
    panels = panel_grid(figure, len(grid.columns), columns)
    for axes, (name, ranking) in zip(panels, grid.columns.items(), strict=True):
        _draw_panel(axes, [row for row in ranking.rows if row["trained"]] or ranking.rows, height - _MARGIN)
        axes.set_title(short_name(name), loc="left")
    return figure


def _draw_panel(axes: Axes, cells: list[Cell], height: float) -> None:
    working = [cell for cell in cells if not cell["collapsed_cells"]]
    least = min((cell["finetune_accuracy_low"] for cell in working or cells), default=0.0)
    axes.set_xlim(min(least - 0.5, 100 - _LEAST_RANGE), 100.4)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("FA, % (higher is better)")
    axes.set_ylabel("HS, % (lower is better)")
    _draw_front(axes, [cell for cell in cells if cell["pareto"]])
    labels, outside = [], []
    for cell in cells:
        x, y = cell["finetune_accuracy"], cell["harmful_score"]
        name, mark = short_name(cell["defense"]), cell_mark(cell)
        if x < axes.get_xlim()[0]:
            outside.append(f"{name} ({mark}, FA {x:.0f}, HS {y:.0f})")
            continue
        _draw_point(axes, cell)
        labels.append(Label(x, y, f"{name} ({mark})" if mark else name, _color(cell)))
    write_labels(axes, labels, height, _FONT)
    if outside:
        text = "\n".join(["outside:", *outside])
        axes.text(0.03, 0.88, text, transform=axes.transAxes, va="top", fontsize=6.5, color=MUTED)


def _draw_front(axes: Axes, cells: list[Cell]) -> None:
    """Connect the cells of the Pareto front by steps."""
    points = sorted((cell["finetune_accuracy"], cell["harmful_score"]) for cell in cells)
    if points:
        axes.plot(*zip(*points, strict=True), color=ACCURACY, alpha=0.45, linewidth=3, drawstyle="steps-post", zorder=1)


def _draw_point(axes: Axes, cell: Cell) -> None:
    errors = [
        [[cell[score] - cell[f"{score}_low"]], [cell[f"{score}_high"] - cell[score]]]
        for score in ("finetune_accuracy", "harmful_score")
    ]
    marker = {"collapsed": "x", "self-destruct": "+"}.get(cell_mark(cell), "o")
    axes.errorbar(
        cell["finetune_accuracy"],
        cell["harmful_score"],
        xerr=errors[0],
        yerr=errors[1],
        fmt=marker,
        color=_color(cell),
        markerfacecolor="white" if cell_mark(cell) == "hollow" else _color(cell),
        markersize=4.5,
        elinewidth=0.8,
        zorder=3,
    )


def _color(cell: Cell) -> str:
    """Return blue on the Pareto front, gray for cells that are not ranked."""
    return GRAY if cell_mark(cell) else ACCURACY if cell["pareto"] else INK
