"""The claims ledger: every claim names one figure, and its badge follows the stated rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.reporting.leaderboard import claims
from harmbench_vaccine.reporting.leaderboard.claims import Claim, LedgerRow, claimed_figure, claims_ledger, load_claims
from harmbench_vaccine.reporting.leaderboard.ranking import Ranking
from harmbench_vaccine.reporting.published.comparison import ComparedFigure, PublishedComparison
from harmbench_vaccine.reporting.published.matching import matched_figures
from support.cli import hbv

ROOT = Path(__file__).parents[1]
FIGURE = next(figure for figure in matched_figures("vaccine-paper") if figure.score == "harmful_score")


@pytest.mark.parametrize("claim", load_claims(), ids=lambda claim: " ".join(claim.figure.values()))
def test_a_claim_selects_exactly_one_figure(claim: Claim) -> None:
    assert claimed_figure(claim)["metric"] in {"HS", "FA"}


def ledger_row(monkeypatch: pytest.MonkeyPatch, low: float, high: float, **changes: Any) -> LedgerRow:
    """Return the ledger row of a figure whose own protocol measures an interval around the published value."""
    deviations, accepted = changes.pop("deviations", ()), changes.pop("accepted", [])
    claim = Claim(figure=FIGURE.figure, accepted=accepted)
    monkeypatch.setattr(claims, "load_claims", lambda: (claim,))
    bounds = (FIGURE.value + low, FIGURE.value + high)
    row = {
        "protocol": "vaccine-paper",
        "defense": "sft",
        "attack": "ratio=0.1",
        "task": "sst2",
        "harmful_score": sum(bounds) / 2,
        "harmful_score_low": bounds[0],
        "harmful_score_high": bounds[1],
        "collapsed_cells": 0,
        "hollow_cells": 0,
        **changes,
    }
    scores = {"harmful_score": ComparedFigure(row["harmful_score"], *bounds, (FIGURE,))}
    comparison = PublishedComparison({}, (0,), False, scores, deviations)
    (ledger,) = claims_ledger([Ranking({}, "sft", [row], [], [comparison])])
    return ledger


@pytest.mark.parametrize(
    ("low", "high", "changes", "badge"),
    [
        (-3, 5, {}, "reproduced"),
        (0, 4, {}, "reproduced"),
        (1, 4, {}, "differs"),
        (-4, -1, {}, "differs"),
        (-3, 5, {"deviations": ("another judge",)}, "not comparable"),
        (-3, 5, {"deviations": ("another judge",), "accepted": ["another judge"]}, "reproduced"),
        (-3, 5, {"hollow_cells": 1}, "not comparable"),
        (1, 5, {"collapsed_cells": 1}, "not comparable"),
        (float("nan"), float("nan"), {}, "not comparable"),
    ],
)
def test_the_badge_follows_the_rule(
    low: float, high: float, changes: dict[str, Any], badge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ledger_row(monkeypatch, low, high, **changes)
    assert row.badge == badge
    assert row.published == FIGURE.value
    if low == low:
        assert row.difference == pytest.approx(((low + high) / 2, low, high))


def test_without_results_no_claim_is_measured() -> None:
    (rows,) = hbv("published", "--claims", "--json").results
    assert len(rows) == len(load_claims())
    assert {row["badge"] for row in rows} == {"not measured"}
    assert all(row["difference"] is None for row in rows)


def test_a_twin_is_shown_but_never_comparable() -> None:
    table = ROOT / "leaderboards" / "testbed.csv"
    (rows,) = hbv("published", "--claims", "--results", table, "--json").results
    assert {row["badge"] for row in rows} == {"not comparable"}
    assert all(row["measured"] is not None and "another model" in row["deviations"][0] for row in rows)
    text = hbv("published", "--claims", "--results", table, "--markdown").out
    assert text.startswith("| paper | table |")
    assert text.count("not comparable |") == len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--claims", "--check"], "--claims can be combined only with"),
        (["--claims", "--paper", "Vaccine"], "--claims can be combined only with"),
        (["--markdown"], "--markdown needs --claims"),
        (["--results", "a.csv"], "--results needs --claims"),
        (["--claims", "--markdown", "--json"], "--markdown and --json cannot be combined"),
        (["--claims", "--results", "absent.csv"], "does not exist"),
    ],
)
def test_bad_input(options: list[str], message: str) -> None:
    done = hbv("published", *options)
    assert done.code == 2
    assert message in done.sentence
