"""Properties of every built-in defense: its neutral setting, its cost, and its independence of the harness."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins import Defense, StageName, Verdict
from harmbench_vaccine.plugins.composition import Component, parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.runs import run_context
from support.world import make_world

ROOT = Path(__file__).parents[1]
NAMES = [name for name, entry in DEFENSES.entries().items() if entry.origin == "built-in"]
NEUTRAL = [name for name in NAMES if DEFENSES.get(name).neutral is not None]


def test_all_but_three_have_a_neutral_setting() -> None:
    """The others are the baselines, and `safe_delta`: no value of `s` gives the user's model."""
    assert set(NAMES) - set(NEUTRAL) == {"none", "sft", "safe_delta"}


# ---------------------------------------------------------------------------------------------------------------------
# Neutral settings


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """A store and a model pool that all runs share."""
    return run_context(tmp_path_factory.mktemp("neutral") / "store")


def adapters(context: RunContext, defense: str, params: dict[str, Any], topology: str) -> list[Adapter]:
    """Return the adapters of the final model of a run; the tiny world trains with dropout."""
    protocol = context.store.root.parent / topology / "tiny.yaml"
    if not protocol.exists():
        make_world(protocol.parent, {"topology": topology})
    component = Component(name=defense, params=params)
    experiment = Experiment.settle(
        RunSpec(protocol=str(protocol), defense=(component,), attack=parse_plugins("ratio=0.25"))
    )
    aligned = align(experiment, context)
    final = repair(experiment, context, aligned, finetune(experiment, context, aligned))
    return [Adapter.load(path) for path in final.spec.adapters]


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_equals_sft_of_the_same_topology(name: str, context: RunContext) -> None:
    """Compare all stages of the pipeline bit by bit."""
    defense = DEFENSES.get(name)
    topology = defense.topology or "double"
    neutral = adapters(context, name, dict(defense.neutral or {}), topology)
    plain = adapters(context, "sft", {}, topology)
    assert len(neutral) == len(plain)
    assert all(left.digest() == right.digest() for left, right in zip(neutral, plain, strict=True))


def test_another_setting_differs_from_sft(context: RunContext) -> None:
    plain, kl = adapters(context, "sft", {}, "double"), adapters(context, "kl", {"lam": 1.0}, "double")
    assert plain[0].digest() == kl[0].digest()
    assert plain[1].digest() != kl[1].digest()


# ---------------------------------------------------------------------------------------------------------------------
# Passes


class Passes:
    """A counter of the forward and backward passes of a model."""

    def __init__(self, model: Any) -> None:
        self.forward = 0
        self._backward: set[tuple[int, int]] = set()
        self.handle = model.register_forward_hook(self._count_forward)

    @property
    def backward(self) -> int:
        return len(self._backward)

    def _count_forward(self, module: Any, args: Any, output: Any) -> None:
        self.forward += 1
        number = self.forward
        for states in (output.logits, *(output.hidden_states or ())):  # a loss may depend on hidden states alone
            if states.requires_grad:
                states.register_hook(lambda _: self._backward.add((number, torch._C._current_graph_task_id())))


TRAINED = [name for name in NAMES if DEFENSES.get(name).trains and "repair" not in DEFENSES.get(name).stages]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TRAINED),
    ("vlguard", {"mix": "joint", "rows": 4}),
    ("safegrad", {"loss": "sft"}),
    ("tar", {"inner": 8, "every": 2}),
]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_step_runs_the_declared_passes(name: str, params: dict[str, Any], tmp_path: Path) -> None:
    defense = DEFENSES.get(name)(**params)
    tiny.stage(stirred=True)[1].trained().save(tmp_path)
    for stage in defense.stages:
        assert count_passes(defense, stage, tmp_path) == defense.passes(stage)


def judge_by_length(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Return verdicts with the probability of harm 0.4, 0.3, 0.2 or 0.1."""
    return [Verdict(False, [], {"harm": 0.4 - len(answer) % 4 / 10}, False) for _, answer in pairs]


def count_passes(defense: Defense, name: StageName, aligned: Path) -> str:
    """Return the passes of the only step, with one micro-batch, after the hooks that run before it.

    Args:
        defense: The defense.
        name: The stage.
        aligned: The alignment adapter, below the user's one.
    """
    below = [aligned] if name == "finetune" else []
    stage, _ = tiny.stage(stirred=True, pools=tiny.example_pools(), name=name, below=below)
    stage.judge, stage.decode = judge_by_length, str
    stage.rows = stage.encode(defense.select(stage, list(stage.pools.benign)))
    stage.step = stage.steps = 1
    team = DefenseTeam(members=(defense,), stage=stage.name)
    with stage.isolated("before"):
        team.before(stage)
    team.before_step(stage)
    passes = Passes(stage.stack.base)
    batch = {**tiny.collated(stage.rows[:3]), "rows": torch.tensor([0, 1, 2])}
    team.gradient(stage, batch)
    team.after_step(stage)
    passes.handle.remove()
    return f"{passes.forward}F {passes.backward}B"


# ---------------------------------------------------------------------------------------------------------------------
# Code


@pytest.mark.parametrize("path", sorted((ROOT / "defenses").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_defense_has_at_most_150_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_harness_names_no_defense() -> None:
    """A new defense needs one file: only its file, the protocols and the suite of the testbed report use its name.

    Exceptions: `sft` and `none` are baselines, and `vaccine` is in the name of the project and in the help examples.
    """
    names = [name for name in NAMES if name not in {"sft", "none", "vaccine"}]
    quoted_name = re.compile(rf"""["'](?:{"|".join(names)})["':=+]""")
    lines = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "harmbench_vaccine").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if quoted_name.search(line)
    }
    assert not lines
