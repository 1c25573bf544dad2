"""Proportions with confidence intervals.

`scipy.stats` takes a second to import, and the result of a run needs none of it: Wilson's interval is a closed formula,
and `scipy.special` has the distribution of Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from harmbench_vaccine.core.detection import Detection


def percentage(scores: Sequence[float]) -> float:
    """Return 100 * sum / N of scores from 0 to 1, with N the number of all of them; NaN for none."""
    return 100 * sum(scores) / len(scores) if scores else math.nan


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, in percent; 0 to 100 if n is 0.

    (2 n p + z^2 +- z sqrt(z^2 + 4 n p (1 - p))) / (2 (n + z^2)) with p = hits / n and the normal quantile z (Wilson
    1927).
    """
    if not n:
        return 0.0, 100.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = 2 * hits + z**2
    spread = z * math.sqrt(z**2 + 4 * hits * (n - hits) / n)
    low, high = (100 * (center + sign * spread) / (2 * (n + z**2)) for sign in (-1, 1))
    return low if hits else 0.0, high if hits < n else 100.0


def f1_interval(counts: Detection) -> tuple[float, float]:
    """Return an interval of F1, in percent; 0 to 100 if nothing is flagged and nothing is positive.

    F1 is 2 J / (1 + J), with J the share of hits among all items that are flagged or positive. The ends are those of
    Wilson's interval of J.
    """
    low, high = wilson(counts.hits, counts.flagged + counts.positives - counts.hits)
    return 200 * low / (100 + low), 200 * high / (100 + high)


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
    standard_error = math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) * (len(values) - 1))
    error = max(standard_error, least_error)
    return mean, student_quantile((1 + confidence) / 2, len(values) - 1) * error


def student_quantile(probability: float, df: float) -> float:
    """Return a quantile of Student's t with `df` degrees of freedom; infinite ones give the normal distribution."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(probability) if math.isinf(df) else stdtrit(df, probability))


def student_tail(value: float, df: float) -> float:
    """Return the probability that Student's t with `df` degrees of freedom, also infinite ones, exceeds a value."""
    from scipy.special import ndtr, stdtr

    return float(ndtr(-value) if math.isinf(df) else stdtr(df, -value))
