"""Curves against the harmful ratio p: HS and FA with their intervals, and alignment loss and embedding drift.

Few defenses share a panel, with their names at the ends of the lines. With more, each defense has a small panel that
also has the baseline in gray, and, if parameters were tuned, the scores with default parameters in pale colors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harmbench_vaccine.reporting.leaderboard.grids import Grid, cell_mark

from .style import (
    ACCURACY,
    BASELINE_STYLE,
    GRAY,
    HARM,
    LINE_STYLES,
    MUTED,
    PALE,
    Label,
    new_figure,
    panel_grid,
    short_name,
    styled,
    write_labels,
    write_legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

_MOST_LINES = len(LINE_STYLES)
"""Lines that a reader can distinguish in one panel, without the baseline."""
_LEAST_RANGE = 10.0
"""Points of a score that an axis shows at least."""
_COLUMNS = 6
_TITLE = 20
"""Characters of the title of a small panel: more would cover its neighbor's."""
_LOG_RANGE = 30.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""


@dataclass(frozen=True)
class _Quantity:
    """A column of a leaderboard that is drawn against p."""

    column: str
    label: str
    """Title of its panel and name in the legend; empty: not in the legend."""
    color: str
    has_interval: bool = False
    """Whether the columns `*_low` and `*_high` are its interval; otherwise the single seeds are drawn."""
    is_percent: bool = False


_SCORES = (
    _Quantity("harmful_score", "harmful score HS, % (lower is better)", HARM, True, True),
    _Quantity("finetune_accuracy", "finetune accuracy FA, % (higher is better)", ACCURACY, True, True),
)
_LOSS_AND_DRIFT = (
    _Quantity("alignment_loss", "alignment loss of the final model", HARM),
    _Quantity("embedding_drift", "harmful embedding drift", ACCURACY),
)

_SCORES_BEFORE = (
    replace(_SCORES[0], label="with default parameters", color=PALE[HARM]),
    replace(_SCORES[1], label="", color=PALE[ACCURACY]),
)
_Layer = tuple[Grid, Sequence[_Quantity]]
"""Quantities of a grid that small panels draw; a later layer is in front."""


@styled
def plot_scores(grid: Grid, note: str = "") -> Figure:
    """Draw HS and FA against p, with bands for the 95% intervals.

    Args:
        grid: A grid of `ratio_grids`.
        note: A text for the title, such as "12 of 90 runs".
    """
    return _plot(grid, _SCORES, "HS and FA against the harmful ratio p; bands: 95% intervals", note)


@styled
def plot_loss_and_drift(grid: Grid, note: str = "") -> Figure:
    """Draw the alignment loss and the embedding drift of the final model against p, with a dot for each seed.

    The arguments are those of `plot_scores`. This is figure (b) of the project page of Vaccine.
    """
    return _plot(
        grid, _LOSS_AND_DRIFT, "Alignment loss and embedding drift against the harmful ratio p; dots: seeds", note
    )


@styled
def plot_tuned(default: Grid, tuned: Grid, note: str = "") -> Figure:
    """Draw HS against p with the default and with the tuned parameters.

    Few defenses have a panel for each, with the same line in both. With more, each defense has a small panel with HS
    and FA.

    Args:
        default: The grid before the tuning.
        tuned: The grid with the tuned parameters, of `tuned_grids`.
        note: A text for the title, such as "12 of 90 runs".
    """
    details = tuned.title, note, _marks_legend(default, tuned)
    if _is_crowded(tuned):
        title = "HS and FA against the harmful ratio p with tuned parameters; bands: 95% intervals"
        return _panel_figure(title, details, [[(default, _SCORES_BEFORE), (tuned, _SCORES)]])
    title = "HS against the harmful ratio p with default and with tuned parameters; bands: 95% intervals"
    figure = new_figure(8.8, 3.8, title, *details)
    panels = figure.subplots(1, 2, sharey=True)
    styles = _line_styles(default)
    for axes, grid, kind in zip(panels, (default, tuned), ("default", "tuned"), strict=True):
        _overlay(axes, grid, _SCORES[0], styles)
        axes.set_title(f"{kind} parameters: HS, % (lower is better)", loc="left", color=MUTED)
    return figure


def _plot(grid: Grid, quantities: Sequence[_Quantity], title: str, note: str) -> Figure:
    details = grid.title, note, _marks_legend(grid)
    if _is_crowded(grid):
        together = all(quantity.is_percent for quantity in quantities)
        blocks = [quantities] if together else [[quantity] for quantity in quantities]
        return _panel_figure(title, details, [[(grid, block)] for block in blocks])
    figure = new_figure(8.8, 3.8, title, *details)
    for axes, quantity in zip(figure.subplots(1, len(quantities)), quantities, strict=True):
        _overlay(axes, grid, quantity, _line_styles(grid))
    return figure


def _is_crowded(grid: Grid) -> bool:
    return len([name for name in grid.defenses if name != grid.baseline]) > _MOST_LINES


def _marks_legend(*grids: Grid) -> str:
    marks = {cell_mark(cell) for grid in grids for defense in grid.defenses for cell in grid.cells(defense) if cell}
    signs = {
        "collapsed": "\N{MULTIPLICATION SIGN} collapsed",
        "self-destruct": "+ self-destruct",
        "hollow": "\N{WHITE CIRCLE} hollow",
    }
    names = [sign for mark, sign in signs.items() if mark in marks]
    return f"{', '.join(names)}: not ranked" if names else ""


# ---------------------------------------------------------------------------------------------------------------------
# One panel for all defenses


def _line_styles(grid: Grid) -> dict[str, tuple[str, str]]:
    """Return the color and the marker of every defense but the baseline."""
    return dict(zip((name for name in grid.defenses if name != grid.baseline), LINE_STYLES, strict=False))


def _overlay(axes: Axes, grid: Grid, quantity: _Quantity, styles: Mapping[str, tuple[str, str]]) -> None:
    for name in grid.defenses:
        _draw_line(axes, grid, name, quantity, *styles.get(name, BASELINE_STYLE), dashed=name == grid.baseline)
    _set_limits(axes, grid, quantity)
    _set_ratio_axis(axes, grid, least=0.05)
    axes.set_title(quantity.label, loc="left", color=MUTED)
    labels = []
    for name in grid.defenses:
        ends = [(p, y) for p, y in zip(grid.ratios, _values(grid, name, quantity), strict=True) if _is_drawn(axes, y)]
        if ends:
            labels.append(Label(*ends[-1], short_name(name), styles.get(name, BASELINE_STYLE)[0]))
    write_labels(axes, labels, height=2.6)


# ---------------------------------------------------------------------------------------------------------------------
# A small panel for each defense


def _panel_figure(title: str, details: Sequence[str], blocks: Sequence[Sequence[_Layer]]) -> Figure:
    """Draw blocks of small panels, one panel for each defense of the front layer."""
    rows = math.ceil(len(blocks[0][-1][0].defenses) / _COLUMNS)
    figure = new_figure(9.2, 0.9 + len(blocks) * (0.3 + 1.25 * rows), title, *details)
    parts = figure.subfigures(len(blocks), 1, squeeze=False)[:, 0]
    for part, layers in zip(parts, blocks, strict=True):
        _small_panels(part, layers)
    figure.supxlabel("harmful ratio p, %", x=0.99, ha="right", fontsize=8, color=MUTED)
    write_legend(figure, _legend(blocks[0]))
    return figure


def _small_panels(part: SubFigure, layers: Sequence[_Layer]) -> None:
    grid, quantities = layers[-1]
    panels = panel_grid(part, len(grid.defenses), _COLUMNS, sharex=True, sharey=True)
    if len(quantities) == 1:
        part.suptitle(quantities[0].label, x=0.01, ha="left", fontsize=9, color=MUTED)
    for axes, name in zip(panels, grid.defenses, strict=True):
        for quantity in quantities:
            if grid.baseline and name != grid.baseline:
                axes.plot(grid.ratios, _values(grid, grid.baseline, quantity), color=GRAY, linewidth=1, linestyle="--")
        for layer, drawn in layers:
            for quantity, marker in zip(drawn, "os", strict=False):
                _draw_line(axes, layer, name, quantity, quantity.color, marker)
        axes.set_title(short_name(name, _TITLE), fontsize=8, loc="left", pad=3)
        axes.tick_params(labelsize=7)
    for axes in panels:
        if quantities[0].is_percent:
            axes.set_ylim(-3, 103)
        else:
            _set_limits(axes, grid, quantities[0])
        _set_ratio_axis(axes, grid, least=0.2, label="")


def _legend(layers: Sequence[_Layer]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    grid, quantities = layers[-1]
    lines = [
        Line2D([], [], color=quantity.color, marker=marker, label=quantity.label)
        for _, drawn in reversed(layers)
        for quantity, marker in zip(drawn, "os", strict=False)
        if quantity.label and len(quantities) > 1
    ]
    if grid.baseline:
        lines.append(Line2D([], [], color=GRAY, linewidth=1, linestyle="--", label=short_name(grid.baseline)))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _draw_line(
    axes: Axes, grid: Grid, defense: str, quantity: _Quantity, color: str, marker: str, *, dashed: bool = False
) -> None:
    """Draw the means of a defense with a band or with its seeds, and mark its cells that are not ranked."""
    values = _values(grid, defense, quantity)
    style = (0, (4, 2)) if dashed else "-"
    axes.plot(grid.ratios, values, color=color, linestyle=style, zorder=3)
    if quantity.has_interval:
        low, high = (_values(grid, defense, quantity, end) for end in ("_low", "_high"))
        axes.fill_between(grid.ratios, low, high, color=color, alpha=0.13, linewidth=0, zorder=2)
    else:
        seeds = [
            (p, run[quantity.column])
            for p, column in zip(grid.ratios, grid.columns, strict=True)
            for run in grid.runs_of(defense, column)
        ]
        xs, ys = [p for p, _ in seeds], [value for _, value in seeds]
        axes.scatter(xs, ys, s=6, color=color, alpha=0.55, linewidths=0, zorder=2)
    marks = [cell_mark(cell) if cell else "" for cell in grid.cells(defense)]
    for mark in dict.fromkeys(marks):
        axes.plot(
            [p for p, other in zip(grid.ratios, marks, strict=True) if other == mark],
            [value for value, other in zip(values, marks, strict=True) if other == mark],
            linestyle="none",
            marker={"collapsed": "x", "self-destruct": "+"}.get(mark, marker),
            color=color,
            markerfacecolor="white" if mark == "hollow" else color,
            markeredgecolor=color if mark else "white",
            markeredgewidth=1 if mark else 0.6,
            zorder=4,
        )


def _values(grid: Grid, defense: str, quantity: _Quantity, end: str = "") -> list[float]:
    return [cell[f"{quantity.column}{end}"] if cell else math.nan for cell in grid.cells(defense)]


def _set_limits(axes: Axes, grid: Grid, quantity: _Quantity) -> None:
    """Set the limits of the vertical axis by the cells without a collapsed run; the others may be outside."""
    cells = [cell for name in grid.defenses for cell in grid.cells(name) if cell]
    column = f"{quantity.column}_low" if quantity.has_interval else quantity.column
    values = [cell[column] for cell in cells if not cell["collapsed_cells"]] or [cell[column] for cell in cells]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return
    low, high = min(values), max(values)
    if quantity.is_percent:
        bottom = 10 * (min(low, 100 - _LEAST_RANGE) // 10) if low > _LEAST_RANGE else 0.0
        axes.set_ylim(bottom - 0.03 * (100 - bottom), 100 + 0.03 * (100 - bottom))
    elif low > 0 and high / low > _LOG_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, position: "")
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        axes.set_ylim(0, 1.06 * high or 1.0)


def _is_drawn(axes: Axes, y: float) -> bool:
    low, high = axes.get_ylim()
    return low <= y <= high


def _set_ratio_axis(axes: Axes, grid: Grid, least: float, label: str = "harmful ratio p, %") -> None:
    """Mark the ratios on the horizontal axis; ticks have at least a share `least` of its length between them."""
    first, last = grid.ratios[0], grid.ratios[-1]
    ticks = [first]
    for p in grid.ratios[1:]:
        if p - ticks[-1] >= least * (last - first):
            ticks.append(p)
    axes.set_xticks(ticks, [f"{100 * p:g}" for p in ticks])
    axes.set_xlabel(label)
    axes.grid(axis="x", visible=False)
