"""A table on one GPU: models that share its memory are loaded once for all experiments, with the same results."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

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
