"""Harmful score against harmful token share at a fixed harmful ratio: one panel per defense, one marker per task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

from harmbench_vaccine.reporting.leaderboard.grids import Grid, cell_mark
from harmbench_vaccine.reporting.leaderboard.token_shares import TokenSeries, token_series

from .style import LINE_STYLES, MUTED, new_figure, panel_grid, short_name, styled, write_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_COLUMNS = 4
_PANEL = (2.3, 2.1)
"""Width and height of a panel in inches."""


@styled
def plot_token_share(grid: Grid, note: str = "") -> Figure:
    """Draw HS against the harmful token share: a marker is a task, a color an attack, a bar a 95% interval.

    Args:
        grid: A grid of `token_grids`.
        note: A text for the title, such as "12 of 90 runs".
    """
    by_defense = {name: token_series(grid, name) for name in grid.defenses}
    every = [series for panel in by_defense.values() for series in panel]
    tasks = dict.fromkeys(cell["task"] for series in every for cell in series.cells)
    attacks = dict.fromkeys(series.attack for series in every)
    colors = {attack: color for attack, (color, _) in zip(attacks, cycle(LINE_STYLES), strict=False)}
    markers = {task: marker for task, (_, marker) in zip(tasks, cycle(LINE_STYLES), strict=False)}
    columns = min(_COLUMNS, len(by_defense))
    rows = math.ceil(len(by_defense) / columns)
    title = "HS against the harmful token share at a fixed harmful ratio; markers: tasks, bars: 95% intervals"
    marks = {cell_mark(cell) for series in every for cell in series.cells}
    hollow = "white markers: not ranked" if marks - {""} else ""
    figure = new_figure(max(7.0, columns * _PANEL[0]), 1.3 + rows * _PANEL[1], title, grid.title, note, hollow)
    panels = panel_grid(figure, len(by_defense), columns, sharex=True, sharey=True)
    for axes, (name, panel) in zip(panels, by_defense.items(), strict=True):
        for series in panel:
            _draw_points(axes, series, colors[series.attack], markers)
        axes.set_title(short_name(name), loc="left")
    for axes in panels[-columns:]:
        axes.set_xlabel("harmful token share, %")
    panels[0].set_xlim(0, 1.05 * max(share for series in every for share, _ in series.points))
    panels[0].set_ylim(-3, 103)
    write_legend(figure, _legend(colors, markers))
    figure.supylabel("HS, % (lower is better)", fontsize=8, color=MUTED)
    return figure


def _draw_points(axes: Axes, series: TokenSeries, color: str, markers: Mapping[str, str]) -> None:
    for cell in series.cells:
        x, y = cell["harmful_token_share"], cell["harmful_score"]
        axes.errorbar(
            x,
            y,
            yerr=[[max(0.0, y - cell["harmful_score_low"])], [max(0.0, cell["harmful_score_high"] - y)]],
            fmt=markers[cell["task"]],
            color=color,
            markerfacecolor="white" if cell_mark(cell) else color,
            elinewidth=0.8,
            zorder=3,
        )


def _legend(colors: Mapping[str, str], markers: Mapping[str, str]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=color, marker="|", markersize=9, linestyle="none", label=short_name(attack))
        for attack, color in colors.items()
    ]
    keys += [
        Line2D([], [], color=MUTED, marker=marker, linestyle="none", label=short_name(task))
        for task, marker in markers.items()
    ]
    return keys
