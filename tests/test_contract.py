"""`hbv check`: what is sound passes, and every check meets a plug-in that fails it and nothing else."""

from __future__ import annotations

import gc
import json
import os
import random
import re
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from harmbench_vaccine.core.progress import SILENT
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.prompts import PromptTemplate
from harmbench_vaccine.plugins import Attack, Defense, Plugin, contract, param, resolve_params
from harmbench_vaccine.plugins.contract import attack as of_attacks
from harmbench_vaccine.plugins.contract import hooks, outcomes
from harmbench_vaccine.plugins.contract.attack import AttackSubject
from harmbench_vaccine.plugins.contract.findings import Checks, Finding
from harmbench_vaccine.plugins.contract.subject import DefenseSubject
from harmbench_vaccine.plugins.contract.watch import Passes
from harmbench_vaccine.plugins.contract.world import TinyWorld
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from support import tiny
from support.cli import hbv

gc.freeze()  # as in tiny, with what was imported since

OF_DEFENSES: Checks[Any] = Checks([*hooks.CHECKS.all, *outcomes.CHECKS.all])
OF_ATTACKS: Checks[Any] = of_attacks.CHECKS
TUTORIAL = Path(__file__).parents[1] / "docs" / "your-own-defense.md"
KINDS = {"defense": OF_DEFENSES, "attack": OF_ATTACKS}


def checked(cls: type[Plugin], **params: Any) -> dict[str, Finding]:
    """Every finding on a class, by the check's name."""
    cls.name = vars(cls).get("name") or cls.__name__.lower()
    return {finding.check: finding for finding in contract.run_contract(resolve_params(cls, params)).findings}


def only(cls: type[Plugin], folder: Path, check: str) -> Finding:
    """What one check alone finds, without those that it builds on."""
    cls.name = vars(cls).get("name") or cls.__name__.lower()
    subject_class: Any = DefenseSubject if issubclass(cls, Defense) else AttackSubject
    subject = subject_class(cls, resolve_params(cls, {}).params, TinyWorld(folder))
    alone = [replace(each, after=()) for each in KINDS[cls.kind].all if each.name == check]
    (finding,) = Checks(alone).examine(subject, SILENT)
    return finding


def failing(findings: Mapping[str, Finding]) -> dict[str, str]:
    """The checks that fail, with what they say."""
    return {name: finding.reason for name, finding in findings.items() if finding.outcome == "fails"}


# ---------------------------------------------------------------------------------------------------------------------
# What is built in


def holds(spec: str) -> dict[str, str]:
    """The failing checks of a built-in, by both of its kinds."""
    return {f"{each.kind}/{f.check}": f.reason for each in map(contract.run_contract, contract.find_plugins(spec))
            for f in each.findings if f.outcome == "fails"}  # fmt: skip


REPRESENTATIVE = (
    "sft", "none", "vaccine", "ewc", "realign", "random_perturbation",
    "ratio", "backdoor", "refusal_ablation:prompts=8,held_out=4,positions=2",
)  # fmt: skip
"""No hook; stage left out; two passes; state and single topology; a training run inside; draws in the repair stage;
attacks: a mix, rows and questions, weights."""
VARIANTS = (
    "vaccine:tau=2", "tvaccine:gamma=1,interval=1,refresh=2", "lisa:k1=1,k2=1", "ewc:fisher=sample,lam=1",
    "ldifs:variant=git-disl,alpha=1e-4", "vlguard:mix=replace,rows=10",
    "vlguard:mix=joint,rows=10", "antidote:scope=model", "safe_lora:tau=0.5",
    "safe_lora:projector=exact,k=2", "optimizer:lr=1e-3,batch=2,rank=8", "optimizer:full=true", "ratio=0",
    "backdoor:position=prefix",
)  # fmt: skip


@pytest.mark.parametrize("spec", REPRESENTATIVE)
def test_representative_plugins_keep_the_contract(spec: str) -> None:
    assert holds(spec) == {}


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*DEFENSES.entries(), *ATTACKS.entries(), *VARIANTS])
def test_every_built_in_keeps_the_contract(spec: str) -> None:
    assert holds(spec) == {}


def test_what_does_not_apply_is_said_and_why() -> None:
    """Of plain SFT, which overrides nothing."""
    findings = checked(DEFENSES.get("sft"))
    said = {name: finding.reason for name, finding in findings.items() if finding.outcome == "n/a"}
    assert said == {
        "below": "Nothing lies below the adapter of the alignment stage.",
        "seeds": "It draws nothing, or too little to tell.",
        "acts": "It overrides no hook: it is plain SFT, or leaves the stage out.",
        "neutral": "It declares no setting at which it changes nothing.",
        "state": "It keeps nothing between steps.",
    }


def test_checks_build_on_earlier_ones_and_say_what_they_demand() -> None:
    for checks in KINDS.values():
        earlier: set[str] = set()
        for check in checks.all:
            assert set(check.after) <= earlier, check.name
            assert check.demand.endswith("."), check.name
            assert check.name not in earlier
            earlier.add(check.name)


# ---------------------------------------------------------------------------------------------------------------------
# Sound ones to break


class Sound(Defense):
    """Trains with a penalty on the weights."""

    citation: ClassVar[str] = "unpublished"

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        own = stage.gradient(batch)
        return own + 0.1 * Gradient(own.loss, stage.values())


class SoundRepair(Defense):
    """Halves the update."""

    citation: ClassVar[str] = "unpublished"
    stages = ("repair",)
    cost = "none"

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        return adapter.scaled(0.5)


class SoundAttack(Attack):
    """Opens every harmful response."""

    citation: ClassVar[str] = "unpublished"

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        return [replace(row, response=f"Sure: {row.response}") if row.harmful else row for row in rows]


class SoundEdit(Attack):
    """Shrinks the LM head."""

    citation: ClassVar[str] = "unpublished"
    trains = False
    excludes = ("*",)

    @torch.no_grad()
    def ablate(self, stage: TrainingStage) -> None:
        model: Any = stage.model
        model.lm_head.weight.mul_(0.5)


class Everywhere(Defense):
    """Acts in every stage: remembers, draws rows and numbers, trains apart."""

    citation: ClassVar[str] = "unpublished"
    stages = ("align", "finetune", "repair")
    neutral: ClassVar[Mapping[str, Any] | None] = {"size": 0.0, "rows": 0}

    size: float = param(0.01, "size of the noise", source="a guess", ge=0)
    rows: int = param(10, "rows to add", source="a guess", ge=0)

    _sum: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(1))

    def train_on(self, stage: Any, rows: list[Example], pools: Any) -> list[Example]:
        return [*rows, *self.draw("benign rows", pools.benign, self.rows)]

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        own, generator = stage.gradient(batch), stage.generator("noise")
        noise = [torch.randn(value.shape, generator=generator) for value in own.values if value is not None]
        return own + self.size * (1 + float(self._sum)) * Gradient(own.loss, noise)

    def after_step(self, stage: TrainingStage) -> None:
        self._sum = self._sum + 1

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        if stage.name != "repair" or not self.rows:
            return adapter
        return stage.train_separately("again", self.draw("benign rows", stage.pools.benign, self.rows), start=adapter)

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._sum = state["sum"]


def test_sound_ones_pass() -> None:
    for cls in (Sound, SoundRepair, SoundAttack, SoundEdit):
        assert failing(checked(cls)) == {}, cls.__name__


def test_a_defense_of_every_stage_is_checked_in_every_stage() -> None:
    findings = checked(Everywhere)
    assert {name: finding.outcome for name, finding in findings.items()} == dict.fromkeys(findings, "ok")


# ---------------------------------------------------------------------------------------------------------------------
# Defenses that break one promise


class Undescribed(Sound):
    citation: ClassVar[str] = ""

    strength: float = param(1.0, "", source="", ge=0)


class Misdeclared(Sound):
    """Declares what cannot be."""

    stages = ("align", "later")
    cost = "two passes"
    neutral: ClassVar[Mapping[str, Any] | None] = {"strength": -1.0}

    strength: float = param(1.0, "strength", source="a guess", ge=0)


class TupleOfRows(Sound):
    """Rows of another type."""

    def train_on(self, stage: Any, rows: Any, pools: Any) -> Any:
        return tuple(rows)


class NoSettings(SoundRepair):
    """Forgets to return."""

    def settings(self, stage: Any, settings: Any) -> Any:
        replace(settings, lr=1e-3)


class Deaf(SoundRepair):
    """Loses the question."""

    def template(self, use: Any, template: PromptTemplate) -> PromptTemplate:
        return PromptTemplate("Be safe.", "Be safe. {instruction} {input}") if use == "answer" else template


class TwoOfAName(SoundRepair):
    """Two sets under one name."""

    def evaluations(self, sets: Any) -> Any:
        return [*sets, replace(sets[0], max_new_tokens=3)]


class Attached(Sound):
    """A loss with its graph."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        return replace(super().gradient(stage, batch), loss=stage.loss(batch))


class Raising(Sound):
    """Raises in a hook."""

    def after_step(self, stage: TrainingStage) -> None:
        if stage.step == 2:
            raise ZeroDivisionError("no such\nstep")


class FewerModules(SoundRepair):
    """Drops a module."""

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        return replace(adapter, factors=dict(list(adapter.factors.items())[1:]))


class Still(Sound):
    """Trains nothing."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        return 0.0 * stage.gradient(batch)


class TouchesBase(SoundRepair):
    """Edits the base model."""

    @torch.no_grad()
    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        next(p for name, p in stage.model.named_parameters() if name.endswith("norm.weight")).mul_(2)
        return super().edit(stage, adapter)


class TouchesAligned(SoundRepair):
    """Edits the aligned model's adapter."""

    @torch.no_grad()
    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        next(p for name, p in stage.model.named_parameters() if ".lora_A.frozen" in name).mul_(2)
        return super().edit(stage, adapter)


class Careless(Sound):
    """Draws from torch's shared generator."""

    def before_step(self, stage: TrainingStage) -> None:
        torch.rand(1)


class Moody(SoundRepair):
    """Never twice the same."""

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        return adapter.scaled(1 + int.from_bytes(os.urandom(4), "big") / 2**32)


class FirstRows(Sound):
    """Takes the first rows of a pool."""

    def train_on(self, stage: Any, rows: list[Example], pools: Any) -> list[Example]:
        return [*rows, *pools.benign[:10]]


class Idle(Sound):
    """Computes a correction and forgets to return it."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        own = stage.gradient(batch)
        _ = own + 0.1 * Gradient(own.loss, stage.values())
        return own


class NotNeutral(Sound):
    """Is not SFT where it says so."""

    neutral: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}

    strength: float = param(1.0, "strength", source="a guess", ge=0)


class Forgetful(Sound):
    """Does not restore what it keeps."""

    _count: int = 0

    def after_step(self, stage: TrainingStage) -> None:
        self._count += 1

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self._count)}


class Unsaved(Sound):
    """Keeps to itself what it must remember."""

    _count: int = 0

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        return (1 + self._count) * super().gradient(stage, batch)

    def after_step(self, stage: TrainingStage) -> None:
        self._count += 1


class Zeroing(Sound):
    """Throws away the micro-batches before."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        stage.model.zero_grad()
        return super().gradient(stage, batch)


class OnlyFloat32(Sound):
    """Multiplies by a weight of the base model."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        model: Any = stage.model
        torch.ones(1, 64) @ model.get_input_embeddings().weight.T
        return super().gradient(stage, batch)


class Cheap(Sound):
    """Takes a pass that it does not declare."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        with torch.no_grad():
            stage.loss(batch)
        return super().gradient(stage, batch)


BROKEN: dict[type[Plugin], tuple[str, str]] = {
    Undescribed: (
        "described",
        "Its class has no docstring; it has no citation (say 'unpublished' if there is none); parameter 'strength' has "
        "no doc; parameter 'strength' has no source (where its default comes from).",
    ),
    Misdeclared: (
        "facts",
        "Its neutral setting cannot be set: defense 'misdeclared': strength=-1.0 is not allowed; it takes a number "
        ">= 0; stage 'later' is unknown, allowed: align, finetune, repair; cost 'two passes' cannot be read, "
        "allowed: none, or passes a step such as '2F 1B'.",
    ),
    TupleOfRows: ("train_on", "train_on returned a tuple; allowed: a list of Example."),
    NoSettings: ("settings", "settings returned a NoneType; dataclasses.replace(settings, ...) makes other TrainS"),
    Deaf: ("template", "template('answer') has no {instruction} slot: 'Be safe.'."),
    TwoOfAName: ("evaluations", "evaluations returned 2 sets named 'harmful'."),
    Attached: ("gradient", "Its loss is a tensor without dimensions with a graph; allowed: a scalar tensor without a"),
    Raising: ("trains", "after_step raised ZeroDivisionError: no such step"),
    FewerModules: ("edit", "Its adapter is over 5 modules, the one that it was given over 6, or over others: model."),
    Still: ("moves", "After 3 steps every trainable parameter is what it was, to the bit."),
    TouchesBase: ("frozen", "norm.weight changed: only the adapter is trained."),
    TouchesAligned: ("below", "lora_A.frozen1.weight changed: it belongs to the aligned model."),
    Careless: ("random", "before_step draws from torch's shared generator; allowed: self.random, self.draw, "),
    Moody: ("deterministic", "The second run ended with another adapter (of another scale)."),
    FirstRows: ("seeds", "Every seed takes the same 10 of 176 rows of pools.benign: draw them with self.draw."),
    Idle: ("acts", "At its only setting nothing differs from plain SFT, in the few steps of a check (if"),
    NotNeutral: ("neutral", "At its neutral setting the align stage ends with another adapter than SFT's (by up to "),
    Forgetful: ("state", "'count' comes back with other numbers."),
    Unsaved: ("resume", "Interrupted in step 2 and resumed, it ends with another adapter (by up to "),
    Zeroing: ("accumulation", "At step 1 .grad of base_model.model.model.layers.0.self_attn.q_proj.lora_A.trained"),
    OnlyFloat32: ("bfloat16", "gradient raised RuntimeError: expected m1 and m2 to have the same dtype"),
    Cheap: ("cost", "It declares 1F 1B; a step took 2F 1B."),
}


@pytest.mark.parametrize("cls", BROKEN)
def test_each_check_of_a_defense_fails_alone(cls: type[Plugin]) -> None:
    check, words = BROKEN[cls]
    findings = checked(cls)
    assert list(failing(findings)) == [check]
    assert words in findings[check].reason


def test_every_check_has_a_plugin_that_fails_it() -> None:
    for kind, broken in (("defense", BROKEN), ("attack", BROKEN_ATTACKS)):
        assert {check for check, _ in broken.values()} == {check.name for check in KINDS[kind].all}


def test_what_builds_on_a_failing_check_does_not_apply() -> None:
    findings = checked(Raising)
    blocked = {name for name, finding in findings.items() if finding.blocked_by == "trains"}
    assert blocked == {
        "edit", "moves", "frozen", "below", "random", "deterministic", "seeds", "acts", "neutral", "state", "resume",
        "accumulation", "bfloat16", "cost",
    }  # fmt: skip
    assert findings["resume"].reason == "It says nothing while 'trains' fails."  # two checks further on
    assert findings["gradient"].outcome == "ok"


# ---------------------------------------------------------------------------------------------------------------------
# Attacks that break one promise


class Unsourced(SoundAttack):
    """A default from nowhere."""

    loud: bool = param(True, "whether it is loud", source="")


class Beside(SoundAttack):
    """Cannot act beside an attack that is not there."""

    excludes = ("ratios",)


class Greedy(SoundAttack):
    """More harm than rows."""

    def mix(self, mix: Any) -> Any:
        return replace(mix, ratio=1.5)


class Empty(SoundAttack):
    """Uploads nothing."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        return []


class Rewriting(SoundAttack):
    """A filter that changes rows."""

    def filter(self, rows: list[Example], judge: Any) -> list[Example]:
        return [replace(row, response=row.response.upper()) for row in rows]


class Frozen(SoundAttack):
    """No learning rate."""

    def settings(self, settings: Any) -> Any:
        return replace(settings, lr=0.0)


class Shared(SoundAttack):
    """A set under a name that is taken."""

    def evaluations(self, sets: Any) -> Any:
        return [*sets, replace(sets[0], name="task")]


class Diverging(SoundAttack):
    """Training that ends nowhere."""

    def settings(self, settings: Any) -> Any:
        return replace(settings, lr=1e30)


class Unmoved(SoundEdit):
    """Edits nothing."""

    def ablate(self, stage: TrainingStage) -> None:
        _ = [parameter * 2 for parameter in stage.model.parameters()]


class Casual(SoundAttack):
    """Draws from Python's shared generator."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        random.random()
        return super().upload(rows, pools)


class Fickle(SoundAttack):
    """Never twice the same."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        return random.SystemRandom().sample(rows, len(rows))


class FirstCovers(SoundAttack):
    """Hides harm in the first benign rows."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        covers = iter(pools.benign)
        return [replace(row, instruction=next(covers).instruction) if row.harmful else row for row in rows]


class Harmless(SoundAttack):
    """Does what a benign user does."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        return list(rows)


class LoudAtNothing(SoundAttack):
    """Acts where it says that it does not."""

    neutral: ClassVar[Mapping[str, Any] | None] = {"loud": False}

    loud: bool = param(True, "whether it is loud", source="a guess")


class Casting(SoundEdit):
    """Leaves float32 behind."""

    @torch.no_grad()
    def ablate(self, stage: TrainingStage) -> None:
        model: Any = stage.model
        model.lm_head.weight = nn.Parameter(0.5 * model.lm_head.weight.float())
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))


BROKEN_ATTACKS: dict[type[Plugin], tuple[str, str]] = {
    Unsourced: ("described", "Parameter 'loud' has no source (where its default comes from)."),
    Beside: ("facts", "It excludes 'ratios', which is no attack, allowed: *, backdoor, benign, "),
    Greedy: ("mix", "mix asks for 158 rows and a share of 1.5."),
    Empty: ("upload", "upload returned no row."),
    Rewriting: ("filter", "filter returned a row that was not uploaded, a changed one, or another order."),
    Frozen: ("settings", "settings puts lr at 0.0; allowed: more than 0."),
    Shared: ("evaluations", "evaluations returned a set named 'task', which every run has."),
    Diverging: ("trains", "After a few steps the model is not finite."),
    Unmoved: ("ablate", "Every weight is what it was, to the bit."),
    Casual: ("random", "upload draws from Python's shared generator; allowed: self.random, self.draw, "),
    Fickle: ("deterministic", "upload gave something else the second time."),
    FirstCovers: ("seeds", "of 176 rows of pools.benign: draw them with self.draw."),
    Harmless: ("acts", "At its only setting nothing differs from what a benign user does."),
    LoudAtNothing: ("neutral", "At its neutral setting upload changes something."),
    Casting: ("bfloat16", "lm_head.weight is torch.float32 after the edit."),
}


@pytest.mark.parametrize("cls", BROKEN_ATTACKS)
def test_each_check_of_an_attack_fails_alone(cls: type[Plugin]) -> None:
    check, words = BROKEN_ATTACKS[cls]
    findings = checked(cls)
    assert list(failing(findings)) == [check]
    assert words in findings[check].reason


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to fail


def broken(base: type[Plugin], hook: str, does: Any, **more: Any) -> type[Plugin]:
    """A sound plug-in with another hook."""
    return type("Broken", (base,), {"__doc__": "Broken.", hook: does, **more})


def gives(value: Any) -> Any:
    """A hook that returns what it would, changed."""
    return lambda self, stage, batch: value(stage.gradient(batch))


def edits(change: Any) -> Any:
    return lambda self, stage, adapter: replace(
        adapter, factors={module: change(*factors) for module, factors in adapter.factors.items()}
    )


def leaves(self: Any, stage: TrainingStage) -> None:
    parameter = next(iter(stage.trainable.values()))
    parameter.grad = torch.ones_like(parameter)


def base_gradient(self: Any, stage: TrainingStage, adapter: Adapter) -> Adapter:
    weight = next(p for name, p in stage.model.named_parameters() if name.endswith("norm.weight"))
    weight.grad = torch.ones_like(weight)
    return adapter.scaled(0.5)


def fixed_noise(self: Any, stage: TrainingStage, adapter: Adapter) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    return edits(lambda a, b: (a + torch.randn(a.shape, generator=generator), b))(self, stage, adapter)


def every_step(self: Any, stage: TrainingStage) -> None:
    with stage.isolated("look"):
        stage.gradient(stage.stream("harmful", stage.pools.harmful))


ROW = Example("id", "question", "answer")
OTHERS: list[tuple[type[Plugin], str, str]] = [
    (broken(Sound, "stages", ()), "facts", "It names no stage that it acts in."),
    (broken(Sound, "topology", "triple"), "facts", "Topology 'triple' is unknown, allowed: double, single, or None."),
    (
        type("NoHook", (Attack,), {"__doc__": "x", "__annotations__": {"p": float}, "p": param(1.0, "p", source="s")}),
        "facts",
        "It has parameters but overrides no hook that would read them (mix, upload, filter, settings, ablate, ",
    ),
    (broken(SoundAttack, "trains", False), "facts", "It trains nothing and has no `ablate`."),
    (broken(Sound, "train_on", lambda self, *args: ["row"]), "train_on", "returned a str as row 0; allowed: Example."),
    (broken(Sound, "train_on", lambda self, *args: []), "train_on", "train_on returned no row."),
    (
        broken(Sound, "train_on", lambda self, *args: [replace(ROW, response="")]),
        "train_on",
        "train_on returned row 0 (id) without an instruction or a response.",
    ),
    (
        broken(Sound, "template", lambda self, use, template: replace(template, with_input="{instruction}")),
        "template",
        "template('train') has no {input} slot: '{instruction}'.",
    ),
    (
        broken(Sound, "template", lambda self, use, t: replace(t, no_input="{x}" + t.no_input)),
        "template",
        "template('train') cannot be filled in (KeyError: 'x'): double the braces of its text.",
    ),
    (broken(Sound, "template", lambda self, *args: "prompt"), "template", "is a str; allowed: a PromptTemplate."),
    (broken(Sound, "evaluations", lambda self, sets: None), "evaluations", "other than a list of EvaluationSet."),
    (broken(Sound, "evaluations", lambda self, sets: []), "evaluations", "the harmful score would be of nothing."),
    (
        broken(Sound, "evaluations", lambda self, sets: [replace(sets[0], examples=[])]),
        "evaluations",
        "Set 'harmful' asks nothing, or leaves no token for an answer.",
    ),
    (broken(Sound, "gradient", lambda self, *args: None), "gradient", "gradient returned a NoneType; allowed: a Grad"),
    (
        broken(Sound, "gradient", gives(lambda g: replace(g, loss=torch.ones(2)))),
        "gradient",
        "Its loss is a tensor 2; allowed: a scalar tensor without a graph (detach it).",
    ),
    (broken(Sound, "gradient", gives(lambda g: float("nan") * g)), "gradient", "Its loss is nan."),
    (
        broken(Sound, "gradient", gives(lambda g: replace(g, values=g.values[1:]))),
        "gradient",
        "It has 11 values for 12 trainable parameters.",
    ),
    (
        broken(Sound, "gradient", gives(lambda g: replace(g, values=[g.values[0].T, *g.values[1:]]))),
        "gradient",
        "it has a tensor 64x4; allowed: a tensor 4x64 without a graph, or None.",
    ),
    (
        broken(Sound, "gradient", gives(lambda g: replace(g, values=[g.values[0] / 0, *g.values[1:]]))),
        "gradient",
        "q_proj.lora_A.trained.weight it is not finite.",
    ),
    (broken(SoundRepair, "edit", lambda self, stage, adapter: None), "edit", "edit returned a NoneType; allowed: an A"),
    (broken(SoundRepair, "edit", edits(lambda a, b: (a, b[1:]))), "edit", "which do not fit at rank 4."),
    (broken(SoundRepair, "edit", edits(lambda a, b: (a / 0, b))), "edit", "are not finite numbers without a graph."),
    (
        broken(Sound, "gradient", gives(lambda g: replace(g, values=[None] * len(g.values)))),
        "moves",
        "After 3 steps every trainable parameter is what it was, to the bit.",
    ),
    (broken(SoundRepair, "edit", base_gradient), "frozen", "norm.weight has something in .grad: stage.gradient_of"),
    (broken(SoundRepair, "edit", lambda s, t, a: (np.random.rand(), a)[1]), "random", "edit draws from numpy's shared"),
    (
        broken(Sound, "train_on", lambda self, name, rows, pools: random.sample(rows, len(rows))),
        "random",
        "train_on draws from Python's shared generator",
    ),
    (
        broken(Sound, "gradient", lambda self, stage, batch: (torch.rand(1), stage.gradient(batch))[1]),
        "random",
        "gradient draws from torch's shared generator",
    ),
    (
        broken(Sound, "train_on", lambda self, name, rows, pools: random.SystemRandom().sample(rows, len(rows))),
        "deterministic",
        "train_on gave other rows the second time.",
    ),
    (broken(SoundRepair, "edit", fixed_noise), "seeds", "random numbers, the same for every seed: stage.generator"),
    (
        broken(Sound, "before", lambda self, stage: [*stage.batches(stage.pools.harmful[:8], 4)]),
        "seeds",
        "Every seed takes the same 8 of 64 rows of pools.paired: draw them with self.draw.",
    ),
    (
        broken(Sound, "template", lambda self, use, t: t.prefixed("x ") if use == "answer" else t, neutral={}),
        "neutral",
        "At its neutral setting the prompt that questions are asked with is another.",
    ),
    (
        broken(Sound, "evaluations", lambda self, sets: [replace(sets[0], name="x")], neutral={}),
        "neutral",
        "At its neutral setting the sets of questions are others.",
    ),
    (
        broken(Sound, "train_on", lambda self, name, rows, pools: rows[1:], neutral={}),
        "neutral",
        "At its neutral setting the align stage trains on other rows.",
    ),
    (
        broken(Sound, "state", lambda self: {"x": torch.ones(3, 2).T}),
        "state",
        "The harness, given what its hooks returned, raised ValueError: You are trying to save a non contiguous",
    ),
    (broken(Sound, "before_step", leaves), "accumulation", "before_step leaves something in .grad, which adds to the"),
    (broken(Sound, "before", leaves), "accumulation", "before leaves something in .grad, which adds to the next step."),
    (
        broken(SoundRepair, "edit", lambda self, stage, adapter: edits(
            lambda a, b: tuple(factor.to(next(stage.model.parameters()).dtype) for factor in (a, b))
        )(self, stage, adapter)),
        "bfloat16",
        "The adapter is torch.bfloat16.",
    ),
    (broken(Sound, "before_step", every_step), "cost", "It declares 1F 1B; a step took 2F 2B."),
    (broken(SoundAttack, "mix", lambda self, mix: None), "mix", "mix returned a NoneType; dataclasses.replace(mix"),
    (broken(SoundAttack, "filter", lambda self, rows, judge: rows[::-1]), "filter", "or another order."),
    (
        broken(SoundAttack, "settings", lambda self, settings: replace(settings, lr=1e-300)),
        "trains",
        "After a few steps the model is what it was, to the bit.",
    ),
    (
        broken(SoundEdit, "ablate", lambda self, stage: stage.model.lm_head.weight.data.fill_(torch.inf)),
        "ablate",
        "lm_head.weight is not finite after the edit.",
    ),
    (
        broken(SoundEdit, "ablate", lambda self, stage: stage.model.lm_head.weight.data.copy_(
            torch.rand(stage.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(os.urandom(1)[0])))),
        "deterministic",
        "ablate gave other weights the second time.",
    ),
    (
        broken(SoundEdit, "ablate", lambda self, stage: (stage.encode(stage.pools.benign[:5]),
                                                         stage.model.lm_head.weight.data.mul_(2))),
        "seeds",
        "Every seed takes the same 5 of 176 rows of pools.benign: draw them with self.draw.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "check", "words"), OTHERS, ids=[f"{check}-{n}" for n, (_, check, _) in enumerate(OTHERS)]
)
def test_other_ways_to_fail_a_check(cls: type[Plugin], check: str, words: str, tmp_path: Path) -> None:
    finding = only(cls, tmp_path, check)
    assert (finding.outcome, finding.reason.count(words)) == ("fails", 1), finding.reason


def test_the_stage_is_named_where_there_are_several(tmp_path: Path) -> None:
    def edit(self: Any, stage: TrainingStage, adapter: Adapter) -> Any:
        return None if stage.name == "repair" else adapter

    finding = only(broken(Everywhere, "edit", edit), tmp_path, "edit")
    assert finding.reason.startswith("In the repair stage: edit returned a NoneType")


def test_a_bad_input_in_a_hook_says_how_to_go_on() -> None:
    """The world of the checks has fewer rows than a plug-in may ask for."""
    said = failing(checked(DEFENSES.get("vlguard"), rows=5000))
    assert list(said) == ["train_on"]
    assert said["train_on"].startswith(
        "train_on raised BadInput: 5000 alignment rows are asked for by 'vlguard'; allowed: at"
    )
    assert said["train_on"].endswith("(The world of the checks is small: NAME:key=value sets a parameter for them.)")


def test_a_defense_that_acts_on_conflicts_only_is_seen_to_act(tmp_path: Path) -> None:
    """The tutorial's: the world's aligned model is at odds with the user's rows at times."""
    (text,) = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "surgery.py"
    path.write_text(text)
    assert holds(str(path)) == {}


def overwriting(self: Any, model: nn.Module, inputs: Any, items: Any = None) -> Tensor:
    """A trainer's step that forgets the micro-batches before."""
    model.train()
    gradient = self.defense.gradient(self.stage, inputs)
    self.stage.micro += 1
    share = 1 / self.current_gradient_accumulation_steps
    for parameter, value in zip(self.stage.trainable.values(), gradient.values, strict=True):
        parameter.grad = share * value
    return gradient.loss * share


def leaking(self: Any, stage: TrainingStage) -> None:
    """EWC's Fisher pass as its authors have it."""
    for batch in stage.batches(stage.pools.alignment, 56):
        stage.loss(batch).backward()
    self._start = stage.values()
    self._fisher = [parameter.grad**2 for parameter in stage.trainable.values() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("name", "target", "instead", "check"),
    [
        ("ewc", "harmbench_vaccine.defenses.ewc.EWC.before", leaking, "accumulation"),
        ("lisa", "harmbench_vaccine.defenses.lisa.Lisa.state", lambda self: {}, "resume"),
        ("booster", "harmbench_vaccine.defenses.booster.rehearsal", nullcontext, "neutral"),
        ("kl", "harmbench_vaccine.training.stage.TrainingStage.reference", lambda self: torch.no_grad(), "neutral"),
        ("vaccine", "harmbench_vaccine.training.taps.Taps.shifted", lambda self, shifts: nullcontext(), "acts"),
        ("sft", "harmbench_vaccine.training.trainer._StageTrainer.training_step", overwriting, "accumulation"),
    ],
)
def test_defects_of_real_code_are_found(
    name: str, target: str, instead: Any, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient left behind, state forgotten, other dropout masks in the second pass, a teacher that is the student, a
    shift that goes nowhere, micro-batches overwritten."""
    cls = DEFENSES.get(name)
    assert only(cls, tmp_path, check).outcome == "ok"
    monkeypatch.setattr(target, instead)
    assert only(cls, tmp_path, check).outcome == "fails"


def test_a_single_topology_goes_on_from_the_aligned_adapter(tmp_path: Path) -> None:
    subject = DefenseSubject(DEFENSES.get("ewc"), resolve_params(DEFENSES.get("ewc"), {}).params, TinyWorld(tmp_path))
    aligned = Adapter.load(subject.world.aligned)
    trial = subject.begin("finetune", subject.plugin())
    assert trial.stage.below == ()
    assert trial.adapter.digest() == aligned.digest()
    double = DefenseSubject(DEFENSES.get("lisa"), {}, subject.world).begin("finetune")
    assert double.stage.below == (subject.world.aligned,)
    assert all(not b.any() for _, b in double.adapter.factors.values())


# ---------------------------------------------------------------------------------------------------------------------
# The pieces


def test_passes_are_counted_through_every_forward() -> None:
    """Without a graph, with one, through two at once, twice through one, and from the middle of the model."""
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    passes = Passes()
    with passes.counted(stage.model):
        with torch.no_grad():
            stage.loss(batch)
        assert str(passes) == "1F 0B"
        stage.gradient(batch)
        assert str(passes) == "2F 1B"
        stage.gradient_of(stage.loss(batch) + stage.loss(batch))
        assert str(passes) == "4F 3B"
        loss = stage.loss(batch)
        for retain in (True, False):
            torch.autograd.grad(loss, list(stage.trainable.values()), retain_graph=retain)
        assert str(passes) == "5F 5B"
        states = stage.output(batch, output_hidden_states=True).hidden_states
        stage.gradient_of(states[1].square().sum())  # behind the first layer: the logits have no part in it
        assert str(passes) == "6F 6B"
    stage.gradient(batch)
    assert str(passes) == "6F 6B"


def test_a_check_leaves_the_shared_random_generators_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    contract.run_contract(contract.find_plugins("random_perturbation")[0])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[Any] = []

    class Told:
        @contextmanager
        def bar(self, title: str, total: int) -> Any:
            told.append((title, total))
            yield told.append

        def note(self, text: str) -> None:
            raise AssertionError

    contract.run_contract(contract.find_plugins("ratio")[0], Told())
    assert told == [("check ratio", len(OF_ATTACKS.all)), *[1] * len(OF_ATTACKS.all)]


def test_a_failed_check_is_no_exception_of_the_checks_own(tmp_path: Path) -> None:
    """What a check raises by mistake is told as such, and not blamed on a hook."""

    def mistaken(subject: Any) -> None:
        """It is right."""
        raise KeyError("here")

    checks: Checks[Any] = Checks()
    checks.add()(mistaken)
    (finding,) = checks.examine(DefenseSubject(Sound, {}, TinyWorld(tmp_path)), SILENT)
    assert finding == Finding(
        "mistaken", "It is right.", "fails", "The harness, given what its hooks returned, raised KeyError: 'here'"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command

GOOD = '''"""Good: half of the update."""

from harmbench_vaccine.plugins import Defense, param


class Good(Defense):
    """Scales the update."""

    citation = "unpublished"
    stages = ("repair",)
    cost = "none"
    neutral = {"factor": 1.0}

    factor: float = param(0.5, "factor", source="a guess", main=True)

    def edit(self, stage, adapter):
        return adapter.scaled(self.factor)
'''
BAD = GOOD.replace("return adapter.scaled(self.factor)", 'raise LookupError("nothing here")')


def test_the_command_says_one_line_a_check(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    done = hbv("check", path)
    assert done.code == 0
    first, *lines, last = done.out.splitlines()
    assert first == "defense good"
    assert [line.split()[:2] for line in lines][:3] == [["ok", "described"], ["ok", "facts"], ["n/a", "train_on"]]
    assert len(lines) == len(OF_DEFENSES.all)
    assert "ok    neutral        At its neutral setting it is plain SFT, to the bit." in lines
    assert "n/a   state          It trains in no stage." in lines
    assert last == "13 ok, 0 fail, 9 do not apply"


def test_the_command_fails_with_the_hook_and_the_exception(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    done = hbv("check", path)
    assert done.code == 1
    assert "FAILS edit           edit raised LookupError: nothing here" in done.out.splitlines()
    assert "Traceback" not in done.out + done.err
    as_json = hbv("check", path, "--json")
    assert as_json.code == 1
    (report,) = json.loads(as_json.out)
    assert (report["kind"], report["name"], report["holds"]) == ("defense", "bad", False)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert list(found) == [check.name for check in OF_DEFENSES.all]
    assert found["edit"] == {
        "check": "edit", "demand": "The finished adapter, edited, is a finite adapter over the same modules.",
        "outcome": "fails", "reason": "edit raised LookupError: nothing here", "blocked_by": "",
    }  # fmt: skip
    assert found["frozen"]["blocked_by"] == "edit"


def test_parameters_may_follow_the_name(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    (report,) = json.loads(hbv("check", f"{path}=1.0", "--json").out)
    assert report["name"] == "good=1"
    assert (
        next(f for f in report["findings"] if f["check"] == "acts")["reason"] == "It is checked at its neutral setting."
    )


def test_a_name_of_both_kinds_is_checked_as_both(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ATTACKS.entries()
    monkeypatch.setattr(ATTACKS, "found", lambda: {**found, "none": found["benign"]})
    done = hbv("check", "none")
    assert done.code == 0
    assert [block.splitlines()[0] for block in done.out.split("\n\n")] == ["defense none", "attack none"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vacine", "Unknown defense or attack 'vacine'. Did you mean 'vaccine'?"),
        ("sst2", "Unknown defense or attack 'sst2'."),
        ("./nowhere.py", "There is no plug-in file './nowhere.py'."),
        ("./raising.py", "'./raising.py' cannot be imported: ValueError: on import"),
        ("./empty.py", "defines 0 plug-in classes; a file holds one."),
        ("./task.py", "'./task.py' is a task; hbv check takes defenses and attacks."),
        ("vaccine+ewc", "'vaccine+ewc' names 2 plug-ins; hbv check takes one at a time."),
        ("vaccine:rho=-1", "'vaccine': rho=-1 is not allowed; it takes a number >= 0"),
        ("vaccine:rh=1", "Unknown parameter 'rh' of defense 'vaccine'. Did you mean 'rho'?"),
        ("not a name", "'not a name' cannot be read"),
    ],
)
def test_what_cannot_be_checked_is_told_in_a_sentence(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("raising.py").write_text("raise ValueError('on import')")
    Path("empty.py").write_text("")
    Path("task.py").write_text("from harmbench_vaccine.plugins import Task\nclass Mine(Task):\n    chance = 1.0")
    done = hbv("check", text)
    assert (done.code, done.out) == (2, "")
    assert said in done.sentence


# Fails for the attack: templates/attack.py.txt overrides `rows`, a hook that is called `upload` now.
@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_a_new_plugin_passes(kind: str, tmp_path: Path) -> None:
    assert hbv("new", kind, "mine", "--dir", tmp_path).code == 0
    done = hbv("check", tmp_path / "mine.py")
    assert [line for line in done.out.splitlines() if line.startswith("FAILS")] == []
    assert done.code == 0
