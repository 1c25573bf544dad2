"""The quality of a judge on labeled pairs, compared with numbers calculated by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from harmbench_vaccine.core.detection import Detection
from harmbench_vaccine.core.types import Verdict
from harmbench_vaccine.data.beavertails import CATEGORIES
from harmbench_vaccine.data.labeled_pairs import LabeledPair
from harmbench_vaccine.evaluation.judge_report import (
    NO_ROWS,
    LabelReport,
    calibration,
    judge_agreement,
    judge_report,
    label_report,
)
from harmbench_vaccine.evaluation.statistics import f1_interval, wilson

ABUSE, DRUGS, THEFT = CATEGORIES[0], CATEGORIES[4], CATEGORIES[5]


def pair(*categories: str) -> LabeledPair:
    return LabeledPair("How?", "So.", frozenset(categories))


def verdict(threshold: float = 0.5, cut: bool = False, **probabilities: float) -> Verdict:
    """Return a verdict of a judge of all categories; `abuse=0.9` sets one."""
    names = {"abuse": ABUSE, "drugs": DRUGS, "theft": THEFT}
    values = dict.fromkeys(CATEGORIES, 0.0) | {names[name]: value for name, value in probabilities.items()}
    flagged = [name for name, value in values.items() if value > threshold]
    return Verdict(bool(flagged), flagged, values, cut)


UNREAD = Verdict(None, [], {}, False)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, recall, F1


@pytest.mark.parametrize(
    ("flags", "labels", "expected"),
    [
        ("1100", "1010", (0.5, 0.5, 0.5)),
        ("1111", "1000", (0.25, 1.0, 0.4)),
        ("1000", "1111", (1.0, 0.25, 0.4)),
        ("0000", "1000", (None, 0.0, 0.0)),
        ("1000", "0000", (0.0, None, 0.0)),
        ("0000", "0000", (None, None, None)),
        ("", "", (None, None, None)),
    ],
)
def test_counts_by_hand(flags: str, labels: str, expected: tuple[float | None, ...]) -> None:
    counts = Detection.count([flag == "1" for flag in flags], [label == "1" for label in labels])
    assert (counts.precision, counts.recall, counts.f1) == pytest.approx(expected)


def test_f1_is_the_harmonic_mean() -> None:
    counts = Detection(hits=6, flagged=8, positives=15)
    assert counts.precision
    assert counts.recall
    assert counts.f1 == pytest.approx(2 / (1 / counts.precision + 1 / counts.recall))


# 6 hits, 8 flagged, 15 positive: J = 6 / 17 = 0.353, Wilson 17.3 to 58.7; F1 = 2 * 17.3 / 117.3 and 2 * 58.7 / 158.7.
def test_interval_of_f1_by_hand() -> None:
    counts = Detection(hits=6, flagged=8, positives=15)
    low, high = wilson(6, 17)
    assert f1_interval(counts) == pytest.approx((100 * 2 * low / (100 + low), 100 * 2 * high / (100 + high)))
    assert f1_interval(counts) == pytest.approx((29.5, 74.0), abs=0.1)
    assert counts.f1 == pytest.approx(12 / 23)


@pytest.mark.parametrize(("counts", "ends"), [((0, 0, 0), (0, 100)), ((0, 5, 5), (0, None)), ((9, 9, 9), (None, 100))])
def test_interval_of_f1_is_inside_0_to_100(counts: tuple[int, int, int], ends: tuple[float | None, ...]) -> None:
    for actual, expected in zip(f1_interval(Detection(*counts)), ends, strict=True):
        assert actual == expected if expected is not None else 0 < actual < 100


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def test_calibration_by_hand() -> None:
    values, labels = [0.05, 0.0, 0.95, 1.0, 0.62], [False, True, True, True, False]
    result = calibration(values, labels)
    assert result.brier == pytest.approx((0.0025 + 1 + 0.0025 + 0 + 0.3844) / 5)
    # bin 0: mean 0.025, half positive; bin 6: 0.62, none; bin 9: mean 0.975, all
    assert result.ece == pytest.approx((2 * abs(0.025 - 0.5) + 0.62 + 2 * 0.025) / 5)
    assert [part.n for part in result.bins] == [2, 0, 0, 0, 0, 0, 1, 0, 0, 2]
    assert (result.bins[0].probability, result.bins[0].positives) == pytest.approx((0.025, 50.0))
    assert (result.bins[1].probability, result.bins[1].positives, result.bins[1].ci) == (None, None, (0.0, 100.0))
    assert result.bins[9].ci == wilson(2, 2)
    assert [part.low for part in result.bins[1:]] == [part.high for part in result.bins[:-1]]


def test_a_calibrated_judge_has_no_error() -> None:
    result = calibration([0.25] * 4 + [0.75] * 4, [True, False, False, False, True, True, True, False])
    assert result.ece == 0
    assert result.brier == pytest.approx(0.1875)


@pytest.mark.parametrize("values", [[0.5], [0.0, 1.0], [0.1] * 5])
def test_interval_of_the_brier_score_has_a_width(values: Sequence[float]) -> None:
    result = calibration(values, [True] * len(values))
    low, high = result.brier_ci
    assert 0 <= low <= result.brier <= high <= 1
    assert high - low > 0.1


def test_rounding_of_another_batch_changes_no_stored_number() -> None:
    values, labels = [0.123, 0.456, 0.789, 0.999], [False, True, True, True]
    assert calibration(values, labels) == calibration([value + 1e-10 for value in values], labels)


def test_a_label_without_probabilities_has_no_calibration() -> None:
    assert label_report([True], [True], None).calibration is None


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def report_of(categories: dict[str, LabelReport | str], name: str) -> LabelReport:
    report = categories[name]
    assert isinstance(report, LabelReport)
    return report


def test_report_of_a_judge_of_categories() -> None:
    pairs = [pair(ABUSE), pair(ABUSE, DRUGS), pair(), pair(), pair(DRUGS)]
    verdicts = [
        verdict(abuse=0.9),  # right
        verdict(abuse=0.8),  # finds one of two categories
        verdict(theft=0.7),  # flags a safe answer
        verdict(drugs=0.4),
        verdict(abuse=0.6, cut=True),  # unsafe, but of another category
    ]
    report = judge_report(pairs, verdicts)
    assert (report.rows, report.unread, report.cut) == (5, 0, 1)
    assert (report.flag.rows, report.flag.flagged, report.flag.hits) == (3, 4, 3)
    assert report.flag.calibration is not None
    assert report.flag.calibration.brier == pytest.approx((0.01 + 0.04 + 0.49 + 0.16 + 0.16) / 5)
    abuse, drugs = report_of(report.categories, ABUSE), report_of(report.categories, DRUGS)
    assert (abuse.rows, abuse.flagged, abuse.hits) == (2, 3, 2)
    assert (drugs.rows, drugs.flagged, drugs.hits) == (2, 0, 0)
    assert (drugs.precision.value, drugs.recall.value) == (None, 0)
    assert drugs.recall.ci == wilson(0, 2)
    assert report.categories[THEFT] == NO_ROWS
    assert list(report.categories) == list(CATEGORIES)


def test_unread_verdicts_are_left_out() -> None:
    report = judge_report([pair(ABUSE), pair(), pair(ABUSE)], [verdict(abuse=0.9), UNREAD, UNREAD])
    assert (report.rows, report.unread, report.flag.rows, report.flag.flagged) == (1, 2, 1, 1)


def test_a_rule_has_only_a_flag() -> None:
    report = judge_report([pair(ABUSE), pair()], [Verdict(True, ["no refusal"], {}, False)] * 2)
    assert (report.flag.precision.value, report.flag.calibration, report.categories) == (50, None, {})


def test_a_judge_with_another_label_has_a_calibrated_flag() -> None:
    verdicts = [Verdict(True, ["unsafe"], {"unsafe": 0.8}, False), Verdict(False, [], {"unsafe": 0.1}, False)]
    report = judge_report([pair(ABUSE), pair()], verdicts)
    assert report.flag.calibration is not None
    assert report.flag.calibration.ece == pytest.approx(0.15)
    assert report.categories == {}


def test_agreement_of_two_judges() -> None:
    first = [verdict(abuse=0.9), verdict(abuse=0.9), verdict(), verdict(), UNREAD]
    second = [verdict(drugs=0.9), verdict(), verdict(), verdict(), verdict()]
    agreement = judge_agreement({"beaver_dam": first, "refusal_keywords": second})
    assert (agreement.n, agreement.both, agreement.neither) == (4, 1, 2)
    assert agreement.only == {"beaver_dam": 1, "refusal_keywords": 0}
    assert agreement.kappa == pytest.approx(0.5)  # observed 3/4, expected 1/2 * 1/4 + 1/2 * 3/4 = 1/2


def test_equal_verdicts_on_everything_have_no_kappa() -> None:
    assert judge_agreement({"a": [verdict()] * 3, "b": [verdict()] * 3}).kappa is None
