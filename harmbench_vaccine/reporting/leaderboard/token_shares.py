"""Harmful score against harmful token share: the cells of a defense on tasks with different shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .grids import Cell, Grid, harmful_ratio, place_grids
from .ranking import Ranking

_DIGITS = 1
"""Decimals of a share that tables show: two shares that are equal in a table are not different."""


@dataclass(frozen=True)
class TokenSeries:
    """The cells of a defense under one attack, of at least two tasks whose harmful token shares differ."""

    attack: str
    """The attack, or its harmful ratio such as `p = 10%` if it has nothing else."""
    cells: tuple[Cell, ...]
    """One cell for each task with a known share, by ascending share."""

    @property
    def points(self) -> list[tuple[float, float]]:
        """The harmful token share and the harmful score of each cell."""
        return [(cell["harmful_token_share"], cell["harmful_score"]) for cell in self.cells]


def token_grids(rankings: Sequence[Ranking]) -> list[Grid]:
    """Return the grids of `place_grids` that have a series, each with the defenses that have one."""
    grids = []
    for grid in place_grids(rankings):
        if defenses := tuple(name for name in grid.defenses if token_series(grid, name)):
            grids.append(replace(grid, selection=defenses))
    return grids


def token_series(grid: Grid, defense: str) -> list[TokenSeries]:
    """Return the series of a defense, in the order of the attacks.

    Args:
        grid: A grid of `place_grids`.
        defense: The defense.
    """
    by_attack: dict[str, list[Cell]] = {}
    titles: dict[str, str] = {}
    for column, ranking in grid.columns.items():
        cell = grid.cell(defense, column)
        if cell and math.isfinite(cell["harmful_token_share"]):
            by_attack.setdefault(cell["attack"], []).append(cell)
            titles[cell["attack"]] = _title(ranking)
    ordered = {
        attack: tuple(sorted(cells, key=lambda cell: cell["harmful_token_share"]))
        for attack, cells in by_attack.items()
        if len({round(cell["harmful_token_share"], _DIGITS) for cell in cells}) > 1
    }
    return [TokenSeries(titles[attack], cells) for attack, cells in ordered.items()]


def _title(ranking: Ranking) -> str:
    p, rest = harmful_ratio(ranking)
    return ranking.setting["attack"] if p is None or rest else f"p = {100 * p:g}%"
