"""Paired comparisons of two sets of answers to the same questions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from .dispersion import IntervalEstimate
from .statistics import student_quantile, student_tail

if TYPE_CHECKING:
    import numpy as np


def two_way_difference(
    differences: Sequence[Sequence[float]], clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> IntervalEstimate:
    """Return the mean of paired differences, with an interval over seeds and over questions.

    Both vary: a new seed trains a new model, and other questions could have been asked. The variances of the mean over
    seeds and over question clusters are added, and that over both at once is subtracted (Cameron, Gelbach and Miller
    2011), with the factor C / (C - 1) for C clusters of each kind:

        V = max(V_seed + V_question - V_both, V_seed, V_question, 1 / (n + 2)^2)

    The last term is the variance of n questions without any difference, after adding one half of a question to each
    side (Agresti and Min 2005), so that no interval has the width 0.

    Args:
        differences: One row per seed, one column per question: the value of one defense minus that of the other.
        clusters: The cluster of each question, for example its text or its harm category; by default, each question
            is its own.
        confidence: Of the interval, from Student's t with one degree of freedom less than seeds.

    Returns:
        The mean difference with its interval, cut at -1 and 1. The interval of one seed is over questions only.

    Raises:
        ValueError: There is no question, or one seed with one cluster.
    """
    import numpy as np

    values = np.asarray(differences, dtype=float)
    seeds, questions = values.shape
    names = list(range(questions)) if clusters is None else list(clusters)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if questions == 0 or (seeds == 1 and len(numbers) == 1):
        raise ValueError("an interval needs two seeds or two clusters of questions")
    residuals = values - values.mean()
    cells = np.zeros((seeds, len(numbers)))
    for column, name in enumerate(names):
        cells[:, numbers[name]] += residuals[:, column]
    by_seed, by_question, by_both = (
        _clustered(sums, values.size) for sums in (cells.sum(axis=1), cells.sum(axis=0), cells.ravel())
    )
    variance = max(by_seed + by_question - by_both, by_seed, by_question, 1 / (questions + 2) ** 2)
    df = (seeds if seeds > 1 else len(numbers)) - 1
    value, error = float(values.mean()), math.sqrt(variance)
    half = student_quantile((1 + confidence) / 2, df) * error
    p_value = 2 * student_tail(abs(value) / error, df)
    return IntervalEstimate(value, max(-1.0, value - half), min(1.0, value + half), p_value, seeds == 1)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test; 1 if no question differs.

    It compares two answers to each question, for example of two judges or of two engines. Of one seed of two defenses,
    it does not extend to a newly trained model.
    """
    from scipy.special import bdtr

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    tail = float(bdtr(min(only_first, only_second), only_first + only_second, 0.5))  # both tails are equal
    return min(1.0, 2 * tail)


def _clustered(sums: np.ndarray, total: int) -> float:
    """Return the variance of a mean from the sums of its residuals by cluster; 0 for one cluster."""
    count = len(sums)
    return float((sums**2).sum()) / total**2 * count / (count - 1) if count > 1 else 0.0
