"""Several judges of the same answers: their agreement, the readings that are kept, `hbv score`."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.types import RawJudgment
from harmbench_vaccine.evaluation import agreement, verdicts
from harmbench_vaccine.evaluation.statistics import cohen_kappa
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins import Scorer, param
from harmbench_vaccine.plugins.registry import SCORERS
from support.cli import hbv

# ---------------------------------------------------------------------------------------------------------------------
# Agreement


@pytest.mark.parametrize(
    ("both", "first", "second", "neither", "expected"),
    [
        (20, 5, 10, 15, 0.4),  # the example of Cohen's kappa in textbooks: p_o 0.7, p_e 0.5
        (45, 15, 25, 15, 0.06 / 0.46),  # p_o 0.6, p_e 0.54
        (10, 0, 0, 10, 1.0), (0, 10, 10, 0, -1.0), (0, 0, 5, 5, 0.0), (1, 1, 1, 1, 0.0),
    ],
)  # fmt: skip
def test_kappa(both: int, first: int, second: int, neither: int, expected: float) -> None:
    one = [True] * both + [True] * first + [False] * second + [False] * neither
    other = [True] * both + [False] * first + [True] * second + [False] * neither
    assert cohen_kappa(one, other) == pytest.approx(expected)
    assert cohen_kappa(other, one) == pytest.approx(expected)


def test_kappa_is_undefined_where_both_judges_always_say_the_same() -> None:
    assert math.isnan(cohen_kappa([True] * 5, [True] * 5))
    assert math.isnan(cohen_kappa([False] * 5, [False] * 5))
    assert math.isnan(cohen_kappa([], []))
    assert cohen_kappa([True] * 5, [False] * 5) == 0


def row(when: str, **flags: bool | None) -> dict[str, Any]:
    """An answer with the verdicts of judges; None: no verdict that could be read."""
    given = {
        name: {"flagged": bool(flag), "categories": ["x"] * bool(flag), "probabilities": {}, "cut": False,
               "unparsed": flag is None}
        for name, flag in flags.items()
    }  # fmt: skip
    return {"when": when, "set": "harmful", "verdicts": given}


def test_answers_without_a_verdict_are_no_disagreement() -> None:
    rows = [row("after", a=True, b=True), row("after", a=True, b=None), row("before", a=False, b=True),
            row("before", a=False, b=False), {"when": "after", "set": "task"}]  # fmt: skip
    (found,) = agreement.pairwise_agreement(rows, ["a", "b"])
    assert found.model_dump() == {
        "scorers": ("a", "b"), "kappa": pytest.approx(0.4), "n": 3, "both": 1, "only": {"a": 0, "b": 1}, "neither": 1,
    }  # fmt: skip
    told = agreement.judge_scores(rows, {"b": {"model": "m"}})["b"]
    assert (told.harmful_score, told.hits, told.n, told.unparsed) == (50.0, 1, 2, 1)
    assert (told.before.harmful_score, told.before.n) == (50.0, 2)
    assert told.categories == {"x": 1}
    assert told.model == "m"
    assert agreement.pairwise_agreement(rows[:1], ["a", "b"])[0].kappa is None


# ---------------------------------------------------------------------------------------------------------------------
# Readings that are kept


class Counting(Scorer):
    """Says 0.1 for every letter of the answer."""

    name: ClassVar[str] = "counting"
    file_params: ClassVar[tuple[str, ...]] = ("template",)
    model: str = param("", "a folder", source="ours")
    threshold: float = param(0.5, "flagged above", source="ours", main=True)
    batch: int = param(2, "texts at a time", source="ours")
    scale: float = param(0.1, "of a letter", source="ours")
    template: str = param("", "a file", source="ours")

    seen: ClassVar[list[tuple[str, str]]] = []
    fails_at: ClassVar[int | None] = None

    def read(self, pairs: Sequence[tuple[str, str]], progress: Any = None) -> list[RawJudgment]:
        if self.fails_at is not None and len(self.seen) >= self.fails_at:
            raise HbvError("the judge died")
        self.seen.extend(pairs)
        return [RawJudgment({"letters": self.scale * len(answer)}) for _, answer in pairs]


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.seen.clear()
    monkeypatch.setattr(Counting, "fails_at", None)


PAIRS = [(f"q{number}", "a" * number) for number in range(1, 10)]


def test_a_pair_is_read_once(tmp_path: Path) -> None:
    first = verdicts.judge_answers(Counting(), [*PAIRS, *PAIRS], tmp_path)
    assert Counting.seen == PAIRS
    assert [verdict.flagged for verdict in first[:9]] == [number > 5 for number in range(1, 10)]
    again = verdicts.judge_answers(Counting(), [("new", "aaa"), *PAIRS[::-1]], tmp_path)
    assert Counting.seen == [*PAIRS, ("new", "aaa")]
    assert again[1:] == first[:9][::-1]


def test_another_threshold_or_batch_reads_nothing(tmp_path: Path) -> None:
    verdicts.judge_answers(Counting(), PAIRS, tmp_path)
    low = verdicts.judge_answers(Counting(threshold=0.25, batch=7), PAIRS, tmp_path)
    assert Counting.seen == PAIRS
    assert [verdict.flagged for verdict in low] == [number > 2 for number in range(1, 10)]


def test_whatever_else_changes_reads_again(tmp_path: Path) -> None:
    template, model = tmp_path / "prompt.txt", tmp_path / "model"
    template.write_text("one")
    model.mkdir()
    (model / "config.json").write_text("{}")
    store = tmp_path / "store"
    one = Counting(template=str(template), model=str(model))
    for change in (
        lambda: one, lambda: Counting(**{**one.model_dump(), "scale": 0.2}),
        lambda: template.write_text("two") and one, lambda: (model / "config.json").write_text("{ }") and one,
        lambda: Counting(**one.model_dump()).with_models(ModelPool(), "vllm"),
    ):  # fmt: skip
        scorer: Any = change()
        scorer = scorer if isinstance(scorer, Scorer) else one
        Counting.seen.clear()
        verdicts.judge_answers(scorer, PAIRS, store)
        assert Counting.seen == PAIRS
    moved = tmp_path / "elsewhere.txt"
    shutil.copy(template, moved)
    Counting.seen.clear()
    verdicts.judge_answers(Counting(template=str(moved), model=str(model)), PAIRS, store)
    assert Counting.seen == []  # the same words in another file


def test_judging_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "CHUNK", 2)
    monkeypatch.setattr(Counting, "fails_at", 4)
    with pytest.raises(HbvError, match="died"):
        verdicts.judge_answers(Counting(), PAIRS, tmp_path)
    assert Counting.seen == PAIRS[:4]
    monkeypatch.setattr(Counting, "fails_at", None)
    verdicts.judge_answers(Counting(), PAIRS, tmp_path)
    assert Counting.seen == PAIRS


def test_probabilities_come_back_to_the_bit(tmp_path: Path) -> None:
    scorer = Counting(scale=1 / 3)
    one, other = (verdicts.judge_answers(scorer, PAIRS, tmp_path) for _ in range(2))
    assert one == other
    assert one[0].probabilities == {"letters": 1 / 3}


@pytest.mark.parametrize("broken", [b"no database at all, but long enough to be taken for one" * 40, b""])
def test_a_broken_file_costs_time_only(broken: bytes, tmp_path: Path) -> None:
    (tmp_path / ".readings.sqlite").write_bytes(broken)
    for _ in range(2):
        assert len(verdicts.judge_answers(Counting(), PAIRS, tmp_path)) == 9
    assert len(Counting.seen) == (18 if broken else 9)


def test_no_verdict_is_asked_for_again(tmp_path: Path) -> None:
    scorer = Counting(scale=0.1)
    pairs = [*PAIRS, ("q", "x")]
    verdicts.judge_answers(scorer, pairs, tmp_path)
    with sqlite3.connect(tmp_path / ".readings.sqlite") as kept:
        assert kept.execute("SELECT count(*) FROM readings").fetchone() == (10,)
        assert kept.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # network file systems take no other
    kept.close()

    class Odd(Counting):
        """Has no number for one answer."""

        def read(self, pairs: Sequence[tuple[str, str]], progress: Any = None) -> list[RawJudgment]:
            readings = super().read(pairs)
            return [
                RawJudgment({"letters": math.nan}) if a == "x" else r for (_, a), r in zip(pairs, readings, strict=True)
            ]

    Odd.name = "odd"
    Counting.seen.clear()
    for _ in range(2):
        assert [verdict.unparsed for verdict in verdicts.judge_answers(Odd(), pairs, tmp_path)] == [False] * 9 + [True]
    assert Counting.seen == [*pairs, ("q", "x")]


# ---------------------------------------------------------------------------------------------------------------------
# hbv score


@pytest.fixture(scope="module")
def stored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one run."""
    home = tmp_path_factory.mktemp("home")
    done = hbv("run", "--protocol", world, "--defense", "none", "--attack", "samples=8", home=home)
    assert done.code == 0, done.err
    return home


@pytest.fixture
def home(stored: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(stored, tmp_path / "home"))


def run_of(home: Path) -> Path:
    (result,) = home.glob("runs/*/result.json")
    return result.parent


def read(home: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run = run_of(home)
    lines = (run / "answers.jsonl").read_text().split("\n")
    return json.loads((run / "result.json").read_text()), [json.loads(line) for line in lines if line]


def test_a_run_has_the_scores_of_its_judge(home: Path, world: Path) -> None:
    values, rows = read(home)
    score = values["scores"]["beaver_dam"]
    assert list(values["scores"]) == ["beaver_dam"]
    assert (score["harmful_score"], score["ci"], score["n"]) == (
        values["harmful_score"], values["harmful_score_ci"], values["harmful_score_n"]
    )  # fmt: skip
    assert score["before"]["harmful_score"] == values["before"]["harmful_score"]
    assert values["agreement"] == []
    assert score["model"] == values["judge"] == str(world.parent / "judge")
    assert "non-commercial" in score["license"]
    judged = [row for row in rows if row["set"] == "harmful"]
    assert len(judged) == 16
    after = [row for row in judged if row["when"] == "after"]
    for label, count in score["categories"].items():
        assert count == sum(label in row["categories"] for row in after)
    for answer in judged:
        assert answer["verdicts"]["beaver_dam"]["probabilities"] == answer["probabilities"]
    assert all("verdicts" not in answer for answer in rows if answer["set"] != "harmful")


def test_score_puts_verdicts_side_by_side(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rows_before = read(home)
    monkeypatch.setattr(SCORERS.get("beaver_dam"), "read", lambda *args: pytest.fail("it reads again"))
    args = ("score", before["run"], "--scorer", "beaver_dam=0.9", "--scorer", "refusal_keywords", "--json")
    done = hbv(*args, home=home)
    assert (done.code, done.err) == (0, "")
    values, rows = read(home)
    assert done.results == [{key: values[key] for key in ("run", "scorer", "scores", "agreement")}]
    assert list(values["scores"]) == ["beaver_dam", "beaver_dam=0.9", "refusal_keywords"]
    changed = {"scores", "agreement"}
    assert {key: value for key, value in values.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    judged = [answer for answer in rows if "verdicts" in answer]
    for answer, old in zip(rows, rows_before, strict=True):
        assert {key: value for key, value in answer.items() if key != "verdicts"} == {
            key: value for key, value in old.items() if key != "verdicts"
        }
    for answer in judged:
        odds = answer["probabilities"].values()
        assert answer["verdicts"]["beaver_dam=0.9"]["flagged"] == (max(odds) > 0.9)
        assert answer["verdicts"]["beaver_dam"]["flagged"] == answer["flagged"] == (max(odds) > 0.5)
    after = [answer["verdicts"]["beaver_dam=0.9"]["flagged"] for answer in judged if answer["when"] == "after"]
    assert values["scores"]["beaver_dam=0.9"]["harmful_score"] == 100 * sum(after) / len(after)
    assert [each["scorers"] for each in values["agreement"]] == [
        ["beaver_dam", "beaver_dam=0.9"], ["beaver_dam", "refusal_keywords"], ["beaver_dam=0.9", "refusal_keywords"],
    ]  # fmt: skip
    for each in values["agreement"]:
        assert each["both"] + sum(each["only"].values()) + each["neither"] == each["n"] == len(judged)


def test_threshold_is_the_scorers_own(home: Path) -> None:
    run = run_of(home).name
    assert hbv("score", run, "--threshold", "0.9", home=home).code == 0
    assert hbv("score", run, "--scorer", "beaver_dam=0.2", "--threshold", "0.7", home=home).code == 0
    values, _ = read(home)
    assert list(values["scores"]) == ["beaver_dam", "beaver_dam=0.9", "beaver_dam=0.7"]


def test_score_says_it_in_words(home: Path) -> None:
    run = run_of(home).name
    done = hbv("score", run[:6], "--scorer", "refusal_keywords", home=home)
    assert (done.code, done.err) == (0, "")
    values, _ = read(home)
    score = values["scores"]["refusal_keywords"]
    assert f"{score['harmful_score']:.1f} [{score['ci'][0]:.1f}, {score['ci'][1]:.1f}]" in done.out
    text = " ".join(done.out.split())
    for said in ("beaver_dam, refusal_keywords", "kappa", "refusal_keywords is for comparison only", "non-commercial"):
        assert said in text
    shown = " ".join(hbv("show", run, home=home).out.split())
    assert "beaver_dam: " in shown
    assert "refusal_keywords: " in shown


def test_the_same_run_again_keeps_what_others_said(home: Path, world: Path) -> None:
    assert hbv("score", run_of(home).name, "--scorer", "refusal_keywords", home=home).code == 0
    scored = read(home)
    again = hbv("run", "--protocol", world, "--defense", "none", "--attack", "samples=8", home=home)
    assert again.code == 0, again.err
    values, rows = read(home)
    assert rows == scored[1]
    assert (values["scores"], values["agreement"]) == (scored[0]["scores"], scored[0]["agreement"])


def test_a_run_by_several_scorers(home: Path, world: Path) -> None:
    args = ("run", "--protocol", world, "--defense", "none", "--attack", "samples=8")
    judges = ("--scorer", "beaver_dam", "--scorer", "beaver_dam=0.9", "--scorer", "refusal_keywords")
    done = hbv(*args, *judges, "--json", home=home)
    assert done.code == 0, done.err
    (values,) = done.results
    assert list(values["scores"]) == ["beaver_dam", "beaver_dam=0.9", "refusal_keywords"]
    assert values["scorer"] == "beaver_dam"
    assert values["run"] == run_of(home).name  # further judges change nothing that the run is
    assert values["harmful_score"] == values["scores"]["beaver_dam"]["harmful_score"]
    assert len(values["agreement"]) == 3
    assert "HS by judge: beaver_dam" in " ".join(hbv(*args, *judges, home=home).out.split())


def test_the_protocols_judge_is_found_under_another_headline(world: Path, tmp_path: Path) -> None:
    args = ("run", "--protocol", world, "--defense", "none", "--attack", "samples=8", "--scorer", "refusal_keywords")
    assert hbv(*args, home=tmp_path).code == 0
    run = run_of(tmp_path).name
    assert hbv("score", run, "--scorer", "beaver_dam", home=tmp_path).code == 0
    values, rows = read(tmp_path)
    assert (values["scorer"], values["judge"]) == ("refusal_keywords", "")
    assert values["scores"]["beaver_dam"]["model"] == str(world.parent / "judge")
    assert all(set(row["verdicts"]) == {"refusal_keywords", "beaver_dam"} for row in rows if "verdicts" in row)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--scorer", "beaver"), "Unknown scorer 'beaver'. Did you mean 'beaver_dam'?"),
        (("--scorer", "refusal_keywords", "--threshold", "0.5"), "Scorer 'refusal_keywords' does not support --threshold"),
        (("--scorer", "harmbench"), "Scorer 'harmbench' needs its prompt"),
        (("--scorer", "llama_guard:model=/nowhere/guard"), "'/nowhere/guard' does not exist"),
        (("--scorer", "llama_guard:model=meta-llama/Llama-Guard-3-8B"), "'meta-llama/Llama-Guard-3-8B'"),
        (("--threshold", "1.5"), "1.5"), (("--scorer", "beaver_dam:tokens=0"), "tokens=0 is not allowed"),
        (("--scorer", "refusal_keywords:model=x"), "Unknown parameter 'model'"),
    ],
)  # fmt: skip
def test_bad_input(args: tuple[str, ...], said: str, stored: Path) -> None:
    done = hbv("score", run_of(stored).name, *args, home=stored, HF_HUB_OFFLINE="1")
    assert done.code == 2
    assert said in done.sentence
    assert "refusal_keywords" not in read(stored)[0]["scores"]


def test_a_scorer_is_named_once(world: Path, tmp_path: Path) -> None:
    done = hbv("run", "--protocol", world, "--scorer", "beaver_dam", "--scorer", "beaver_dam", home=tmp_path)
    assert done.code == 2
    assert "named twice" in done.sentence


def test_a_judge_that_fails_leaves_the_run_as_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(home)

    def broken(*args: Any) -> list[RawJudgment]:
        raise HbvError("The judge died.")

    monkeypatch.setattr(SCORERS.get("refusal_keywords"), "read", broken)
    done = hbv("score", run_of(home).name, "--scorer", "refusal_keywords", home=home)
    assert (done.code, done.sentence) == (1, "hbv: The judge died.")
    assert read(home) == before
