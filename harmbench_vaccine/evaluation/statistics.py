"""Proportions with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentage(scores: Sequence[float]) -> float:
    """Return 100 * sum / N of scores from 0 to 1, with N the number of all of them; NaN for none."""
    return 100 * sum(scores) / len(scores) if scores else math.nan


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, in percent (Wilson 1927); 0 to 100 if n is 0."""
    if not n:
        return 0.0, 100.0
    from scipy import stats  # takes a second to import, and a plan needs no interval

    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return Cohen's kappa of two judges over the same items: (p_o - p_e) / (1 - p_e) (Cohen 1960).

    p_o is the share of items on which they agree, p_e the share expected of two independent judges who flag as often.

    Returns:
        NaN for no items, and where p_e is 1: both judges then give one verdict on everything.
    """
    n = len(first)
    if not n:
        return math.nan
    # Both times n squared, so that they are integers.
    observed = sum(a == b for a, b in zip(first, second, strict=True)) * n
    expected = sum(first) * sum(second) + (n - sum(first)) * (n - sum(second))
    return math.nan if expected == n * n else (observed - expected) / (n * n - expected)


def score_interval(scores: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval of the mean of scores from 0 to 1, in percent.

    Wilson's interval where every score is 0 or 1, else Student's t, cut at 0 and 100; 0 to 100 for a single score. The
    standard error is at least 1 / (n + 2), as in `paired.two_way_difference`, so that equal scores do not have an
    interval of width 0.
    """
    if all(score in (0, 1) for score in scores):
        return wilson(round(sum(scores)), len(scores), confidence)
    mean, half_width = mean_interval(scores, confidence, 1 / (len(scores) + 2))
    if math.isnan(half_width):
        return 0.0, 100.0
    return 100 * max(0.0, mean - half_width), 100 * min(1.0, mean + half_width)


def mean_interval(values: Sequence[float], confidence: float = 0.95, least_error: float = 0.0) -> tuple[float, float]:
    """Return the mean and the half width of its t-interval, with at least this standard error; NaN for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy import stats

    error = max(float(stats.sem(values)), least_error)
    return mean, float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
