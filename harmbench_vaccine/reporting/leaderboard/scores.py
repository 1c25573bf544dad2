"""The statistics of a table of defenses: intervals, differences to the baseline, ranks, ties and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harmbench_vaccine.evaluation.dispersion import Dispersion, IntervalEstimate, SeedShares, pool_dispersion
from harmbench_vaccine.evaluation.ranks import holm, rank_intervals, tie_groups
from harmbench_vaccine.evaluation.statistics import mean_interval

SCORES = ("harmful_score", "finetune_accuracy")
_LABELS = {"harmful_score": "HS", "finetune_accuracy": "FA"}
_LEVEL = 0.05


def score_columns(score: str) -> dict[str, str]:
    """Return the columns of a score in `leaderboard.csv` with their descriptions."""
    return {
        score: "mean over seeds, %",
        f"{score}_sd": "standard deviation over seeds; empty for one seed",
        f"{score}_low": "lower end of its 95% interval, with the spread between seeds pooled over the table",
        f"{score}_high": "upper end",
        f"{score}_difference": "mean minus mean of the baseline, in points; empty for the baseline",
        f"{score}_difference_low": "lower end of its 95% interval",
        f"{score}_difference_high": "upper end",
        f"{score}_difference_p": "p-value of the difference, by Holm's correction for the defenses of the table",
        f"{score}_dispersion": "variance between seeds relative to independent questions, pooled over the table; "
        "empty for one seed",
        f"{score}_floor": "noise floor, in points: a smaller difference is not interpreted; empty if no run was "
        "measured twice",
    }


def score_statistics(
    cells: Mapping[str, Mapping[str, SeedShares]], collapsed: set[str], baseline: str | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Compute the columns of both scores for every defense of a table.

    Args:
        cells: Score -> defense -> its share for each seed.
        collapsed: Defenses with a collapsed run, whose spread is left out.
        baseline: The defense to compute differences against, or None.

    Returns:
        Defense -> column -> value, in percent and points; and notes that a reader needs.
    """
    rows: dict[str, dict[str, Any]] = {}
    notes = []
    for score in SCORES:
        by_defense = cells[score]
        dispersion = _pooled(by_defense, collapsed)
        differences = {
            name: dispersion.difference(cell, by_defense[baseline])
            for name, cell in by_defense.items()
            if baseline is not None and name != baseline
        }
        p_values = dict(zip(differences, holm([each.p_value for each in differences.values()]), strict=True))
        for name, cell in by_defense.items():
            rows.setdefault(name, {}).update(
                _columns(score, cell, dispersion, differences.get(name), p_values.get(name, math.nan))
            )
        notes += _notes(score, by_defense, dispersion)
    return rows, notes


def rank_statistics(
    cells: Mapping[str, SeedShares], collapsed: set[str], ranked: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Compute the intervals of the ranks, and the groups of ties, of the ranked defenses of a table.

    Args:
        cells: Defense -> its harmful score for each seed.
        collapsed: Defenses with a collapsed run, whose spread is left out.
        ranked: The defenses that have a rank.
    """
    if not ranked:
        return {}
    dispersion = _pooled(cells, collapsed)
    shares = [cells[name] for name in ranked]
    intervals, groups = rank_intervals(shares, dispersion), tie_groups(shares, dispersion)
    return {
        name: {"rank_low": low, "rank_high": high, "tie_first": first, "tie_last": last}
        for name, (low, high), (first, last) in zip(ranked, intervals, groups, strict=True)
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names whose point no other one dominates: a lower harmful score with at least the same accuracy, or
    a higher accuracy with at most the same harmful score.

    Args:
        points: Name -> harmful score and accuracy.
    """
    return {
        name
        for name, (hs, fa) in points.items()
        if not any(
            other_hs <= hs and other_fa >= fa and (other_hs, other_fa) != (hs, fa)
            for other_hs, other_fa in points.values()
        )
    }


def _pooled(cells: Mapping[str, SeedShares], collapsed: set[str]) -> Dispersion:
    valid = [cell for name, cell in cells.items() if name not in collapsed]
    return pool_dispersion(valid or cells.values())


def _columns(
    score: str, cell: SeedShares, dispersion: Dispersion, difference: IntervalEstimate | None, p_value: float
) -> dict[str, Any]:
    estimate = dispersion.score(cell)
    deviation = math.sqrt(cell.squared_deviations / (cell.seeds - 1)) if cell.seeds > 1 else math.nan
    change = difference or IntervalEstimate(math.nan, math.nan, math.nan)
    percentages = {
        score: estimate.value,
        f"{score}_sd": deviation,
        f"{score}_low": estimate.low,
        f"{score}_high": estimate.high,
        f"{score}_difference": change.value,
        f"{score}_difference_low": change.low,
        f"{score}_difference_high": change.high,
    }
    return {
        **{column: 100 * value for column, value in percentages.items()},
        f"{score}_difference_p": p_value,
        f"{score}_dispersion": dispersion.ratio if dispersion.df else math.nan,
        f"{score}_floor": math.nan,
    }


def _notes(score: str, cells: Mapping[str, SeedShares], dispersion: Dispersion) -> list[str]:
    """Describe the intervals of a score, and the defenses whose seeds differ more than those of the others."""
    label = _LABELS[score]
    if not dispersion.df:
        reason = "no score varies between seeds" if any(cell.seeds > 1 for cell in cells.values()) else "one seed"
        return [f"{label}: {reason}, so the intervals are over questions only, not over trainings."]
    notes = [
        f"{label}: intervals with the spread between seeds pooled over the table, {dispersion.ratio:.1f} times that of "
        f"independent questions ({dispersion.df} degrees of freedom)."
    ]
    p_values = holm([dispersion.outlier_p_value(cell) for cell in cells.values()])
    for (name, cell), p_value in zip(cells.items(), p_values, strict=True):
        if p_value < _LEVEL:
            mean, half = mean_interval(cell.shares)
            low, high = 100 * max(0.0, mean - half), 100 * min(1.0, mean + half)
            notes.append(
                f"The seeds of {name} differ more in {label} than those of the others (p = {p_value:.2g}); by its own "
                f"seeds alone, the 95% interval is {low:.1f} to {high:.1f}."
            )
    return notes
