"""Shares with their doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def percentage(hits: Sequence[float]) -> float:
    """100 * hits / N of hits, or of scores from 0 to 1, with N the number of all of them; NaN for none."""
    return 100 * sum(hits) / len(hits) if hits else math.nan


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in percent (Wilson 1927)."""
    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def cohen_kappa(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Cohen's kappa of two judges over the same items (Cohen 1960): (p_o - p_e) / (1 - p_e), with p_o the share of
    items on which they agree and p_e the share expected of two judges who flag as often, independently of each other.

    NaN for no items, and where p_e is 1: both judges say the same of everything, so nothing tells agreement from habit.
    """
    n = len(one)
    if not n:
        return math.nan
    agreeing = sum(a == b for a, b in zip(one, other, strict=True)) * n
    expected = sum(one) * sum(other) + (n - sum(one)) * (n - sum(other))  # both times n squared: whole numbers
    return math.nan if expected == n * n else (agreeing - expected) / (n * n - expected)


def score_interval(scores: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval of the mean of scores from 0 to 1, in percent: Wilson's where every score is 0 or 1, else Student's
    t, cut at 0 and 100 (one score tells nothing: 0 to 100)."""
    if all(score in (0, 1) for score in scores):
        return wilson(round(sum(scores)), len(scores), confidence)
    mean, half = mean_interval(scores, confidence)
    if math.isnan(half):
        return 0.0, 100.0
    return 100 * max(0.0, mean - half), 100 * min(1.0, mean + half)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean and the half width of its t-interval; NaN half width for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * float(stats.sem(values))
    return mean, half
