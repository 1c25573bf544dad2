"""Embedding drift of each attention block: one panel per defense, one line per attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.evaluation.records import load_result
from harmbench_vaccine.evaluation.run_overview import RESULT
from harmbench_vaccine.reporting.leaderboard.grids import Grid

from .style import GRAY, MUTED, new_figure, panel_grid, short_name, styled, write_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_COLUMNS = 5
_MOST_MARKERS = 12
"""Blocks of a model up to which each one has a marker."""

LayerDrifts = Mapping[tuple[str, str], Sequence[float]]
"""Defense and column of a grid -> drift of each attention block, mean over seeds."""


def read_layer_drifts(grid: Grid, runs: Path) -> dict[tuple[str, str], list[float]]:
    """Read the drift of each attention block from the folders of runs.

    Args:
        grid: A grid of `task_grids`.
        runs: The folder of the run folders.

    Returns:
        The drifts of the cells of which every run has a readable folder.
    """
    folders = {path.parent.name: path.parent for path in runs.glob(f"*/{RESULT}")}
    drifts = {}
    for defense in grid.defenses:
        for column in grid.columns:
            names = [run["run"] for run in grid.runs_of(defense, column)]
            with suppress(HbvError, KeyError):
                layers = [load_result(folders[name]).embedding_drift_per_layer for name in names]
                if mean := _mean(layers):
                    drifts[defense, column] = mean
    return drifts


def _mean(layers: Sequence[Sequence[float | None]]) -> list[float]:
    """Return the mean over seeds for each block; empty if a value is missing or the numbers of blocks differ."""
    if len({len(blocks) for blocks in layers}) != 1 or any(value is None for blocks in layers for value in blocks):
        return []
    return [sum(value or 0.0 for value in values) / len(values) for values in zip(*layers, strict=True)]


@styled
def plot_layers(grid: Grid, drifts: LayerDrifts, note: str = "") -> Figure:
    """Draw the drift of each attention block for every defense, with the baseline in gray under the last attack.

    Args:
        grid: A grid of `task_grids`.
        drifts: The drifts, from `read_layer_drifts`; at least one cell has some.
        note: A text for the title, such as "12 of 90 runs".
    """
    from matplotlib.ticker import MaxNLocator

    names = [name for name in grid.defenses if any(name == defense for defense, _ in drifts)]
    columns = [column for column in grid.columns if any(column == other for _, other in drifts)]
    rows, width = math.ceil(len(names) / _COLUMNS), min(_COLUMNS, len(names))
    title = "Embedding drift of each attention block, from the aligned to the final model"
    figure = new_figure(max(7.0, 2.1 * width), 1.2 + 1.9 * rows, title, grid.title, note)
    panels = panel_grid(figure, len(names), width, sharex=True, sharey=True)
    colors = _shades(columns)
    last = columns[-1]
    for axes, name in zip(panels, names, strict=True):
        blocks = drifts.get((grid.baseline or "", last))
        if blocks and name != grid.baseline:
            axes.plot(range(1, len(blocks) + 1), blocks, color=GRAY, linewidth=1, linestyle="--")
        for column, color in colors.items():
            if blocks := drifts.get((name, column)):
                marker = "o" if len(blocks) <= _MOST_MARKERS else ""
                axes.plot(range(1, len(blocks) + 1), blocks, color=color, marker=marker, markersize=3)
        axes.set_title(short_name(name), fontsize=8.5, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylim(bottom=0)  # of all panels, after the last one was drawn
    write_legend(figure, _legend(grid, colors))
    figure.supxlabel("attention block, from the input to the output", x=0.99, ha="right", fontsize=8, color=MUTED)
    figure.supylabel("L2 norm over the alignment rows", fontsize=8, color=MUTED)
    return figure


def _shades(columns: Sequence[str]) -> dict[str, str]:
    """Return one color per attack, darker for later ones."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps["viridis"](np.linspace(0.05, 0.7, len(columns)))
    return dict(zip(columns, map(to_hex, shades[::-1]), strict=True))


def _legend(grid: Grid, colors: Mapping[str, str]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color, marker="o", label=short_name(name)) for name, color in colors.items()]
    if grid.baseline:
        label = f"{short_name(grid.baseline)}, {short_name(list(colors)[-1])}"
        lines.append(Line2D([], [], color=GRAY, linewidth=1, linestyle="--", label=label))
    return lines
