"""Comparisons of stored runs and of judges, from answers written by hand: no model is involved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.evaluation.dispersion import SeedShares
from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.evaluation.run_comparison import compare_judges, compare_runs, compare_values
from support.cli import hbv
from support.results import DEFAULTS, SHARES, make_result


def values(flags: Sequence[float]) -> dict[tuple[str, str, str], float]:
    """Return the value of each question."""
    return {(f"q{number}", f"Question {number}?", ""): float(flag) for number, flag in enumerate(flags)}


def store_run(
    folder: Path, flags: Sequence[bool | None], *, strict: Sequence[bool] | None = None, **fields: Any
) -> Path:
    """Store a run whose answers to harmful questions have these verdicts; every third answer is a refusal."""
    rows = [
        {
            "when": when,
            "set": "harmful",
            "id": f"harmful:{number}",
            "instruction": f"How to do thing {number}?",
            "input": "",
            "target": "",
            "answer": "I cannot help with that." if number % 3 == 0 else "Take the thing.",
            "flagged": flag,
            "verdicts": {
                name: {"flagged": value, "categories": [], "cut": False, "unparsed": value is None}
                for name, value in {"beaver_dam": flag, **({"strict": strict[number]} if strict else {})}.items()
            },
        }
        for when in ("before", "after")
        for number, flag in enumerate(flags)
    ]
    share = {"harmful_score": 50.0, "ci": [0, 100], "hits": 1, "n": 2, "unparsed": 0}
    score = {**share, "before": share, "sets": {}, "cut": 0, "categories": {}}
    names = ["beaver_dam", *(["strict"] if strict else [])]
    shares = {"validity": {**DEFAULTS["validity"], "shares": dict.fromkeys(("before", "after"), SHARES)}}
    known = [flag for flag in flags if flag is not None]
    hs = 100 * sum(known) / len(known)
    result = make_result(**{"harmful_score": hs, "scores": dict.fromkeys(names, score), **shares, **fields})
    run = folder / result.run
    run.mkdir(parents=True)
    write_run(run, result, rows)
    return run


def vaccine(seed: int = 0) -> dict[str, Any]:
    return {"defense": "vaccine", "defense_params": {"vaccine": {}}, "seed": seed, "run": f"vaccine-{seed}"}


def sft(seed: int = 0) -> dict[str, Any]:
    return {"seed": seed, "run": f"sft-{seed}"}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_one_seed_is_mcnemar() -> None:
    first, second = [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]
    difference = compare_values("harmful_score", {0: values(first)}, {0: values(second)})
    assert difference is not None
    assert (difference.method, difference.difference) == ("mcnemar", pytest.approx(-50))
    assert difference.p_value == pytest.approx(stats.binomtest(1, 6).pvalue)
    assert [(flip.number, flip.first, flip.second) for flip in difference.flips][-2:] == [(5, 1, 0), (7, 0, 1)]
    assert difference.low < -50 < difference.high


def test_repeated_questions_are_clusters() -> None:
    """Two questions asked four times each: the interval has one degree of freedom, and McNemar does not apply."""
    flags = {(f"q{number}", f"Question {number % 2}?", ""): float(number % 2) for number in range(8)}
    difference = compare_values("harmful_score", {0: dict.fromkeys(flags, 0.0)}, {0: flags})
    assert difference is not None
    assert difference.method == "questions"
    assert (difference.low, difference.high) == (-100, 100)


def test_three_seeds_use_the_spread_of_the_table() -> None:
    """With a table whose seeds differ much, the interval is wider than with the two sides alone."""
    first = {seed: values([1] * (50 + seed) + [0] * (50 - seed)) for seed in range(3)}
    second = {seed: values([1] * (30 + seed) + [0] * (70 - seed)) for seed in range(3)}
    alone = compare_values("harmful_score", first, second)
    pooled = compare_values("harmful_score", first, second, [SeedShares((0.2, 0.5, 0.8), 100)] * 4)
    assert alone is not None
    assert pooled is not None
    assert alone.method == pooled.method == "pooled"
    assert alone.difference == pooled.difference == pytest.approx(-20)
    assert pooled.high - pooled.low > 2 * (alone.high - alone.low)


def test_five_seeds_are_two_way() -> None:
    first = {seed: values([1, 1, 0, 0, 1, 0, 1, 1]) for seed in range(5)}
    second = {seed: values([0, 1, 0, seed % 2, 0, 0, 1, 1]) for seed in range(5)}
    difference = compare_values("harmful_score", first, second)
    assert difference is not None
    assert (difference.method, difference.seeds, difference.questions) == ("two_way", 5, 8)
    assert difference.difference == pytest.approx(100 * (2 - 10) / 40)


def test_unread_verdicts_are_left_out_of_both(tmp_path: Path) -> None:
    first = store_run(tmp_path, [True, None, True, False], **sft())
    second = store_run(tmp_path, [False, True, True, None], **vaccine())
    harmful = compare_runs(first, second, tmp_path).scores[0]
    assert (harmful.questions, harmful.first, harmful.second) == (2, 100, 50)
    assert [flip.number for flip in harmful.flips] == [1]


def test_all_shared_seeds_are_compared(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        store_run(tmp_path, [True, True, False, False], **sft(seed))
    for seed in (1, 2, 3):
        store_run(tmp_path, [True, False, False, False], **vaccine(seed))
    comparison = compare_runs(tmp_path / "sft-0", tmp_path / "vaccine-3", tmp_path)
    assert comparison.runs == (("sft-1", "vaccine-1"), ("sft-2", "vaccine-2"))
    harmful = comparison.scores[0]
    assert (harmful.method, harmful.seeds, harmful.difference) == ("pooled", 2, pytest.approx(-25))


def test_two_judges_of_one_run(tmp_path: Path) -> None:
    """One verdict is unread; of the other three, the second judge flags two more."""
    run = store_run(tmp_path, [True, False, False, None], strict=[True, True, True, True], **sft())
    (harmful,) = compare_judges(run, "beaver_dam", "strict").scores
    assert (harmful.method, harmful.questions, harmful.p_value) == ("mcnemar", 3, pytest.approx(0.5))
    assert [flip.number for flip in harmful.flips] == [2, 3]
    with pytest.raises(BadInput, match="Did you mean 'strict'"):
        compare_judges(run, "beaver_dam", "strikt")


@pytest.mark.parametrize("change", [{"protocol_hash": "bb"}, {"model": "large"}, {"scorer": "strict"}])
def test_incomparable_runs_are_refused(change: dict[str, str], tmp_path: Path) -> None:
    first = store_run(tmp_path, [True, False], **sft())
    second = store_run(tmp_path, [True, False], **vaccine(), **change)
    with pytest.raises(BadInput, match="can be compared"):
        compare_runs(first, second, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Command


def test_terminal_and_json(tmp_path: Path) -> None:
    home = tmp_path / "home"
    store_run(home / "runs", [True, True, True, False], **sft())
    store_run(home / "runs", [False, False, False, False], **vaccine())
    shown = hbv("compare", "sft-0", "vaccine-0", home=home, COLUMNS="80")
    assert shown.code == 0
    assert "-75.0 [" in shown.out
    assert "HS flips, seed 0: 1, 2, 3." in shown.out
    assert "does not extend to a new training" in " ".join(shown.out.split())
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    printed = json.loads(hbv("compare", "sft-0", "vaccine-0", "--json", home=home).out)
    assert printed["scores"][0]["p_value"] == pytest.approx(0.25)
    assert printed["scores"][0]["flips"][0]["question"] == "How to do thing 0?"


def test_bad_input(tmp_path: Path) -> None:
    home = tmp_path / "home"
    store_run(home / "runs", [True, True, True, False], **sft())
    before = sorted(home.rglob("*"))
    for args, message in {
        ("sft-0",): "1 runs and 0 scorers cannot be compared; allowed: two runs, or one run with --scorer given twice",
        ("sft-0", "sft-0"): "Both runs are sft-0",
        ("sft-0", "sft-1"): "Did you mean 'sft-0'?",
        ("sft-0", "--scorer", "beaver_dam"): "1 runs and 1 scorers",
        ("sft-0", "--scorer", "beaver_dam", "--scorer", "beaver_dam"): "Both scorers are beaver_dam",
        ("sft-0", "--scorer", "beaver_dam", "--scorer", "beaver_dan"): "Did you mean 'beaver_dam'?",
    }.items():
        done = hbv("compare", *args, home=home)
        assert (done.code, done.out) == (2, ""), args
        assert message in done.sentence
    assert sorted(home.rglob("*")) == before
