"""No interval has the width 0 or ends that are impossible: neither where it is computed nor where it is printed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harmbench_vaccine.cli.console import print_view
from harmbench_vaccine.evaluation.dispersion import SeedShares, pool_dispersion
from harmbench_vaccine.evaluation.paired import two_way_difference
from harmbench_vaccine.evaluation.planning import detectable_text
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.result_text import interval_text
from harmbench_vaccine.evaluation.results_csv import result_rows
from harmbench_vaccine.evaluation.run_comparison import RunComparison, compare_values
from harmbench_vaccine.evaluation.statistics import score_interval, wilson
from harmbench_vaccine.reporting.leaderboard.files import write_tables
from harmbench_vaccine.reporting.leaderboard.ranking import rank_rows
from harmbench_vaccine.reporting.leaderboard.views import rankings_view
from harmbench_vaccine.reporting.result_views import results_table
from harmbench_vaccine.reporting.run_comparison_view import run_comparison_view
from harmbench_vaccine.reporting.testbed_report import MeanInterval
from support.results import make_result

SIZES = (1, 2, 8, 250, 20000)
hits = st.sampled_from(SIZES).flatmap(
    lambda n: st.tuples(st.one_of(st.sampled_from([0, n // 2, n]), st.integers(0, n)), st.just(n))
)
"""Hits of a number of questions; 0 of n and n of n are frequent."""


# ---------------------------------------------------------------------------------------------------------------------
# Where intervals are computed


@settings(deadline=None)
@given(hits)
def test_intervals_of_one_run(share: tuple[int, int]) -> None:
    low, high = wilson(*share)
    assert 0 <= low < high <= 100
    assert low - 1e-9 <= 100 * share[0] / share[1] <= high + 1e-9


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)), max_size=30))
def test_intervals_of_item_scores(scores: list[float]) -> None:
    """Also of no item, one item, and equal scores."""
    low, high = score_interval(scores)
    assert 0 <= low < high <= 100
    if scores:
        assert low - 1e-9 <= 100 * sum(scores) / len(scores) <= high + 1e-9


def test_equal_scores_have_an_interval() -> None:
    """The standard error of four equal scores is 1 / 6: t(.975; 3) = 3.182446."""
    assert score_interval([0.5] * 4) == pytest.approx((0, 100))
    # of 98: t(.975; 97) = 1.984723
    assert score_interval([0.5] * 98) == pytest.approx((50 - 1.984723, 50 + 1.984723), abs=1e-4)


@settings(deadline=None)
@given(st.lists(hits, min_size=1, max_size=5))
def test_intervals_over_seeds(seeds: list[tuple[int, int]]) -> None:
    point = MeanInterval.of([(100 * count / n, n) for count, n in seeds])
    assert 0 <= point.low < point.high <= 100
    assert point.low - 1e-9 <= point.mean <= point.high + 1e-9
    cell = SeedShares(tuple(count / n for count, n in seeds), min(n for _, n in seeds))
    other = SeedShares((0.0,) * len(seeds), cell.n)
    for each in (pool_dispersion([cell, other]).difference(cell, other), pool_dispersion([other]).score(other)):
        assert -1 <= each.low < each.high <= 1


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 12), st.data())
def test_paired_intervals(seeds: int, questions: int, data: st.DataObject) -> None:
    values = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=questions, max_size=questions)
    estimate = two_way_difference(data.draw(st.lists(values, min_size=seeds, max_size=seeds)))
    assert -1 <= estimate.low < estimate.high <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Where intervals are printed

NUMBER = r"[+-]?\d+(?:\.\d+)?"
PATTERN = re.compile(rf"\[({NUMBER}), ?({NUMBER})\]|({NUMBER}) to ({NUMBER})")


def printed_intervals(text: str) -> list[tuple[float, float]]:
    """Return the intervals of a text: `[8.5, 16.6]` or `8.5 to 16.6`."""
    return [
        (float(low or first), float(high or last))
        for low, high, first, last in PATTERN.findall(text.replace("\\", "").replace("\n", " "))
    ]


def check_intervals(text: str) -> None:
    intervals = printed_intervals(text)
    assert intervals, text
    for low, high in intervals:
        assert -100 <= low < high <= 100, text
    assert "±" not in text
    assert "nan" not in text.lower()


def rendered(view: Any) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        print_view(view)
    return out.getvalue()


def stored_results(cells: Sequence[tuple[tuple[int, int], tuple[int, int]]], seeds: int, varied: bool) -> list[Result]:
    """Return results of one defense per cell: hits of harmful prompts and of test items, varied by seed or not."""
    results = []
    for number, ((flags, n), (correct, items)) in enumerate(cells):
        name = "sft" if number == 0 else f"defense-{number}"
        for seed in range(seeds):
            flagged = min(n, flags + seed) if varied else flags
            results.append(
                make_result(
                    defense=name,
                    defense_params={name: {}},
                    seed=seed,
                    harmful_score=100 * flagged / n,
                    harmful_score_ci=wilson(flagged, n),
                    harmful_score_hits=flagged,
                    harmful_score_n=n,
                    finetune_accuracy=100 * correct / items,
                    finetune_accuracy_ci=score_interval([1.0] * correct + [0.0] * (items - correct)),
                    finetune_accuracy_hits=correct,
                    finetune_accuracy_n=items,
                )
            )
    return results


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(hits, hits), min_size=1, max_size=3), st.integers(1, 3), st.booleans())
def test_printed_intervals(
    tmp_path: Path, cells: list[tuple[tuple[int, int], tuple[int, int]]], seeds: int, varied: bool
) -> None:
    results = stored_results(cells, seeds, varied)
    check_intervals(rendered(results_table(results)))
    check_intervals(results[0]._repr_html_())
    rankings = rank_rows(result_rows(results))
    check_intervals(rendered(rankings_view(rankings)))
    write_tables(rankings, tmp_path)
    check_intervals((tmp_path / "leaderboard.md").read_text())
    check_intervals((tmp_path / "leaderboard.tex").read_text().replace("--", " to "))
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for score in ("harmful_score", "finetune_accuracy"):
                low, high = (float(row[f"{score}_{end}"]) for end in ("low", "high"))
                assert 0 <= low < high <= 100
                if row["baseline"] != row["defense"]:
                    low, high = (float(row[f"{score}_difference_{end}"]) for end in ("low", "high"))
                    assert -100 <= low < high <= 100


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.01), (99.996, 100.0), (-0.0001, 0.0001), (8.5, 16.6)])
def test_ends_get_the_decimals_that_they_need(low: float, high: float) -> None:
    check_intervals(interval_text(low, high))
    check_intervals(interval_text(low, high, "+"))


def test_more_decimals_only_where_they_are_needed() -> None:
    assert interval_text(8.52, 16.58) == "[8.5, 16.6]"
    assert interval_text(99.96, 100) == "[99.96, 100.00]"
    assert interval_text(-3, 4, "+") == "[-3.0, +4.0]"


@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize("values", [(0, 0), (1, 1), (0, 1)])
def test_printed_comparison(seeds: int, values: tuple[int, int]) -> None:
    first, second = (
        {seed: {(f"q{n}", f"Question {n}?", ""): float(value) for n in range(9)} for seed in range(seeds)}
        for value in values
    )
    difference = compare_values("harmful_score", first, second)
    assert difference is not None
    assert -100 <= difference.low < difference.high <= 100
    comparison = RunComparison("sft", "vaccine", (("a", "b"),), (difference,))
    check_intervals(rendered(run_comparison_view(comparison)))


def test_a_detectable_difference_is_possible() -> None:
    assert (detectable_text(15.34), detectable_text(100.0), detectable_text(197.7)) == ("15.3", "100.0", "over 100")
