"""Intervals of scores over few seeds: the spread between seeds is pooled over all defenses of a table.

The unit of replication is the seed, because each seed trains a new model. Two to five seeds do not determine the
spread of one defense, but the defenses of one table (same protocol, model, task and attack) share it in proportion to
the binomial variance. This is the quasi-binomial model with one dispersion (McCullagh and Nelder, Generalized Linear
Models, 2nd ed., section 4.5):

    Var(h) = phi m (1 - m)        h: share of one seed, m: its expectation, phi = 1 / n for independent questions
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .statistics import student_quantile, student_tail, wilson

_EXTREME = 0.005
"""Shares closer to 0 or 1 do not contribute to the dispersion: their variance is too small to divide by."""


@dataclass(frozen=True)
class SeedShares:
    """A score of one defense in one table, from 0 to 1, for each of its seeds."""

    shares: tuple[float, ...]
    n: int
    """Number of questions that each seed answers."""

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.shares)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.shares) / self.seeds

    @property
    def variance(self) -> float:
        """m (1 - m) with the mean m after two added hits and two added misses (Agresti and Coull 1998); never 0."""
        total = self.seeds * self.n
        m = (total * self.mean + 2) / (total + 4)
        return m * (1 - m)

    @property
    def squared_deviations(self) -> float:
        """Sum over the seeds of the squared distance to the mean."""
        return math.fsum((share - self.mean) ** 2 for share in self.shares)


@dataclass(frozen=True)
class IntervalEstimate:
    """A score, or a difference of two scores, from 0 to 1, with its 95% interval."""

    value: float
    low: float
    high: float
    p_value: float = math.nan
    """Of the hypothesis that a difference is 0; NaN for a score."""
    over_questions_only: bool = False
    """True if the interval does not include the variation between seeds, because no defense has two."""


@dataclass(frozen=True)
class Dispersion:
    """The variance of a share between seeds, relative to m (1 - m)."""

    phi: float
    df: int
    """Degrees of freedom; 0 if no defense has two seeds, so that phi is that of independent questions."""
    n: int
    """Number of questions that each seed answers."""

    @property
    def ratio(self) -> float:
        """phi n, the variance between seeds relative to that of independent questions: 1 is binomial."""
        return self.phi * self.n

    def score(self, cell: SeedShares, confidence: float = 0.95) -> IntervalEstimate:
        """Return the mean of a cell with its interval, cut at 0 and 1.

        Without degrees of freedom the interval is Wilson's over the questions alone.
        """
        if not self.df:
            total = cell.seeds * cell.n
            low, high = (end / 100 for end in wilson(round(cell.mean * total), total, confidence))
            return IntervalEstimate(cell.mean, low, high, over_questions_only=True)
        half = self._quantile(confidence) * self._standard_error(cell)
        return IntervalEstimate(cell.mean, max(0.0, cell.mean - half), min(1.0, cell.mean + half))

    def difference(self, cell: SeedShares, baseline: SeedShares, confidence: float = 0.95) -> IntervalEstimate:
        """Return the mean of a cell minus that of the baseline, with its interval, cut at -1 and 1."""
        value = cell.mean - baseline.mean
        error = math.hypot(self._standard_error(cell), self._standard_error(baseline))
        half = self._quantile(confidence) * error
        p_value = 2 * student_tail(abs(value) / error, self.df or math.inf)
        return IntervalEstimate(value, max(-1.0, value - half), min(1.0, value + half), p_value, not self.df)

    def outlier_p_value(self, cell: SeedShares) -> float:
        """Return the p-value of the hypothesis that a cell varies between its seeds as the others do.

        sum_s (h_s - mean)^2 / (phi v) is compared with the chi-squared distribution of S - 1 degrees of freedom.

        Returns:
            NaN for one seed.
        """
        if cell.seeds < 2 or not self.df:
            return math.nan
        from scipy.special import chdtrc

        return float(chdtrc(cell.seeds - 1, cell.squared_deviations / (self.phi * cell.variance)))

    def detectable_difference(self, cell: SeedShares, baseline: SeedShares, power: float = 0.8) -> float:
        """Return the smallest difference that a two-sided test at 5% detects with the given power, 0 to 1.

        (t_.975 + t_power) sqrt(phi (v / S + v_b / S_b))
        """
        error = math.hypot(self._standard_error(cell), self._standard_error(baseline))
        return (self._quantile(0.95) + self._quantile(2 * power - 1)) * error

    def _standard_error(self, cell: SeedShares) -> float:
        return math.sqrt(self.phi * cell.variance / cell.seeds)

    def _quantile(self, confidence: float) -> float:
        """Return the two-sided quantile of Student's t, or of the normal distribution without degrees of freedom."""
        return student_quantile((1 + confidence) / 2, self.df or math.inf)


def pool_dispersion(cells: Iterable[SeedShares]) -> Dispersion:
    """Estimate the dispersion of a table from the cells that vary.

    phi = max(1 / n, sum_d sum_s (h_ds - mean_d)^2 / (mean_d (1 - mean_d)) / df) with df = sum_d (S_d - 1), over the
    cells d with a mean between 0.005 and 0.995.

    Args:
        cells: The cells of one table, without collapsed ones.

    Raises:
        ValueError: There are no cells.
    """
    cells = list(cells)
    if not cells:
        raise ValueError("a dispersion needs at least one cell")
    n = min(cell.n for cell in cells)
    varied = [cell for cell in cells if cell.seeds > 1 and _EXTREME < cell.mean < 1 - _EXTREME]
    df = sum(cell.seeds - 1 for cell in varied)
    pearson = math.fsum(cell.squared_deviations / (cell.mean * (1 - cell.mean)) for cell in varied)
    return Dispersion(max(1 / n, pearson / df if df else 0.0), df, n)
