"""The figure of the page that shows HS against the harmful token share: the positions of its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

from .grids import Cell, Grid, cell_mark
from .ranking import Ranking
from .token_shares import TokenSeries, token_grids, token_series

MOST_PANELS = 6
"""Panels of one figure of the page; `figures/token-share` has all of them."""


class PanelArea(NamedTuple):
    """The size of a panel and the edges of the area of its points, in pixels."""

    width: int = 260
    height: int = 190
    left: int = 30
    right: int = 252
    top: int = 8
    bottom: int = 152


AREA = PanelArea()
_TICKS, _STEPS = 4, (1, 2, 5, 10, 15, 20, 25)
"""Number of ticks after 0 of the harmful token share, and the distances between two of them, in points."""
_SHAPES = (
    "m-4-4h8v8h-8z",
    "m0-5l5 9h-10z",
    "m0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
    "m0 5l5-9h-10z",
    "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "m-5 0l9-5v10z",
)
"""Outline of the marker of each task, as an SVG path from its center; further tasks repeat them."""
_SERIES = ("alignment", "user", "after", "several", "baseline")
"""Class of the style with the color of each attack; further attacks repeat them."""


@dataclass(frozen=True)
class TokenPoints:
    """The cells of a defense under one attack, as attributes of SVG elements."""

    color: str
    """Class of the color."""
    title: str
    """The attack, and the harmful token share and the HS on each task."""
    bars: str
    """Path of the intervals of HS."""
    markers: dict[str, str]
    """Mark of cells (empty for ranked ones) -> path of their markers."""


@dataclass(frozen=True)
class TokenFigure:
    """The panels of one protocol, model and judge."""

    title: str
    attacks: dict[str, str]
    """Attack -> class of its color."""
    tasks: dict[str, str]
    """Task -> its marker."""
    shares: dict[int, float]
    """Tick of the harmful token share -> its place."""
    scores: dict[int, float]
    """Tick of HS -> its place."""
    panels: dict[str, list[TokenPoints]]
    """Defense -> its points, by attack."""
    left_out: int
    """Defenses beyond `MOST_PANELS`."""


def token_figures(rankings: Sequence[Ranking]) -> list[TokenFigure]:
    """Return one figure for each protocol, model and judge that has tasks with different shares under one attack."""
    return [_figure(grid) for grid in token_grids(rankings)]


def _figure(grid: Grid) -> TokenFigure:
    panels = {name: token_series(grid, name) for name in grid.defenses[:MOST_PANELS]}
    every = [series for panel in panels.values() for series in panel]
    greatest = max(share for series in every for share, _ in series.points)
    step = next(step for step in _STEPS if _TICKS * step >= greatest)
    attacks = dict(zip(dict.fromkeys(series.attack for series in every), cycle(_SERIES), strict=False))
    cells = sorted((cell for series in every for cell in series.cells), key=lambda cell: cell["harmful_token_share"])
    tasks = dict(zip(dict.fromkeys(cell["task"] for cell in cells), cycle(_SHAPES), strict=False))
    limit = _TICKS * step
    return TokenFigure(
        grid.title,
        attacks,
        tasks,
        {tick: _x(tick, limit) for tick in range(0, limit + 1, step)},
        {score: _y(score) for score in range(0, 101, 25)},
        {name: [_points(series, attacks, tasks, limit) for series in panel] for name, panel in panels.items()},
        len(grid.defenses) - len(panels),
    )


def _points(series: TokenSeries, attacks: Mapping[str, str], tasks: Mapping[str, str], limit: int) -> TokenPoints:
    places = [(_x(share, limit), _y(score)) for share, score in series.points]
    markers: dict[str, str] = {}
    bars = ""
    for (x, y), cell in zip(places, series.cells, strict=True):
        bars += f"M{x:g} {_y(cell['harmful_score_low']):g}V{_y(cell['harmful_score_high']):g}"
        mark = cell_mark(cell)
        markers[mark] = f"{markers.get(mark, '')}M{x:g} {y:g}{tasks[cell['task']]}"
    title = f"{series.attack}: {'; '.join(map(_cell_text, series.cells))}"
    return TokenPoints(attacks[series.attack], title, bars, markers)


def _cell_text(cell: Cell) -> str:
    return f"{cell['task']} {cell['harmful_token_share']:.1f}%, HS {cell['harmful_score']:.1f}"


def _x(share: float, limit: int) -> float:
    return round(AREA.left + share / limit * (AREA.right - AREA.left), 1)


def _y(score: float) -> float:
    return round(AREA.bottom - score / 100 * (AREA.bottom - AREA.top), 1)
