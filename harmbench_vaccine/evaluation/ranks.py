"""Ranks of defenses with their uncertainty: Holm's correction, bootstrap intervals, and groups of ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from .dispersion import Dispersion, SeedShares

DRAWS = 2000
"""Bootstrap draws of a rank interval."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several hypotheses, adjusted so that the family has the error rate of one (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, and no adjusted value is smaller than that of a smaller one.
    NaN stays NaN and does not count.
    """
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - position) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def rank_intervals(
    cells: Sequence[SeedShares], dispersion: Dispersion, confidence: float = 0.95
) -> list[tuple[int, int]]:
    """Return an interval of the rank of each cell; rank 1 has the lowest score.

    Parametric bootstrap: the scores are drawn from their estimated distribution, with a common dispersion
    phi df / chi-squared(df), and ranked again. The draws are the same in every call.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    means = np.array([cell.mean for cell in cells])
    errors = np.sqrt([dispersion.phi * cell.variance / cell.seeds for cell in cells])
    df = dispersion.df
    scales = np.sqrt(df / generator.chisquare(df, (DRAWS, 1))) if df else np.ones((DRAWS, 1))
    draws = means + scales * errors * generator.standard_normal((DRAWS, len(cells)))
    ranks = 1 + draws.argsort(axis=1).argsort(axis=1)
    ends = np.quantile(ranks, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0, method="inverted_cdf")
    return [(int(low), int(high)) for low, high in ends.T]


def tie_groups(cells: Sequence[SeedShares], dispersion: Dispersion, level: float = 0.05) -> list[tuple[int, int]]:
    """Return the ranks that each cell shares with the cells that do not differ significantly from it.

    The cells are taken in the order of their means. A group grows as long as no two of its members differ at the level
    after Holm's correction over all pairs of the table.

    Returns:
        The first and the last rank of the group of each cell, in the order of `cells`.
    """
    pairs = list(combinations(range(len(cells)), 2))
    p_values = holm([dispersion.difference(cells[first], cells[second]).p_value for first, second in pairs])
    different = {pair for pair, p in zip(pairs, p_values, strict=True) if p < level}
    groups: list[list[int]] = []
    for index in sorted(range(len(cells)), key=lambda index: cells[index].mean):
        if groups and not any((min(index, other), max(index, other)) in different for other in groups[-1]):
            groups[-1].append(index)
        else:
            groups.append([index])
    ranks: dict[int, tuple[int, int]] = {}
    for group in groups:
        ranks |= dict.fromkeys(group, (len(ranks) + 1, len(ranks) + len(group)))
    return [ranks[index] for index in range(len(cells))]
