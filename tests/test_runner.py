"""A table on one GPU: what shares its memory is loaded once for all cells, and the table is the same."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.store import Store
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference import memory
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all
from support.world import make_world

SAME = ("run", "harmful_score", "finetune_accuracy", "alignment_loss", "embedding_drift", "scores", "agreement")


def test_cells_are_made_stage_by_stage_where_models_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    specs = [
        RunSpec(protocol=str(world), defense=parse_plugins(defense), scorers=("beaver_dam", "refusal_keywords"))
        for defense in ("sft", "sft+antidote")
    ]
    made: list[str] = []
    make = Store.make

    def recorded(self: Store, stage: str, *args: Any, **named: Any) -> Any:
        artifact = make(self, stage, *args, **named)
        if not artifact.cached:
            made.append("train" if stage in ("align", "finetune", "repair") else stage)
        return artifact

    monkeypatch.setattr(Store, "make", recorded)
    orders, results = [], []
    for exclusive in (False, True):
        monkeypatch.setenv("HBV_HOME", str(tmp_path / f"home{exclusive}"))
        monkeypatch.setattr(memory, "exclusive", lambda on=exclusive: on)
        made.clear()
        results.append(run_all(specs))
        orders.append([stage for stage, _ in groupby(made)])
    assert orders[0] == ["train", "answer", "score", "drift"] * 2
    assert orders[1] == ["train", "answer", "score", "drift"]
    for one, other in zip(*results, strict=True):
        assert {key: one[key] for key in SAME} == {key: other[key] for key in SAME}
