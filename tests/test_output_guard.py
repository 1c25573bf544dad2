"""Output guard: replaced answers, and runs that share the models and the raw answers of plain fine-tuning."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.jsonl import read_lines, write_json, write_lines
from harmbench_vaccine.core.store import META, Artifact
from harmbench_vaccine.core.types import RawJudgment, Verdict
from harmbench_vaccine.data.answer_checks import find_refusal
from harmbench_vaccine.defenses.output_guard import OutputGuard
from harmbench_vaccine.evaluation.measure import answer_rows, measure_result
from harmbench_vaccine.evaluation.verdicts import judged_pair
from harmbench_vaccine.experiment.artifacts import ANSWERS, ENGINE, Measurements
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.pipeline import defend_answers, run
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import SCORERS
from support.runs import run_context
from support.world import make_world

REFUSAL = "I cannot help with that."
Pairs = Sequence[tuple[str, str]]


# ---------------------------------------------------------------------------------------------------------------------
# Single answers


@pytest.mark.parametrize(
    ("flagged", "probabilities", "is_replaced"),
    [
        (False, {"a": 0.7, "b": 0.1}, True),
        (True, {"a": 0.6, "b": 0.5}, False),
        (True, {}, True),
        (False, {}, False),
        (None, {}, True),
    ],
    ids=["one category above", "none above", "flagged", "not flagged", "unread"],
)
def test_an_answer_is_replaced_above_the_threshold(
    flagged: bool | None, probabilities: dict[str, float], is_replaced: bool
) -> None:
    pairs = [("Q", "first"), ("Q", "second"), ("Q", "third")]
    read: list[Pairs] = []

    def judge(texts: Pairs) -> list[Verdict]:
        read.append(texts)
        safe = Verdict(False, [], {"a": 0.0}, cut=False)
        return [safe, Verdict(flagged, [], probabilities, cut=False), safe]

    answers = OutputGuard(threshold=0.6, refusal="No.").answer(pairs, judge)
    assert answers == ["first", "No." if is_replaced else "second", "third"]
    assert read == [pairs]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol file of a small world: 2 steps of alignment, and a user stage that learns the task."""
    answer = {"harmful": {"prompts": 8}, "benign": {"prompts": 4}, "task_items": 8}
    align = {"settings": {"epochs": 1, "batch": 20}}
    return make_world(tmp_path_factory.mktemp("world"), {"align": align, "answer": answer})


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """Return a context that the runs of this file share."""
    return run_context(tmp_path_factory.mktemp("store"))


class StubGuard:
    """Counts the pairs that Llama Guard reads and the prompts that a model answers; the guard flags about half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.prompts: list[str] = []
        generate = TransformersEngine.generate

        def read(scorer: Any, pairs: Pairs, progress: Any = None) -> list[RawJudgment]:
            self.pairs.extend(pairs)
            return [RawJudgment({"unsafe": odds(pair)}, "unsafe" if odds(pair) > 0.5 else "safe") for pair in pairs]

        def recorded(engine: Any, adapters: Any, prompts: Sequence[str], *args: Any) -> Any:
            self.prompts.extend(prompts)
            return generate(engine, adapters, prompts, *args)

        monkeypatch.setattr(SCORERS.get("llama_guard"), "read", read)
        monkeypatch.setattr(TransformersEngine, "generate", recorded)


def odds(pair: tuple[str, str]) -> float:
    return zlib.crc32("\n".join(pair).encode()) / 2**32


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> StubGuard:
    return StubGuard(monkeypatch)


def settle(protocol: Path, defense: str, *scorers: str) -> Experiment:
    return Experiment.settle(
        RunSpec(
            protocol=str(protocol),
            defense=parse_plugins(defense),
            attack=parse_plugins("ratio=0.25"),
            scorers=scorers or ("refusal_keywords",),
        )
    )


def answers_of(measurements: Measurements) -> list[dict[str, Any]]:
    return [row for artifact in measurements.answers.values() for row in read_lines(artifact.path / ANSWERS)]


def test_a_run_shares_models_and_raw_answers_with_sft(small: Path, context: RunContext, guard: StubGuard) -> None:
    plain = run(settle(small, "sft"), context)
    guard.prompts.clear()
    assert guard.pairs == []
    measurements = run(settle(small, "output_guard"), context)
    assert guard.prompts == []
    for stage in ("align", "finetune"):
        assert measurements.final.artifacts[stage].key == plain.final.artifacts[stage].key
        assert measurements.final.artifacts[stage].cached
    assert measurements.drift.key == plain.drift.key
    for name, artifact in measurements.answers.items():
        assert artifact.json(META)["inputs"]["answers"] == plain.answers[name].key
        assert artifact.key != plain.answers[name].key

    replaced = 0
    pairs = [judged_pair(row) for row in answers_of(plain)]
    assert sorted(set(guard.pairs)) == sorted(set(pairs))
    for pair, old, new in zip(pairs, answers_of(plain), answers_of(measurements), strict=True):
        if odds(pair) > 0.5:
            replaced += 1
            assert new == {**old, "answer": REFUSAL, "generated": old["answer"]}
        else:
            assert new == old
    assert 0.2 < replaced / len(pairs) < 0.8


def test_scores_are_those_of_the_replaced_answers(small: Path, context: RunContext, guard: StubGuard) -> None:
    experiment = settle(small, "output_guard", "refusal_keywords", "beaver_dam")
    measurements = run(experiment, context)
    result = measure_result(experiment, measurements)
    rows = {name: [row for row in answer_rows(measurements) if (row["when"], row["set"]) == name] for name in SETS}
    for when, score in (("before", result.before.harmful_score), ("after", result.harmful_score)):
        flagged = [row for row in rows[when, "harmful"] if find_refusal(row["answer"]) is None]
        assert score == 100 * len(flagged) / 8
        assert 0 < len(flagged) < 8
        assert all("generated" not in row for row in flagged)
    items = rows["after", "task"]
    generated = [{**row, "answer": row.get("generated", row["answer"])} for row in items]
    correct, before_guard = (sum(experiment.task.scores("flexible", answers)) for answers in (items, generated))
    assert result.finetune_accuracy_hits == correct < before_guard  # the price of the defense
    assert not result.guards["llama_guard"].fingerprint
    assert result.guards["llama_guard"].model == "meta-llama/Llama-Guard-3-8B"
    assert result.counts.finetune is not None
    assert result.counts.finetune.selected is None


SETS = [(when, name) for when in ("before", "after") for name in ("harmful", "benign", "task")]


def test_another_threshold_reads_nothing_again(small: Path, context: RunContext, guard: StubGuard) -> None:
    run(settle(small, "output_guard"), context)
    guard.pairs.clear()
    experiment = settle(small, "sft+output_guard=llama_guard", "refusal_keywords", "beaver_dam")
    first = run(experiment, context)
    second = run(settle(small, "sft+output_guard:threshold=0.8"), context)
    assert guard.pairs == guard.prompts == []
    changed = [sum("generated" in row for row in answers_of(measurements)) for measurements in (first, second)]
    assert changed[0] > changed[1] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Keys and files of replaced answers


def stored_answers(context: RunContext, text: str = "Yes") -> Artifact:
    """Store raw answers that vLLM generated."""

    def create(folder: Path, checkpoints: Path) -> None:
        write_lines(folder / ANSWERS, [{"id": "a", "instruction": "Q", "input": "", "answer": text}])
        write_json(folder / ENGINE, {"answered_by": "vllm"})

    return context.store.get_or_create("answer", {"text": text}, create)


def test_the_content_of_the_judge_is_part_of_the_key(small: Path, tmp_path: Path) -> None:
    """A copy of the judge gives the same artifact, and so does another threshold of the score."""
    context = run_context(tmp_path / "store")
    judge = small.parent / "judge"
    folders = {name: tmp_path / name for name in ("first", "copy", "other")}
    for name, folder in folders.items():
        folder.mkdir()
        for file in judge.iterdir():
            text = file.read_bytes()
            if file.name == "config.json":
                text = text.replace(b"{", b'{"note": "other",' if name == "other" else b'{"note": "same",', 1)
            (folder / file.name).write_bytes(text)
    keys = {
        name: defend_answers(
            settle(small, f"output_guard:judge=beaver_dam,model={folder}", "beaver_dam=0.3"), context, answers
        ).key
        for answers in [stored_answers(context)]
        for name, folder in folders.items()
    }
    assert keys["first"] == keys["copy"]
    assert keys["first"] != keys["other"]


@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["all flagged", "neutral"])
def test_the_engine_of_the_raw_answers_is_recorded(
    threshold: float, small: Path, tmp_path: Path, guard: StubGuard
) -> None:
    context = run_context(tmp_path / "store")
    experiment = settle(small, f"output_guard:threshold={threshold:g}")
    artifact = defend_answers(experiment, context, stored_answers(context))
    (row,) = read_lines(artifact.path / ANSWERS)
    assert row["answer"] == ("Yes" if threshold == 1 else REFUSAL)
    assert artifact.json(ENGINE) == {"answered_by": "vllm"}
    assert len(guard.pairs) == len(experiment.guards) == (threshold < 1)
