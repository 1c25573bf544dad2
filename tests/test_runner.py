"""A table on one GPU: models that share its memory are loaded once for all experiments, with the same results."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine import runner
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all
from support.world import make_world

SAME = ("run", "harmful_score", "finetune_accuracy", "alignment_loss", "embedding_drift", "scores", "agreement")


def test_experiments_run_stage_by_stage_if_models_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    specs = [
        RunSpec(protocol=str(world), defense=parse_plugins(defense), scorers=("beaver_dam", "refusal_keywords"))
        for defense in ("sft", "sft+antidote")
    ]
    stages: list[str] = []
    get_or_create = Store.get_or_create

    def recording(self: Store, stage: str, *args: Any, **options: Any) -> Any:
        artifact = get_or_create(self, stage, *args, **options)
        if not artifact.cached:
            stages.append("train" if stage in ("align", "finetune", "repair") else stage)
        return artifact

    monkeypatch.setattr(Store, "get_or_create", recording)
    orders, results = [], []
    for turns in (False, True):
        monkeypatch.setenv("HBV_HOME", str(tmp_path / f"home{turns}"))
        monkeypatch.setattr(ModelPool, "one_at_a_time", staticmethod(lambda turns=turns: turns))
        stages.clear()
        results.append(run_all(specs))
        orders.append([stage for stage, _ in groupby(stages)])
    assert orders[0] == ["train", "answer", "score", "drift"] * 2
    assert orders[1] == ["train", "answer", "score", "drift"]
    for together, in_turns in zip(*results, strict=True):
        assert together.model_dump(include=set(SAME)) == in_turns.model_dump(include=set(SAME))
        for name, record in together.stages.items():
            created = {key: artifact.cached for key, artifact in record.artifacts.items()}
            assert created == {key: artifact.cached for key, artifact in in_turns.stages[name].artifacts.items()}


@pytest.mark.parametrize("task", ["own:data=testbed:data/alpaca", "own:data=ROWS,rule=judge,model=testbed:model"])
def test_the_testbed_is_built_for_a_task_that_reads_it(
    task: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The protocol itself does not use the testbed."""

    def build(*args: Any) -> None:
        raise HbvError("the testbed is built")

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 9)
    monkeypatch.setattr(runner, "ensure_testbed", build)
    with pytest.raises(HbvError, match="the testbed is built"):
        run_all([RunSpec(protocol=str(world), task=task.replace("ROWS", str(rows)))])


def test_instructions_of_the_alignment_are_trained_on_and_counted(tmp_path: Path) -> None:
    changes = {"align": {"rows": 8, "instructions": 6}, "finetune": {"samples": 8}, "score": {"drift_rows": 14}}
    world = make_world(tmp_path / "world", changes)
    results = run_all([RunSpec(protocol=str(world), defense=parse_plugins(name)) for name in ("sft", "none")])
    mixed, unaligned = (result.to_json()["counts"] for result in results)
    counts = {"rows": 14, "harmful": 0, "without_room": 0, "instructions": 6, "harmful_tokens": 0}
    assert mixed["align"] == {**counts, "response_tokens": mixed["align"]["response_tokens"]}
    assert "align" not in unaligned
    rows = results[0].stages["align"].artifacts["align"].path
    used = json.loads(Path(rows, "rows.json").read_text())["used"]
    assert sorted(name.partition(":")[0] for name in used) == ["benign"] * 6 + ["safe"] * 8


def test_a_run_whose_stored_answers_are_damaged_is_stored_again(tmp_path: Path, own_home: Path) -> None:
    world = make_world(tmp_path / "world", {"align": {"rows": 8}, "finetune": {"samples": 8}})
    [result] = run_all([RunSpec(protocol=str(world))])
    answers = own_home / "runs" / result.run / "answers.jsonl"
    text = answers.read_text()
    answers.write_text(text.replace('"instruction"', '"question"'))
    run_all([RunSpec(protocol=str(world))])
    assert answers.read_text() == text
