"""What holds for every defense that comes with the harness: its neutral setting, its cost, its place in the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.store import Store
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import Lab
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.composition import Component, parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.world import make_world

ROOT = Path(__file__).parents[1]
NAMES = [name for name, found in DEFENSES.entries().items() if found.origin == "built-in"]
NEUTRAL = [name for name in NAMES if DEFENSES.get(name).neutral is not None]


def test_only_baselines_have_no_neutral_setting() -> None:
    assert set(NAMES) - set(NEUTRAL) == {"none", "sft"}


# ---------------------------------------------------------------------------------------------------------------------
# Neutral settings


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One store for all cells, which then share what is equal."""
    return Lab(Store(tmp_path_factory.mktemp("neutral") / "store"))


def adapters(lab: Lab, defense: str, params: dict[str, Any], topology: str) -> list[Adapter]:
    """The adapters of a cell's final model; the tiny world trains with dropout."""
    protocol = lab.store.root.parent / topology / "tiny.yaml"
    if not protocol.exists():
        make_world(protocol.parent, {"topology": topology})
    component = Component(name=defense, params=params)
    cell = Experiment.settle(RunSpec(protocol=str(protocol), defense=(component,), attack=parse_plugins("ratio=0.25")))
    aligned = align(cell, lab)
    final = repair(cell, lab, aligned, finetune(cell, lab, aligned))
    return [Adapter.load(path) for path in final.state.adapters]


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_is_fine_tuning_of_the_same_topology(name: str, lab: Lab) -> None:
    """Bit for bit, through the stages of the pipeline."""
    defense = DEFENSES.get(name)
    topology = defense.topology or "double"
    neutral = adapters(lab, name, dict(defense.neutral or {}), topology)
    plain = adapters(lab, "sft", {}, topology)
    assert len(neutral) == len(plain)
    assert all(one.digest() == other.digest() for one, other in zip(neutral, plain, strict=True))


def test_another_setting_is_not(lab: Lab) -> None:
    plain, other = adapters(lab, "sft", {}, "double"), adapters(lab, "kl", {"lam": 1.0}, "double")
    assert plain[0].digest() == other[0].digest()
    assert plain[1].digest() != other[1].digest()


# ---------------------------------------------------------------------------------------------------------------------
# Passes


class Passes:
    """Counts forward passes of a model, and backward passes through each."""

    def __init__(self, model: Any) -> None:
        self.forward = self.backward = 0
        self.handle = model.register_forward_hook(self._seen)

    def _seen(self, module: Any, args: Any, output: Any) -> None:
        self.forward += 1
        if output.logits.requires_grad:
            output.logits.register_hook(self._passed)

    def _passed(self, gradient: Tensor) -> None:
        self.backward += 1


TRAINED = [name for name in NAMES if DEFENSES.get(name).trains and "repair" not in DEFENSES.get(name).stages]
CASES = [*((name, {}) for name in TRAINED), ("vlguard", {"mix": "joint", "rows": 4})]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_step_costs_the_passes_that_are_declared(name: str, params: dict[str, Any]) -> None:
    defense = DEFENSES.get(name)(**params)
    assert counted(defense) == defense.passes()


def counted(defense: Defense) -> str:
    """The passes of one micro-batch, after what comes before it."""
    stage, _ = tiny.stage(stirred=True, pools=tiny.example_pools(), name=defense.stages[0])
    stage.rows = tiny.rows(8)
    stage.step, stage.steps = 1, 10
    team = DefenseTeam(members=(defense,), stage=stage.name)
    with stage.isolated("before"):
        team.before(stage)
    team.before_step(stage)
    passes = Passes(stage.stack.base)
    batch = {**tiny.batch((9, 5, 7)), "rows": torch.tensor([0, 1, 2])}
    team.gradient(stage, batch)
    passes.handle.remove()
    return f"{passes.forward}F {passes.backward}B"


# ---------------------------------------------------------------------------------------------------------------------
# Code


@pytest.mark.parametrize("path", sorted((ROOT / "defenses").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_defense_is_a_page(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


def test_no_defense_is_named_in_the_harness() -> None:
    """Only in its own file, the protocols and the suite of the testbed's report: adding one touches one file.

    `sft` and `none` are baselines, and `vaccine` is in the project's name and in the help's examples.
    """
    named = [name for name in NAMES if name not in {"sft", "none", "vaccine"}]
    words = re.compile(rf"""["'](?:{"|".join(named)})["':=+]""")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "harmbench_vaccine").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if words.search(line)
    }
    assert not found
