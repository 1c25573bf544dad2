"""Task arithmetic: the subtraction, the training of the harmful adapter on the base model, and its sharing by runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.store import META
from harmbench_vaccine.defenses.task_arithmetic import TaskArithmetic
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training import trainer
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.hooks import PlainFinetuning
from harmbench_vaccine.training.stage import SeparateRun, TrainingStage
from support import tiny
from support.compare import close, same_adapter
from support.optimizers import train_two_steps
from support.runs import run_context
from support.world import make_world

POOLS = tiny.example_pools()
SMALL = {"batch": 8, "epochs": 1, "lora_targets": ["q_proj", "down_proj"]}


def update(adapter: Adapter) -> dict[str, Tensor]:
    """Return module -> the change of the weight, scale * B A, in float64."""
    return {module: adapter.scale * b.double() @ a.double() for module, (a, b) in adapter.factors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The edit


@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_the_edit_subtracts_the_harmful_update(lam: float) -> None:
    """Also of adapters with different ranks and scales."""
    stage, stack = tiny.stage(name="repair", stirred=True, pools=POOLS)
    adapter, runs = stack.trained(), []
    other = tiny.stage(trained_with=tiny.settings(lora_rank=3, lora_alpha=2.1), stirred=True)[1].trained()

    def nested(stage: TrainingStage, run: SeparateRun) -> Adapter:
        runs.append(run)
        return other

    stage.nested = nested
    edited = TaskArithmetic(lam=lam).edit(stage, adapter)
    user, harmful = update(adapter), update(other)
    assert close(update(edited), {module: user[module] - lam * harmful[module] for module in user})
    assert edited.rank == adapter.rank + 3
    (run,) = runs
    assert [row.id for row in run.rows] == [harmful.id for _, harmful in POOLS.paired]
    assert (run.start, run.steps, run.on_base) == (None, None, True)
    assert TaskArithmetic(lam=0.0).edit(stage, adapter) is adapter
    assert len(runs) == 1  # lam = 0 needs no training run


# ---------------------------------------------------------------------------------------------------------------------
# The harmful adapter


@pytest.mark.parametrize("topology", ["double", "single"])
def test_the_harmful_adapter_is_trained_on_the_base_model_alone(topology: str, tmp_path: Path) -> None:
    """Neither the alignment nor the user's update has a part in it."""
    settings = tiny.settings(batch=len(POOLS.harmful), lr=1e-3, schedule="constant", warmup=0.0, weight_decay=0.1)
    tiny.stage(stirred=True, seed=1)[1].trained().save(tmp_path)
    places: dict[str, Any] = {"below": [tmp_path]} if topology == "double" else {"start": tmp_path}
    stage, stack = tiny.stage(name="repair", stirred=True, trained_with=settings, pools=POOLS, **places)
    adapter = stack.trained()
    edited = TaskArithmetic(lam=1.0).edit(stage, adapter)
    user, result = update(adapter), update(edited)
    harmful = {module: user[module] - result[module] for module in user}

    seed = derive_seed(derive_seed(stage.seed, "harmful task"), "adapter")
    rows = tiny.encode(POOLS.harmful)
    alone, aligned = (
        update(train_two_steps(tiny.stage(trained_with=settings, seed=seed, below=below)[0], rows))
        for below in ([], [tmp_path])
    )
    assert close(harmful, alone)
    assert not close(harmful, aligned, 1e-1)
    assert same_adapter(stack.trained(), adapter)  # the adapter of the stage is restored


def test_missing_harmful_rows_are_refused() -> None:
    stage, stack = tiny.stage(name="repair", stirred=True, pools=Pools())
    with pytest.raises(BadInput):
        TaskArithmetic().edit(stage, stack.trained())


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class World:
    """The protocol files of both topologies, with one base model."""

    folder: Path

    def settle(self, defense: str, attack: str = "ratio=0.25", topology: str = "double", seed: int = 0) -> Experiment:
        protocol = self.folder / topology
        if not protocol.exists():
            changes = {"align": {"rows": 8, "settings": SMALL}, "finetune": {"samples": 8, "settings": SMALL}}
            make_world(protocol, {"topology": topology, **changes})
        spec = RunSpec(
            protocol=str(protocol / "tiny.yaml"),
            defense=parse_plugins(defense),
            attack=parse_plugins(attack),
            seed=seed,
        )
        return Experiment.settle(spec)

    def run(self, context: RunContext, *args: Any, **more: Any) -> tuple[list[Adapter], list[Adapter], list[Adapter]]:
        """Return the adapters of the aligned, the tuned and the final model."""
        experiment = self.settle(*args, **more)
        aligned = align(experiment, context)
        tuned = finetune(experiment, context, aligned)
        final = repair(experiment, context, aligned, tuned)
        aligned_adapters, tuned_adapters, final_adapters = (
            [Adapter.load(path) for path in model.spec.adapters] for model in (aligned, tuned, final)
        )
        return aligned_adapters, tuned_adapters, final_adapters


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def harmful_runs(context: RunContext) -> list[Adapter]:
    """Return the stored adapters that were trained on harmful rows."""
    folders = sorted(context.store.root.glob("nested/*"))
    assert all(json.loads((path / META).read_text())["inputs"]["purpose"] == "harmful task" for path in folders)
    return [Adapter.load(path / "adapter") for path in folders]


def test_the_harmful_adapter_is_the_same_for_every_aligned_model(world: World, tmp_path: Path) -> None:
    """Each run here trains it again: without alignment, where only the base model exists, and in both topologies."""
    trained = []
    for number, (defense, topology) in enumerate((("none", "double"), ("sft", "double"), ("sft", "single"))):
        context = run_context(tmp_path / str(number))
        aligned, tuned, final = world.run(context, f"{defense}+task_arithmetic=0.7", topology=topology)
        (harmful,) = harmful_runs(context)
        trained.append(harmful)
    assert all(same_adapter(trained[0], harmful) for harmful in trained[1:])
    before, after, task = (update(adapter) for adapter in (aligned[0], tuned[0], harmful))  # single topology
    assert same_adapter(final[0], aligned[0])
    assert close(update(final[1]), {module: after[module] - before[module] - 0.7 * task[module] for module in after})


def test_runs_of_one_base_model_and_seed_share_the_harmful_adapter(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, started = run_context(tmp_path), []

    def train(stage: TrainingStage, hooks: Any, rows: Any, settings: Any, *args: Any, **more: Any) -> Any:
        started.append((type(hooks), [row.id for row in rows], settings))
        return train_of_package(stage, hooks, rows, settings, *args, **more)

    train_of_package = trainer.train
    monkeypatch.setattr(trainer, "train", train)
    (aligned,), (_, user), (below, final) = world.run(context, "sft+task_arithmetic=0.7")
    (harmful,) = harmful_runs(context)
    experiment = world.settle("sft+task_arithmetic")
    rows = [row.id for row in plugin_pools(experiment).harmful]
    assert len(rows) == 24
    assert started[-1] == (PlainFinetuning, rows, experiment.protocol.finetune.settings)
    assert same_adapter(below, aligned)
    tuned, task = update(user), update(harmful)
    assert close(update(final), {module: tuned[module] - 0.7 * task[module] for module in tuned})

    for defense, attack, topology in (
        ("sft+task_arithmetic=2", "benign", "double"),
        ("sft+task_arithmetic", "optimizer:lr=0.001,rank=2", "double"),
        ("vaccine+task_arithmetic", "ratio=0.25", "double"),
        ("none+task_arithmetic", "ratio=0.25", "double"),
        ("sft+task_arithmetic", "ratio=0.25", "single"),
    ):
        world.run(context, defense, attack, topology)
        assert len(harmful_runs(context)) == 1, (defense, attack, topology)
    world.run(context, "none+task_arithmetic", seed=1)
    assert len(harmful_runs(context)) == 2
