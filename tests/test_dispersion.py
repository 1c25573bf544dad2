"""Intervals over seeds, ranks and paired tests: compared with other libraries, published data and simulations."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harmbench_vaccine.evaluation.dispersion import Dispersion, SeedShares, pool_dispersion
from harmbench_vaccine.evaluation.paired import mcnemar, two_way_difference
from harmbench_vaccine.evaluation.ranks import holm, rank_intervals, tie_groups

TESTBED = Path(__file__).parents[1] / "leaderboards" / "testbed.csv"


def read_testbed(attack: str) -> dict[str, SeedShares]:
    """Read the harmful scores of the testbed's default cells that did not collapse."""
    scores, collapsed = defaultdict(list), set()
    with TESTBED.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["protocol"], row["attack"]) == ("testbed", attack):
                scores[row["defense"]].append(float(row["harmful_score"]) / 100)
                if row["collapsed"] == "True":
                    collapsed.add(row["defense"])
    return {name: SeedShares(tuple(shares), 250) for name, shares in scores.items() if name not in collapsed}


shares = st.lists(st.integers(0, 100).map(lambda hits: hits / 100), min_size=1, max_size=5)
cells = shares.map(lambda values: SeedShares(tuple(values), 100))

# ---------------------------------------------------------------------------------------------------------------------
# Pooled dispersion


def test_dispersion_by_hand() -> None:
    """Two defenses, two seeds: .4, .6 about .5 and .1, .3 about .2; a third without variation is left out."""
    dispersion = pool_dispersion(
        [SeedShares((0.4, 0.6), 50), SeedShares((0.1, 0.3), 50), SeedShares((0.0, 0.0), 50), SeedShares((0.5,), 50)]
    )
    assert dispersion.phi == pytest.approx((0.02 / 0.25 + 0.02 / 0.16) / 2)
    assert dispersion.df == 2
    assert dispersion.ratio == pytest.approx(50 * dispersion.phi)


def test_dispersion_is_at_least_binomial() -> None:
    assert pool_dispersion([SeedShares((0.5, 0.5, 0.5), 40)]).phi == 1 / 40


def test_testbed_table() -> None:
    """The figures of the testbed's table at p = 0.1, calculated independently of this package."""
    table = read_testbed("ratio=0.1")
    dispersion = pool_dispersion(table.values())
    assert (dispersion.df, dispersion.ratio) == (24, pytest.approx(4.6, abs=0.05))
    expected = {
        "vlguard": (3.7, 8.7),
        "realign": (-7.7, 7.3),
        "resta": (-15.3, 6.0),
        "booster": (84.1, 6.0),
    }
    for name, (value, half_width) in expected.items():
        estimate = dispersion.difference(table[name], table["sft"])
        assert 100 * estimate.value == pytest.approx(value, abs=0.05)
        assert 50 * (estimate.high - estimate.low) == pytest.approx(half_width, abs=0.05)


@given(st.lists(cells, min_size=1, max_size=6))
def test_no_interval_is_impossible_or_without_width(table: list[SeedShares]) -> None:
    dispersion = pool_dispersion(table)
    for cell in table:
        score, difference = dispersion.score(cell), dispersion.difference(cell, table[0])
        assert 0 <= score.low < score.high <= 1
        assert score.low <= cell.mean + 1e-9
        assert cell.mean - 1e-9 <= score.high
        assert -1 <= difference.low < difference.high <= 1
        assert 0 <= difference.p_value <= 1


def test_one_seed_is_an_interval_over_questions() -> None:
    table = [SeedShares((0.3,), 100), SeedShares((0.5,), 100)]
    dispersion = pool_dispersion(table)
    score, difference = dispersion.score(table[0]), dispersion.difference(*table)
    assert score.over_questions_only
    assert difference.over_questions_only
    assert dispersion.df == 0
    # Wilson's interval of 30 of 100: center (30 + 1.9207) / 103.8415, half width .08870
    assert (score.low, score.high) == (pytest.approx(0.2189, abs=1e-4), pytest.approx(0.3958, abs=1e-4))
    # z sqrt(32/104 * 72/104 / 100 + 52/104 * 52/104 / 100)
    assert difference.high - difference.low == pytest.approx(2 * 1.959964 * math.sqrt(0.0021302 + 0.0025), abs=1e-4)


def test_outlier_by_hand() -> None:
    cell = SeedShares((0.2, 0.8), 100)
    # m = .5, v = .25: (.09 + .09) / (.1 * .25) = 7.2 with one degree of freedom
    assert Dispersion(0.1, 9, 100).outlier_p_value(cell) == pytest.approx(0.00729, abs=1e-5)
    assert math.isnan(Dispersion(0.1, 9, 100).outlier_p_value(SeedShares((0.2,), 100)))


def test_detectable_difference_has_its_power() -> None:
    """Simulate defenses that differ by it: the test finds about 80% of the differences."""
    generator = np.random.default_rng(3)
    n, seeds, others, phi = 250, 3, 8, 4 / 250
    planned = Dispersion(phi, (others + 2) * (seeds - 1), n)
    base = SeedShares((0.4,) * seeds, n)
    effect = planned.detectable_difference(base, SeedShares((0.6,) * seeds, n))
    means = [0.4, 0.4 + effect, *[0.5] * others]
    detections = 0
    for _ in range(400):
        table = [SeedShares(tuple(draw_shares(generator, mean, phi, n, seeds)), n) for mean in means]
        detections += pool_dispersion(table).difference(table[1], table[0]).p_value < 0.05
    assert 0.72 < detections / 400 < 0.88


# ---------------------------------------------------------------------------------------------------------------------
# Coverage


def draw_shares(generator: np.random.Generator, mean: float, phi: float, n: int, seeds: int) -> np.ndarray:
    """Draw shares with expectation `mean` and variance phi mean (1 - mean): beta-binomial hits of n questions."""
    correlation = (phi * n - 1) / (n - 1)  # of two questions of one seed
    if correlation <= 0:
        return generator.binomial(n, mean, seeds) / n
    size = 1 / correlation - 1
    return generator.binomial(n, generator.beta(mean * size, (1 - mean) * size, seeds)) / n


def coverage(seeds: int, ratio: float, defenses: int) -> tuple[float, float]:
    """Return the share of intervals of means and of differences that contain the truth, over 300 simulated tables."""
    generator = np.random.default_rng(defenses * 100 + seeds * 10 + int(ratio))
    n, repetitions = 250, 300
    truth = np.linspace(0.05, 0.95, defenses)
    score_hits = difference_hits = 0
    for _ in range(repetitions):
        table = [SeedShares(tuple(draw_shares(generator, mean, ratio / n, n, seeds)), n) for mean in truth]
        dispersion = pool_dispersion(table)
        scores = [dispersion.score(cell) for cell in table]
        differences = [dispersion.difference(cell, table[0]) for cell in table[1:]]
        score_hits += sum(e.low <= mean <= e.high for e, mean in zip(scores, truth, strict=True))
        difference_hits += sum(
            e.low <= mean - truth[0] <= e.high for e, mean in zip(differences, truth[1:], strict=True)
        )
    return score_hits / (repetitions * defenses), difference_hits / (repetitions * (defenses - 1))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", [2, 3, 10])
@pytest.mark.parametrize("defenses", [6, 20])
def test_coverage_of_the_pooled_interval(seeds: int, ratio: float, defenses: int) -> None:
    scores, differences = coverage(seeds, ratio, defenses)
    assert 0.91 <= scores <= 0.99
    assert 0.91 <= differences <= 0.99


@pytest.mark.parametrize("seeds", [2, 5])
def test_coverage_if_the_seeds_do_not_matter(seeds: int) -> None:
    """The dispersion is at least that of independent questions, so the interval is wider than necessary."""
    assert min(coverage(seeds, 1, 6)) >= 0.94


def test_intervals_over_questions_alone_are_too_narrow() -> None:
    """The interval that ignores the seeds covers less than half of the truths if the seeds matter much."""
    generator = np.random.default_rng(1)
    questions_only = Dispersion(1 / 250, 0, 250)
    hits = 0
    for _ in range(400):
        estimate = questions_only.score(SeedShares(tuple(draw_shares(generator, 0.5, 10 / 250, 250, 2)), 250))
        hits += estimate.low <= 0.5 <= estimate.high
    assert hits / 400 < 0.6


def test_coverage_of_the_two_way_interval() -> None:
    """Five seeds and ten, 100 questions, both with effects of their own."""
    generator = np.random.default_rng(5)
    for seeds in (5, 10):
        hits = 0
        for _ in range(400):
            seed_effects = generator.normal(0, 0.1, (seeds, 1))
            question_effects = generator.normal(0, 0.2, (1, 100))
            noise = generator.normal(0, 0.5, (seeds, 100))
            estimate = two_way_difference((0.1 + seed_effects + question_effects + noise).tolist())
            hits += estimate.low <= 0.1 <= estimate.high
        assert 0.91 <= hits / 400 <= 0.99


# ---------------------------------------------------------------------------------------------------------------------
# Paired comparisons


def test_two_way_variance_equals_that_of_statsmodels() -> None:
    sandwich = pytest.importorskip("statsmodels.stats.sandwich_covariance")
    api = pytest.importorskip("statsmodels.api")
    generator = np.random.default_rng(0)
    seeds, questions = 5, 60
    values = generator.integers(-1, 2, (seeds, questions)) + 0.3 * (generator.normal(size=(seeds, 1)) > 0)
    clusters = generator.integers(0, 20, questions)
    fit = api.OLS((values / 2).ravel(), np.ones(values.size)).fit()
    seed_labels = np.repeat(np.arange(seeds), questions)
    cluster_labels = np.tile(clusters, seeds)
    total, by_seed, by_question = sandwich.cov_cluster_2groups(fit, seed_labels, cluster_labels)
    variance = max(total.item(), by_seed.item(), by_question.item())
    estimate = two_way_difference((values / 2).tolist(), clusters.tolist())
    half_width = float(stats.t.ppf(0.975, seeds - 1)) * math.sqrt(variance)
    assert estimate.value == pytest.approx(float((values / 2).mean()))
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half_width, rel=1e-9)


def test_two_way_without_any_difference_has_a_width() -> None:
    estimate = two_way_difference([[0.0] * 20] * 5)
    assert estimate.low < 0 < estimate.high
    assert estimate.p_value == 1


def test_one_seed_uses_its_questions() -> None:
    estimate = two_way_difference([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    # mean .25, s^2 / n = .2142857 / 8, t(.975; 7) = 2.364624
    assert (estimate.high - estimate.low) / 2 == pytest.approx(2.364624 * math.sqrt(0.2142857 / 8), abs=1e-5)
    assert estimate.over_questions_only
    with pytest.raises(ValueError, match="two seeds or two clusters"):
        two_way_difference([[1.0, 0.0]], ["a", "a"])


def test_mcnemar_by_hand() -> None:
    # 5 questions differ, all in one direction: 2 / 2^5
    assert mcnemar([True] * 8, [True] * 3 + [False] * 5) == pytest.approx(2 / 32)
    assert mcnemar([True, False], [True, False]) == 1
    assert mcnemar([], []) == 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_equals_that_of_statsmodels(pairs: list[tuple[bool, bool]]) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    table = [[sum(pair == (a, b) for pair in pairs) for b in (True, False)] for a in (True, False)]
    expected = tables.mcnemar(table, exact=True).pvalue if table[0][1] + table[1][0] else 1.0
    assert mcnemar([a for a, _ in pairs], [b for _, b in pairs]) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Many defenses


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_equals_that_of_statsmodels(p_values: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    expected = multitest.multipletests(p_values, method="holm")[1] if p_values else []
    assert holm(p_values) == pytest.approx(list(expected))


def test_holm_leaves_out_undefined_values() -> None:
    adjusted = holm([0.01, math.nan, 0.04])
    assert adjusted[0] == 0.02
    assert math.isnan(adjusted[1])
    assert adjusted[2] == 0.04


def test_rank_intervals_of_clear_and_of_equal_cells() -> None:
    dispersion = Dispersion(1 / 250, 20, 250)
    clear = [SeedShares((mean, mean), 250) for mean in (0.9, 0.1, 0.5)]
    assert rank_intervals(clear, dispersion) == [(3, 3), (1, 1), (2, 2)]
    equal = [SeedShares((0.5, 0.5), 250)] * 4
    assert rank_intervals(equal, dispersion) == [(1, 4)] * 4
    assert rank_intervals(equal, dispersion) == rank_intervals(equal, dispersion)


def test_tie_groups_of_the_testbed() -> None:
    table = read_testbed("ratio=0.1")
    dispersion = pool_dispersion(table.values())
    groups = dict(zip(table, tie_groups(list(table.values()), dispersion), strict=True))
    assert groups["resta"] == groups["panacea"] != groups["sft"]
    for name, (first, last) in groups.items():
        members = [other for other, group in groups.items() if group == (first, last)]
        assert len(members) == last - first + 1
        assert all(table[name].mean <= table[other].mean for other, group in groups.items() if group[0] > last)


def test_one_group_if_nothing_differs() -> None:
    table = [SeedShares((mean, mean + 0.02), 50) for mean in (0.4, 0.42, 0.44)]
    assert tie_groups(table, pool_dispersion(table)) == [(1, 3)] * 3
