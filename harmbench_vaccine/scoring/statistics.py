"""Shares with their doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def percentage(hits: Sequence[bool]) -> float:
    """100 * hits / N, with N the number of all of them; NaN for none."""
    return 100 * sum(hits) / len(hits) if hits else math.nan


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in percent (Wilson 1927)."""
    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean and the half width of its t-interval; NaN half width for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * float(stats.sem(values))
    return mean, half
