"""The attacks without harmful rows that go beyond `benign`: outliers of the benign rows, and overfitting on a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.attacks.outlier_benign import EPS, OutlierBenign
from harmbench_vaccine.attacks.overfit_benign import OverfitBenign
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets, plugin_pools
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune
from harmbench_vaccine.plugins import Example, Mix, Pools
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.autograd import cross_entropy
from support.runs import run_context
from support.world import make_world

POOLS = Pools(benign=[Example(f"benign:{n}", "abc", "xy zu " + "abcdefghi"[: 1 + n]) for n in range(9)])
TASK = [Example(f"task:{n}", "do", "it") for n in range(6)]


def user_stage(tmp_path: Path, architecture: str = "llama") -> TrainingStage:
    """Return the user stage on an aligned model whose alignment adapter is not zero."""
    tiny.stage(tiny.model(architecture), stirred=True)[1].trained().save(tmp_path)
    stage, stack = tiny.stage(tiny.model(architecture), below=[tmp_path], name="finetune", pools=POOLS)
    stack.drop_trained()
    return stage


def score(stage: TrainingStage, row: Encoded) -> float:
    """Return the score by the gradients of the weights themselves."""
    merged = tiny.model(stage.stack.base.config.model_type)
    adapter = stage.alignment_adapter()
    assert adapter is not None
    weights: dict[str, Any] = {name: merged.get_submodule(name).weight for name in adapter.factors}
    with torch.no_grad():
        for name, weight in weights.items():
            weight += adapter.delta(name).to(weight)
    merged.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(cross_entropy(merged, tiny.collated([row])), list(weights.values()))
    square = sum(float(gradient.square().sum()) for gradient in gradients)
    return math.log(square + EPS) + math.log(row.response_tokens + EPS)


def expected(stage: TrainingStage, count: int, *, largest: bool) -> set[str]:
    rows = tiny.encode(POOLS.benign)
    ranked = sorted(rows, key=lambda row: score(stage, row), reverse=largest)
    return {row.id for row in ranked[:count]}


def uploaded(rows: Sequence[Example]) -> set[str]:
    return {row.id for row in rows if row.id.startswith("benign")}


@pytest.mark.parametrize("pick", ["top", "bottom"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_rows_are_those_with_the_extreme_scores(pick: Any, architecture: str, tmp_path: Path) -> None:
    stage = user_stage(tmp_path, architecture)
    attack = OutlierBenign(rows=3, pick=pick)
    with stage.isolated("choose"):
        rows = attack.select(stage, attack.upload(list(TASK), POOLS))
    assert uploaded(rows) == expected(stage, 3, largest=pick == "top")
    assert expected(stage, 3, largest=True) != expected(stage, 3, largest=False)
    assert len(rows) == len(TASK)
    assert not any(row.harmful for row in rows)


def test_random_rows_are_the_control(tmp_path: Path) -> None:
    stage = user_stage(tmp_path)
    draws = {frozenset(uploaded(OutlierBenign(rows=3, pick="random").seeded(s).select(stage, TASK))) for s in range(5)}
    assert all(len(draw) == 3 for draw in draws)
    assert len(draws) > 1


def test_the_model_is_unchanged(tmp_path: Path) -> None:
    stage = user_stage(tmp_path)
    stage.model.requires_grad_(False)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    OutlierBenign(rows=2).select(stage, TASK)
    after = stage.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in stage.model.parameters())
    batch = tiny.batch()
    assert not stage.model(input_ids=batch["input_ids"]).logits.requires_grad  # no hook remains


def test_answers_of_one_word_are_skipped(tmp_path: Path) -> None:
    stage = user_stage(tmp_path)
    stage.pools = Pools(benign=[*POOLS.benign[:3], *(Example(f"benign:short{n}", "abc", "yes") for n in range(20))])
    assert not any("short" in name for name in uploaded(OutlierBenign(rows=3).select(stage, TASK)))


@pytest.mark.parametrize(("rows", "text"), [(7, "only 6 are available"), (6, "only 2 are available")])
def test_too_few_rows_are_refused(rows: int, text: str, tmp_path: Path) -> None:
    pools = Pools(benign=POOLS.benign[:2])
    with pytest.raises(BadInput, match=text):
        OutlierBenign(rows=rows).upload(list(TASK), pools)


def test_overfitting_sets_rows_and_epochs_and_no_harmful_rows() -> None:
    attack = OverfitBenign(rows=4, epochs=25)
    assert attack.mix(Mix(100, 0.5)) == Mix(4, 0.0)
    assert attack.settings(tiny.settings(epochs=1)).epochs == 25


@pytest.mark.parametrize("other", ["ratio=0.1", "samples=8"])
def test_overfitting_has_rows_of_its_own(other: str, tmp_path: Path) -> None:
    protocol = make_world(tmp_path, models=False)
    with pytest.raises(BadInput, match="'overfit_benign' excludes it"):
        Experiment.settle(RunSpec(protocol=str(protocol), attack=parse_plugins(f"overfit_benign=4+{other}")))


def test_both_run_in_the_pipeline_and_compose(tmp_path: Path) -> None:
    protocol, context = make_world(tmp_path / "world"), run_context(tmp_path / "store")

    def rows(attack: str) -> tuple[list[str], Experiment]:
        experiment = Experiment.settle(RunSpec(protocol=str(protocol), attack=parse_plugins(attack)))
        tuned = finetune(experiment, context, align(experiment, context))
        return tuned.artifacts["finetune"].json("rows.json")["used"], experiment

    used, experiment = rows("outlier_benign=3+samples=8+ratio=0.25")
    assert len(used) == 8
    evaluated = {row.id for evaluation in eval_sets(experiment) for row in evaluation.examples}
    assert not {*used} & (evaluated | {row.id for row in plugin_pools(experiment).alignment})
    assert sum(name.startswith("benign") for name in used) == 3
    assert sum(name.startswith("harmful") for name in used) == 2
    used, experiment = rows("overfit_benign:rows=4,epochs=2")
    assert len(used) == 4
    assert experiment.stages["finetune"].settings.epochs == 2
