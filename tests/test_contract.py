"""`hbv check`: sound plug-ins pass, and for every check there is a plug-in that fails only this check."""

from __future__ import annotations

import gc
import itertools
import json
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
from harmbench_vaccine.inference.answer_models import AnswerModels
from harmbench_vaccine.plugins import (
    Attack,
    Defense,
    Plugin,
    SeparateTraining,
    StageName,
    contract,
    param,
    resolve_params,
)
from harmbench_vaccine.plugins.contract.attack_checks import ATTACK_CHECKS
from harmbench_vaccine.plugins.contract.attack_subject import AttackSubject
from harmbench_vaccine.plugins.contract.defense_hooks import HOOK_CHECKS
from harmbench_vaccine.plugins.contract.defense_outcomes import OUTCOME_CHECKS
from harmbench_vaccine.plugins.contract.defense_subject import DefenseSubject
from harmbench_vaccine.plugins.contract.findings import Checks, Finding
from harmbench_vaccine.plugins.contract.generation import GENERATION_CHECKS
from harmbench_vaccine.plugins.contract.observation import PassCounter
from harmbench_vaccine.plugins.contract.trials import aligned_path
from harmbench_vaccine.plugins.contract.world import TinyWorld
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from support import tiny
from support.cli import hbv

gc.freeze()  # as in tiny, with the modules imported since

DEFENSE_CHECKS: Checks[Any] = Checks([*HOOK_CHECKS.all, *GENERATION_CHECKS.all, *OUTCOME_CHECKS.all])
TUTORIAL = Path(__file__).parents[1] / "docs" / "your-own-defense.md"
KINDS: dict[str, Checks[Any]] = {"defense": DEFENSE_CHECKS, "attack": ATTACK_CHECKS}
CALLS = itertools.count(1)  # for hooks whose result must differ on every call; random bytes may be equal


def findings_of(cls: type[Plugin], **params: Any) -> dict[str, Finding]:
    """Return every finding of a class, by the name of the check."""
    cls.name = vars(cls).get("name") or cls.__name__.lower()
    return {finding.check: finding for finding in contract.run_contract(resolve_params(cls, params)).findings}


def finding_of(cls: type[Plugin], folder: Path, check: str) -> Finding:
    """Run one check without the checks that it depends on."""
    cls.name = vars(cls).get("name") or cls.__name__.lower()
    subject_class: Any = DefenseSubject if issubclass(cls, Defense) else AttackSubject
    subject = subject_class(cls, resolve_params(cls, {}).params, TinyWorld(folder))
    independent = [replace(item, after=()) for item in KINDS[cls.kind].all if item.name == check]
    (finding,) = Checks(independent).examine(subject, SILENT)
    return finding


def failing(findings: Mapping[str, Finding]) -> dict[str, str]:
    """Return the failing checks with their reasons."""
    return {name: finding.reason for name, finding in findings.items() if finding.outcome == "fails"}


# ---------------------------------------------------------------------------------------------------------------------
# Built-in plug-ins


def failures_of(spec: str) -> dict[str, str]:
    """Return the failing checks of a built-in, in both of its kinds."""
    return {
        f"{report.kind}/{check}": reason
        for report in map(contract.run_contract, contract.find_plugins(spec))
        for check, reason in failing({finding.check: finding for finding in report.findings}).items()
    }


REPRESENTATIVE = (
    "sft",  # no hook
    "none",  # skips a stage
    "vaccine",  # two passes
    "ewc",  # state, single topology
    "realign",  # a nested training run
    "random_perturbation",  # draws in the repair stage
    "ratio",  # a mix
    "backdoor",  # rows and questions
    "refusal_ablation:prompts=8,held_out=4,positions=2",  # weights
)
VARIANTS = (
    "vaccine:tau=2",
    "tvaccine:gamma=1,interval=1,refresh=2",
    "lisa:k1=1,k2=1",
    "ewc:fisher=sample,lam=1",
    "ldifs:variant=git-disl,alpha=1e-4",
    "vlguard:mix=replace,rows=10",
    "vlguard:mix=joint,rows=10",
    "antidote:scope=model",
    "safe_lora:tau=0.5",
    "safe_lora:projector=exact,k=2",
    "optimizer:lr=1e-3,batch=2,rank=8",
    "optimizer:full=true",
    "ratio=0",
    "backdoor:position=prefix",
)
AT = {
    "sppft": "sppft:below=17",  # the model of the checks has two layers, of which the default freezes none
    "deep_augmentation": "deep_augmentation:triples=20",  # the checks have 64 pairs
    "tar": "tar:inner=2,every=1",  # fewer passes
}
"""Plug-ins that are checked at other parameters than their defaults."""
OTHERS = [
    AT.get(spec, spec) for spec in (*DEFENSES.entries(), *ATTACKS.entries(), *VARIANTS) if spec not in REPRESENTATIVE
]


@pytest.mark.parametrize("spec", REPRESENTATIVE)
def test_representative_plugins_keep_the_contract(spec: str) -> None:
    assert failures_of(spec) == {}


@pytest.mark.slow
@pytest.mark.parametrize("spec", OTHERS)
def test_every_other_built_in_keeps_the_contract(spec: str) -> None:
    assert failures_of(spec) == {}


def test_reasons_of_checks_that_do_not_apply() -> None:
    """For plain SFT, which overrides nothing."""
    findings = findings_of(DEFENSES.get("sft"))
    reasons = {name: finding.reason for name, finding in findings.items() if finding.outcome == "n/a"}
    assert reasons == {
        "below": "The alignment stage has no adapter below the trained one.",
        "generation": "It does not act while an answer is generated.",
        "seeds": "It draws nothing, or too little to compare two seeds.",
        "acts": "It overrides no hook: it is plain SFT, or skips the stage.",
        "neutral": "It declares no neutral setting.",
        "state": "It has no state between steps.",
        "separate": "It requests no training inside a stage.",
    }


def test_checks_depend_on_earlier_checks_and_have_a_demand() -> None:
    for checks in KINDS.values():
        earlier: set[str] = set()
        for check in checks.all:
            assert set(check.after) <= earlier, check.name
            assert check.demand.endswith("."), check.name
            assert check.name not in earlier
            earlier.add(check.name)


def test_lines_of_a_report_are_wrapped_for_a_terminal() -> None:
    findings = [
        Finding("neutral", "It is plain SFT.", "fails", "word " * 30 + "end."),
        Finding("gradient", "A short requirement.", "ok", ""),
    ]
    report = contract.ContractReport("defense", "mine", findings)
    wrapped = report.lines(80)
    assert [" ".join(line.split()) for line in wrapped] == [" ".join(line.split()) for line in report.lines()]
    assert len(report.lines()[1]) > 80
    texts = "\n".join(wrapped).splitlines()
    assert all(len(text) <= 80 for text in texts)
    assert [text[:21].strip() for text in texts] == [
        "defense mine",
        "FAILS neutral",
        "",
        "",
        "ok    gradient",
        texts[-1][:21].strip(),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Sound plug-ins to break


class Sound(Defense):
    """Trains with a penalty on the weights."""

    citation: ClassVar[str] = "unpublished"

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        gradient = stage.gradient(batch)
        return gradient + 0.1 * Gradient(gradient.loss, stage.values())


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
    """Acts in every stage: has state, draws rows and numbers, trains separately."""

    citation: ClassVar[str] = "unpublished"
    stages = ("align", "finetune", "repair")
    neutral: ClassVar[Mapping[str, Any] | None] = {"size": 0.0, "rows": 0}

    size: float = param(0.01, "size of the noise", source="a guess", ge=0)
    rows: int = param(10, "rows to add", source="a guess", ge=0)

    _sum: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(1))

    def train_on(self, stage: Any, rows: list[Example], pools: Any) -> list[Example]:
        return [*rows, *self.draw("benign rows", pools.benign, self.rows)]

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        gradient, generator = stage.gradient(batch), stage.generator("noise")
        noise = [torch.randn(value.shape, generator=generator) for value in gradient.values if value is not None]
        return gradient + self.size * (1 + float(self._sum)) * Gradient(gradient.loss, noise)

    def after_step(self, stage: TrainingStage) -> None:
        self._sum = self._sum + 1

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        if stage.name != "repair" or not self.rows:
            return adapter
        return stage.train_separately("again", self.draw("benign rows", stage.pools.benign, self.rows), start=adapter)

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        return (SeparateTraining("again", self.rows, start=True),) if stage == "repair" and self.rows else ()

    def first_tokens(self, models: AnswerModels, prompts: list[list[int]]) -> list[list[int]]:
        return [[5]] * len(prompts) if self.rows else [[] for _ in prompts]

    def steering(self, stage: TrainingStage) -> dict[int, Tensor]:
        return {0: torch.full((stage.stack.base.config.hidden_size,), self.size)}

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._sum = state["sum"]


class SoundAnswers(Defense):
    """Starts every answer with the most likely token of the aligned model, and shifts the first layer."""

    citation: ClassVar[str] = "unpublished"
    stages = ()
    cost = "none"

    def first_tokens(self, models: AnswerModels, prompts: list[list[int]]) -> list[list[int]]:
        return [[token] for token in models.probabilities("aligned", prompts).argmax(1).tolist()]

    def steering(self, stage: TrainingStage) -> dict[int, Tensor]:
        return {0: torch.ones(stage.stack.base.config.hidden_size)}


class SoundStress(Attack):
    """Shrinks the LM head of the finished model."""

    citation: ClassVar[str] = "unpublished"

    @torch.no_grad()
    def stress(self, model: Any) -> None:
        model.lm_head.weight.mul_(0.5)


def test_sound_plugins_pass() -> None:
    for cls in (Sound, SoundRepair, SoundAnswers, SoundAttack, SoundEdit, SoundStress):
        assert failing(findings_of(cls)) == {}, cls.__name__


def test_defense_of_all_stages_is_checked_in_all_stages() -> None:
    findings = findings_of(Everywhere)
    assert {name: finding.outcome for name, finding in findings.items()} == dict.fromkeys(findings, "ok")


# ---------------------------------------------------------------------------------------------------------------------
# Defenses that break one requirement


class Undescribed(Sound):
    citation: ClassVar[str] = ""

    strength: float = param(1.0, "", source="", ge=0)


class Misdeclared(Sound):
    """Declares invalid facts."""

    cost = "two passes"
    neutral: ClassVar[Mapping[str, Any] | None] = {"strength": -1.0}

    strength: float = param(1.0, "strength", source="a guess", ge=0)


class TupleOfRows(Sound):
    """Returns rows of another type."""

    def train_on(self, stage: Any, rows: Any, pools: Any) -> Any:
        return tuple(rows)


class NoSettings(SoundRepair):
    """Forgets to return."""

    def settings(self, stage: Any, settings: Any) -> Any:
        replace(settings, lr=1e-3)


class LostQuestion(SoundRepair):
    """Loses the question."""

    def template(self, use: Any, template: PromptTemplate) -> PromptTemplate:
        return PromptTemplate("Be safe.", "Be safe. {instruction} {input}") if use == "answer" else template


class DuplicateSet(SoundRepair):
    """Gives two sets one name."""

    def evaluations(self, sets: Any) -> Any:
        return [*sets, replace(sets[0], max_new_tokens=3)]


class Attached(Sound):
    """Returns a loss with its graph."""

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


class Unrepeatable(SoundRepair):
    """Gives a different result every time."""

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        return adapter.scaled(float(next(CALLS)))


class FirstRows(Sound):
    """Takes the first rows of a pool."""

    def train_on(self, stage: Any, rows: list[Example], pools: Any) -> list[Example]:
        return [*rows, *pools.benign[:10]]


class Idle(Sound):
    """Computes a correction and forgets to return it."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        gradient = stage.gradient(batch)
        _ = gradient + 0.1 * Gradient(gradient.loss, stage.values())
        return gradient


class NotNeutral(Sound):
    """Is not SFT at its neutral setting."""

    neutral: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}

    strength: float = param(1.0, "strength", source="a guess", ge=0)


class Forgetful(Sound):
    """Does not restore its state."""

    _count: int = 0

    def after_step(self, stage: TrainingStage) -> None:
        self._count += 1

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self._count)}


class Unsaved(Sound):
    """Does not save its state."""

    _count: int = 0

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        return (1 + self._count) * super().gradient(stage, batch)

    def after_step(self, stage: TrainingStage) -> None:
        self._count += 1


class Unprepared(Sound):
    """Keeps the initial parameters, but not in a checkpoint."""

    _start: list[Tensor] = PrivateAttr(default_factory=list)

    def before(self, stage: TrainingStage) -> None:
        self._start = stage.values()


class Zeroing(Sound):
    """Discards the earlier micro-batches."""

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
    """Runs a pass that it does not declare."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        with torch.no_grad():
            stage.loss(batch)
        return super().gradient(stage, batch)


class Secret(SoundRepair):
    """Requests a training that it does not declare."""

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        return stage.train_separately("more", stage.pools.alignment, start=adapter, steps=2)


class UnknownToken(SoundAnswers):
    """Chooses a token that the vocabulary does not have."""

    def first_tokens(self, models: AnswerModels, prompts: list[list[int]]) -> list[list[int]]:
        return [[96] for _ in prompts]


BROKEN: dict[type[Plugin], tuple[str, str]] = {
    Undescribed: (
        "described",
        "Its class has no docstring; it has no citation (write 'unpublished' if it has none); parameter 'strength' has "
        "no description: declare it with param(DEFAULT, DESCRIPTION, source=...); parameter 'strength' has no source "
        "(where its default comes from).",
    ),
    Misdeclared: (
        "facts",
        "Its neutral setting is not valid: defense 'misdeclared': strength=-1.0 is not allowed; allowed: a number "
        ">= 0; cost 'two passes' is not valid, allowed: none, or the passes of a step such as '2F 1B'.",
    ),
    TupleOfRows: ("train_on", "train_on returned a tuple; allowed: a list of Example."),
    NoSettings: ("settings", "settings returned a NoneType; allowed: TrainSettings, for example dataclasses.replace"),
    LostQuestion: ("template", "template('answer') has no {instruction} slot: 'Be safe.'."),
    DuplicateSet: ("evaluations", "evaluations returned 2 sets named 'harmful'."),
    Attached: ("gradient", "Its loss is a tensor without dimensions with a graph; allowed: a scalar tensor without a"),
    Raising: ("trains", "after_step raised ZeroDivisionError: no such step"),
    UnknownToken: ("generation", "first_tokens returned the token 96; allowed: 0 to 95."),
    FewerModules: ("edit", "Its adapter covers 5 modules instead of 6, or other modules: model."),
    Still: ("moves", "After 3 steps every trainable parameter is unchanged, to the bit."),
    TouchesBase: ("frozen", "norm.weight changed: only the adapter is trained."),
    TouchesAligned: ("below", "lora_A.frozen1.weight changed: it is part of the aligned model."),
    Careless: ("random", "before_step draws from torch's shared generator; allowed: self.random, self.draw, "),
    Unrepeatable: ("deterministic", "The second run ended with a different adapter (of a different scale)."),
    FirstRows: ("seeds", "Every seed takes the same 10 of 176 rows of pools.benign: draw them with self.draw."),
    Idle: ("acts", "At its only setting nothing differs from plain SFT, in the few steps of a check (if"),
    NotNeutral: ("neutral", "At its neutral setting the align stage ends with a different adapter than SFT (by up to "),
    Unprepared: (
        "state",
        "Attribute _start changes in before() and is not in state(): a resumed run differs, because before() does not ",
    ),
    Forgetful: ("state", "The restored state has different numbers in 'count'."),
    Unsaved: ("resume", "): attribute _count changes in the steps and is not in state()."),
    Zeroing: ("accumulation", "At step 1 .grad of base_model.model.model.layers.0.self_attn.q_proj.lora_A.trained"),
    OnlyFloat32: ("bfloat16", "gradient raised RuntimeError: expected m1 and m2 to have the same dtype"),
    Cheap: ("cost", "It declares 1F 1B; a step took 2F 1B."),
    Secret: (
        "separate",
        "separate_trainings declares none; the stage requested 'more' (alignment rows, 2 steps, from an adapter).",
    ),
}


STATES: list[tuple[Any, Any, str]] = [  # created in `before`, and after `restore`
    (torch.ones(3), torch.ones(3), ""),
    (torch.ones(3), torch.ones(2), "differs"),
    ([torch.ones(2), None], [torch.ones(2), None], ""),
    ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, "differs"),
    ({"a": 1.0}, {"b": 1.0}, "differs"),
    (3, torch.tensor([3.0]), ""),  # a number that comes back as a tensor
    (0.1, torch.tensor(0.1), ""),  # as float32
    (0.1, 0.2, "differs"),
    (np.ones(2), torch.ones(2), ""),
    ({1, 2}, {2, 1}, ""),
    ("text", "other", "differs"),
    (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2), "differs"),
    (random.Random(1), random.Random(1), ""),
    (nn.Linear(2, 2), None, "differs"),
    (Example("id", "question"), Example("other", "question"), "differs"),
    (object(), object(), ""),  # nothing to compare
]


@pytest.mark.parametrize(("before", "restored", "outcome"), STATES)
def test_values_of_before_that_do_not_come_back_are_found(
    before: Any, restored: Any, outcome: str, tmp_path: Path
) -> None:
    class Remembering(Sound):
        """Sets an attribute that no default declares."""

        def before(self, stage: TrainingStage) -> None:
            self._kept = before

        def restore(self, state: dict[str, Tensor]) -> None:
            self._kept = restored

    finding = finding_of(Remembering, tmp_path, "state")
    lost = "Attribute _kept changes in before() and is not in state(): a resumed run differs, because before() does"
    assert (finding.outcome, finding.reason.startswith(lost)) == (("fails", True) if outcome else ("n/a", False))


def test_attributes_that_change_in_steps_are_named_where_no_state_is_stored(tmp_path: Path) -> None:
    class Scratch(Sound):
        """Stores a value of each step that no other step reads."""

        def before_step(self, stage: TrainingStage) -> None:
            self._scratch = stage.step

    assert (
        finding_of(Scratch, tmp_path, "state").reason
        == "state() is empty; _scratch changes in the steps: see 'resume'."
    )
    assert finding_of(Scratch, tmp_path, "resume").outcome == "ok"


REQUESTED = (SeparateTraining("more", "harmful", 2, on_base=True), SeparateTraining("drawn", 3, start=True))


@pytest.mark.parametrize(
    ("declared", "outcome"),
    [
        (REQUESTED, "ok"),
        ((REQUESTED[0], replace(REQUESTED[1], rows=None, steps=2)), "fails"),  # it has the epochs of the stage
        ((REQUESTED[0],), "fails"),
        ((*REQUESTED, REQUESTED[0]), "fails"),
        (REQUESTED[::-1], "fails"),
        *(
            ((replace(REQUESTED[0], **change), REQUESTED[1]), "fails")
            for change in (
                {"purpose": "other"},
                {"rows": "alignment"},
                {"rows": 3},
                {"steps": None},
                {"steps": 3},
                {"start": True},
                {"on_base": False},
            )
        ),
        ((replace(REQUESTED[0], rows=None), REQUESTED[1]), "ok"),
        ((replace(REQUESTED[0], rows=64), REQUESTED[1]), "ok"),  # the pool has 64 pairs
        ((REQUESTED[0], replace(REQUESTED[1], rows=4)), "fails"),
    ],
)
def test_declared_trainings_are_compared_with_the_requests(
    declared: tuple[SeparateTraining, ...], outcome: str, tmp_path: Path
) -> None:
    class Two(SoundRepair):
        """Requests two trainings."""

        def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
            return declared

        def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
            stage.train_separately("more", stage.pools.harmful, steps=2, on_base=True)
            return stage.train_separately("drawn", stage.pools.benign[:3], start=adapter)

    assert finding_of(Two, tmp_path, "separate").outcome == outcome


@pytest.mark.parametrize("cls", BROKEN)
def test_only_the_broken_check_of_a_defense_fails(cls: type[Plugin]) -> None:
    check, text = BROKEN[cls]
    findings = findings_of(cls)
    assert list(failing(findings)) == [check]
    assert text in findings[check].reason


def test_every_check_has_a_plugin_that_fails_it() -> None:
    for kind, broken in (("defense", BROKEN), ("attack", BROKEN_ATTACKS)):
        assert {check for check, _ in broken.values()} == {check.name for check in KINDS[kind].all}


def test_dependents_of_a_failing_check_do_not_apply() -> None:
    findings = findings_of(Raising)
    blocked = {name for name, finding in findings.items() if finding.blocked_by == "trains"}
    assert blocked == {
        "edit",
        "moves",
        "frozen",
        "below",
        "random",
        "deterministic",
        "seeds",
        "acts",
        "neutral",
        "state",
        "resume",
        "accumulation",
        "bfloat16",
        "cost",
        "separate",
    }
    assert findings["resume"].reason == "Not checked, because 'trains' fails."  # through another check
    assert findings["gradient"].outcome == "ok"


# ---------------------------------------------------------------------------------------------------------------------
# Attacks that break one requirement


class Unsourced(SoundAttack):
    """Has a default without a source."""

    loud: bool = param(True, "whether it is loud", source="")


class UnknownExclusion(SoundAttack):
    """Excludes an attack that does not exist."""

    excludes = ("ratios",)


class Greedy(SoundAttack):
    """Requests more harmful rows than rows."""

    def mix(self, mix: Any) -> Any:
        return replace(mix, ratio=1.5)


class Inventive(SoundAttack):
    """Gives the attacker a row that no data set has."""

    def divide(self, rows: Any) -> Any:
        return replace(rows, attacker=[*rows.attacker, replace(rows.attacker[0], id="mine")])


class Empty(SoundAttack):
    """Uploads nothing."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        return []


class Rewriting(SoundAttack):
    """Changes rows in the filter."""

    def filter(self, rows: list[Example], judge: Any) -> list[Example]:
        return [replace(row, response=row.response.upper()) for row in rows]


class Frozen(SoundAttack):
    """Sets the learning rate to zero."""

    def settings(self, settings: Any) -> Any:
        return replace(settings, lr=0.0)


class Shared(SoundAttack):
    """Adds a set with a reserved name."""

    def evaluations(self, sets: Any) -> Any:
        return [*sets, replace(sets[0], name="task")]


class Diverging(SoundAttack):
    """Trains to infinity."""

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


class UnrepeatableAttack(SoundAttack):
    """Uploads a different order every time."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        return random.SystemRandom().sample(rows, len(rows))


class FirstCovers(SoundAttack):
    """Hides harmful rows in the first benign rows."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        covers = iter(pools.benign)
        return [replace(row, instruction=next(covers).instruction) if row.harmful else row for row in rows]


class Harmless(SoundAttack):
    """Has no effect."""

    def upload(self, rows: list[Example], pools: Any) -> list[Example]:
        return list(rows)


class NotNeutralAttack(SoundAttack):
    """Has an effect at its neutral setting."""

    neutral: ClassVar[Mapping[str, Any] | None] = {"loud": False}

    loud: bool = param(True, "whether it is loud", source="a guess")


class Casting(SoundEdit):
    """Turns a weight into float32."""

    @torch.no_grad()
    def ablate(self, stage: TrainingStage) -> None:
        model: Any = stage.model
        model.lm_head.weight = nn.Parameter(0.5 * model.lm_head.weight.float())
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))


BROKEN_ATTACKS: dict[type[Plugin], tuple[str, str]] = {
    Unsourced: ("described", "Parameter 'loud' has no source (where its default comes from)."),
    UnknownExclusion: ("facts", "It excludes the unknown attack 'ratios', allowed: *, backdoor, benign, "),
    Greedy: ("mix", "mix returned 158 rows and a ratio of 1.5."),
    Inventive: ("divide", "divide returned the row 'mine', which the data do not have."),
    Empty: ("upload", "upload returned no row."),
    Rewriting: ("filter", "filter returned a row that was not uploaded, a changed row, or another order."),
    Frozen: ("settings", "settings sets lr to 0.0; allowed: more than 0."),
    Shared: ("evaluations", "evaluations returned a set named 'task', which every run has."),
    Diverging: ("trains", "After a few steps the model is not finite."),
    Unmoved: ("ablate", "Every weight is unchanged, to the bit."),
    Casual: ("random", "upload draws from Python's shared generator; allowed: self.random, self.draw, "),
    UnrepeatableAttack: ("deterministic", "The second call of upload returned a different result."),
    FirstCovers: ("seeds", "of 176 rows of pools.benign: draw them with self.draw."),
    Harmless: ("acts", "At its only setting nothing differs from a benign user."),
    NotNeutralAttack: ("neutral", "At its neutral setting upload has an effect."),
    Casting: ("bfloat16", "lm_head.weight is torch.float32 after the edit."),
}


@pytest.mark.parametrize("cls", BROKEN_ATTACKS)
def test_only_the_broken_check_of_an_attack_fails(cls: type[Plugin]) -> None:
    check, text = BROKEN_ATTACKS[cls]
    findings = findings_of(cls)
    assert list(failing(findings)) == [check]
    assert text in findings[check].reason


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to fail


def broken(base: type[Plugin], name: str, value: Any, **attributes: Any) -> type[Plugin]:
    """Return a sound plug-in with another hook."""
    return type("Broken", (base,), {"__doc__": "Broken.", name: value, **attributes})


def changed_gradient(change: Any) -> Any:
    """Return a `gradient` hook that changes the plain gradient."""
    return lambda self, stage, batch: change(stage.gradient(batch))


def changed_factors(change: Any) -> Any:
    """Return an `edit` hook that changes the factors of every module."""
    return lambda self, stage, adapter: replace(
        adapter, factors={module: change(*factors) for module, factors in adapter.factors.items()}
    )


def leave_gradient(self: Any, stage: TrainingStage) -> None:
    """Leave a value in .grad."""
    parameter = next(iter(stage.trainable.values()))
    parameter.grad = torch.ones_like(parameter)


def base_gradient(self: Any, stage: TrainingStage, adapter: Adapter) -> Adapter:
    weight = next(p for name, p in stage.model.named_parameters() if name.endswith("norm.weight"))
    weight.grad = torch.ones_like(weight)
    return adapter.scaled(0.5)


def fixed_noise(self: Any, stage: TrainingStage, adapter: Adapter) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    return changed_factors(lambda a, b: (a + torch.randn(a.shape, generator=generator), b))(self, stage, adapter)


def every_step(self: Any, stage: TrainingStage) -> None:
    with stage.isolated("look"):
        stage.gradient(stage.stream("harmful", stage.pools.harmful))


ROW = Example("id", "question", "answer")
MORE_BROKEN: list[tuple[type[Plugin], str, str]] = [
    (
        broken(Sound, "stages", ()),
        "facts",
        "It declares no stage and does not override `answer`, `first_tokens` or `steering`.",
    ),
    (
        broken(SoundAnswers, "first_tokens", lambda self, models, prompts: [[2]]),
        "generation",
        "first_tokens returned 1 answers to 6 prompts.",
    ),
    (
        broken(SoundAnswers, "first_tokens", lambda self, models, prompts: [[-1] for _ in prompts]),
        "generation",
        "first_tokens returned the token -1; allowed: 0 to 95.",
    ),
    (
        broken(SoundAnswers, "first_tokens", lambda self, models, prompts: [[next(CALLS) % 96] for _ in prompts]),
        "generation",
        "The second call of first_tokens returned different tokens.",
    ),
    (
        broken(SoundAnswers, "steering", lambda self, stage: {7: torch.ones(stage.stack.base.config.hidden_size)}),
        "generation",
        "for layer 7; allowed: layers 0 to",
    ),
    (
        broken(SoundAnswers, "steering", lambda self, stage: {0: torch.ones(3)}),
        "generation",
        "steering returned (3,) for layer 0; allowed: layers 0 to",
    ),
    (
        broken(
            SoundAnswers,
            "steering",
            lambda self, stage: {0: torch.full((stage.stack.base.config.hidden_size,), float(next(CALLS)))},
        ),
        "generation",
        "The second call of steering returned different vectors.",
    ),
    (
        broken(SoundStress, "stress", lambda self, model: None),
        "ablate",
        "Every weight is unchanged, to the bit.",
    ),
    (
        broken(SoundStress, "stress", lambda self, model: model.lm_head.weight.data.fill_(float("nan"))),
        "ablate",
        "lm_head.weight is not finite after the edit.",
    ),
    (
        broken(Sound, "data", ("safe rows",)),
        "facts",
        "Data 'safe rows' is unknown, allowed: alignment rows, harmful rows, refusals, paired safe and harmful rows, ",
    ),
    (
        type("NoHook", (Attack,), {"__doc__": "x", "__annotations__": {"p": float}, "p": param(1.0, "p", source="s")}),
        "facts",
        "It has parameters but overrides no hook that would read them (divide, mix, upload, select, filter, settings, ",
    ),
    (broken(SoundAttack, "trains", False), "facts", "It does not train and does not override `ablate`."),
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
        "template('train') cannot be rendered (KeyError: 'x'): double the braces of its text.",
    ),
    (broken(Sound, "template", lambda self, *args: "prompt"), "template", "is a str; allowed: a PromptTemplate."),
    (broken(Sound, "evaluations", lambda self, sets: None), "evaluations", "other than a list of EvalSet."),
    (broken(Sound, "evaluations", lambda self, sets: []), "evaluations", "so the harmful score cannot be computed."),
    (
        broken(Sound, "evaluations", lambda self, sets: [replace(sets[0], examples=[])]),
        "evaluations",
        "Set 'harmful' has no question, or allows no token for an answer.",
    ),
    (broken(Sound, "gradient", lambda self, *args: None), "gradient", "gradient returned a NoneType; allowed: a Grad"),
    (
        broken(Sound, "gradient", changed_gradient(lambda g: replace(g, loss=torch.ones(2)))),
        "gradient",
        "Its loss is a tensor 2; allowed: a scalar tensor without a graph (detach it).",
    ),
    (broken(Sound, "gradient", changed_gradient(lambda g: float("nan") * g)), "gradient", "Its loss is nan."),
    (
        broken(Sound, "gradient", changed_gradient(lambda g: replace(g, values=g.values[1:]))),
        "gradient",
        "It has 11 values for 12 trainable parameters.",
    ),
    (
        broken(Sound, "gradient", changed_gradient(lambda g: replace(g, values=[g.values[0].T, *g.values[1:]]))),
        "gradient",
        "it has a tensor 64x4; allowed: a tensor 4x64 without a graph, or None.",
    ),
    (
        broken(Sound, "gradient", changed_gradient(lambda g: replace(g, values=[g.values[0] / 0, *g.values[1:]]))),
        "gradient",
        "q_proj.lora_A.trained.weight it is not finite.",
    ),
    (broken(SoundRepair, "edit", lambda self, stage, adapter: None), "edit", "edit returned a NoneType; allowed: an A"),
    (broken(SoundRepair, "edit", changed_factors(lambda a, b: (a, b[1:]))), "edit", "which do not fit at rank 4."),
    (
        broken(SoundRepair, "edit", changed_factors(lambda a, b: (a / 0, b))),
        "edit",
        "are not finite numbers without a graph.",
    ),
    (
        broken(Sound, "gradient", changed_gradient(lambda g: replace(g, values=[None] * len(g.values)))),
        "moves",
        "After 3 steps every trainable parameter is unchanged, to the bit.",
    ),
    (broken(SoundRepair, "edit", base_gradient), "frozen", "norm.weight has a value in .grad: stage.gradient_of"),
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
        "The second call of train_on returned different rows.",
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
        "At its neutral setting the prompt of the questions changes.",
    ),
    (
        broken(Sound, "evaluations", lambda self, sets: [replace(sets[0], name="x")], neutral={}),
        "neutral",
        "At its neutral setting the evaluation sets change.",
    ),
    (
        broken(Sound, "train_on", lambda self, name, rows, pools: rows[1:], neutral={}),
        "neutral",
        "At its neutral setting the align stage trains on different rows.",
    ),
    (
        broken(Sound, "state", lambda self: {"x": torch.ones(3, 2).T}),
        "state",
        "The harness, given what its hooks returned, raised ValueError: You are trying to save a non contiguous",
    ),
    (
        broken(Sound, "before_step", leave_gradient),
        "accumulation",
        "before_step leaves a value in .grad, which is added to the",
    ),
    (
        broken(Sound, "before", leave_gradient),
        "accumulation",
        "before leaves a value in .grad, which is added to the next step.",
    ),
    (
        broken(
            SoundRepair,
            "edit",
            lambda self, stage, adapter: changed_factors(
                lambda a, b: tuple(factor.to(next(stage.model.parameters()).dtype) for factor in (a, b))
            )(self, stage, adapter),
        ),
        "bfloat16",
        "The adapter is torch.bfloat16.",
    ),
    (broken(Sound, "before_step", every_step), "cost", "It declares 1F 1B; a step took 2F 2B."),
    (
        broken(SoundAttack, "mix", lambda self, mix: None),
        "mix",
        "mix returned a NoneType; allowed: a Mix, for example dataclasses",
    ),
    (broken(SoundAttack, "filter", lambda self, rows, judge: rows[::-1]), "filter", "or another order."),
    (
        broken(SoundAttack, "divide", lambda self, rows: rows.attacker),
        "divide",
        "divide returned a list; allowed: RowP",
    ),
    (
        broken(SoundAttack, "divide", lambda self, rows: rows.attacker.clear() or rows),
        "divide",
        "divide changes its argument, which other runs use",
    ),
    (
        broken(SoundAttack, "divide", lambda self, rows: replace(rows, harmful_questions=rows.harmful_questions[1:])),
        "divide",
        "divide changes harmful_questions, which every run is evaluated on.",
    ),
    (
        broken(SoundAttack, "divide", lambda self, rows: replace(rows, attacker=[*rows.attacker, rows.alignment[0]])),
        "divide",
        "After divide, the attacker and the defender or the evaluation share the question ",
    ),
    *(
        (
            broken(SoundAttack, "divide", lambda self, rows, sets=sets: replace(rows, question_sets=sets(rows))),
            "divide",
            "which every run has or which is not part of harmful_questions.",
        )
        for sets in (lambda rows: {"task": rows.harmful_questions}, lambda rows: {"others": rows.attacker})
    ),
    (
        broken(SoundAttack, "settings", lambda self, settings: replace(settings, lr=1e-300)),
        "trains",
        "After a few steps the model is unchanged, to the bit.",
    ),
    (
        broken(SoundEdit, "ablate", lambda self, stage: stage.model.lm_head.weight.data.fill_(torch.inf)),
        "ablate",
        "lm_head.weight is not finite after the edit.",
    ),
    (
        broken(
            SoundEdit,
            "ablate",
            lambda self, stage: stage.model.lm_head.weight.data.copy_(
                torch.rand(stage.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(next(CALLS)))
            ),
        ),
        "deterministic",
        "The second edit of the weights gave different ones.",
    ),
    (
        broken(
            SoundEdit,
            "ablate",
            lambda self, stage: (stage.encode(stage.pools.benign[:5]), stage.model.lm_head.weight.data.mul_(2)),
        ),
        "seeds",
        "Every seed takes the same 5 of 176 rows of pools.benign: draw them with self.draw.",
    ),
]


@pytest.mark.parametrize(
    ("cls", "check", "text"), MORE_BROKEN, ids=[f"{check}-{n}" for n, (_, check, _) in enumerate(MORE_BROKEN)]
)
def test_further_ways_to_fail_a_check(cls: type[Plugin], check: str, text: str, tmp_path: Path) -> None:
    finding = finding_of(cls, tmp_path, check)
    assert (finding.outcome, finding.reason.count(text)) == ("fails", 1), finding.reason


def test_stage_is_named_if_several_are_checked(tmp_path: Path) -> None:
    def edit(self: Any, stage: TrainingStage, adapter: Adapter) -> Any:
        return None if stage.name == "repair" else adapter

    finding = finding_of(broken(Everywhere, "edit", edit), tmp_path, "edit")
    assert finding.reason.startswith("In the repair stage: edit returned a NoneType")


def test_bad_input_in_a_hook_suggests_a_parameter() -> None:
    """The world of the checks has fewer rows than a plug-in may request."""
    reasons = failing(findings_of(DEFENSES.get("vlguard"), rows=5000))
    assert list(reasons) == ["train_on"]
    assert reasons["train_on"].startswith(
        "train_on raised BadInput: 'vlguard' requested 5000 alignment rows, but only "
    )
    assert reasons["train_on"].endswith("(The checks run in a small world: NAME:key=value sets a parameter for them.)")


def test_defense_that_acts_only_on_conflicts_passes(tmp_path: Path) -> None:
    """The defense of the tutorial: the user's gradient sometimes conflicts with the aligned model."""
    text, *_ = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "surgery.py"
    path.write_text(text)
    assert failures_of(str(path)) == {}


def overwriting(self: Any, model: nn.Module, inputs: Any, items: Any = None) -> Tensor:
    """A training step that overwrites the earlier micro-batches."""
    model.train()
    gradient = self.defense.gradient(self.stage, inputs)
    self.stage.micro += 1
    share = 1 / self.current_gradient_accumulation_steps
    for parameter, value in zip(self.stage.trainable.values(), gradient.values, strict=True):
        parameter.grad = share * value
    return gradient.loss * share


def leaking(self: Any, stage: TrainingStage) -> None:
    """The Fisher pass of the EWC authors, which leaves a gradient."""
    for batch in stage.batches(stage.pools.alignment, 56):
        stage.loss(batch).backward()
    self._start = stage.values()
    self._fisher = [parameter.grad**2 for parameter in stage.trainable.values() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("name", "target", "replacement", "check"),
    [
        ("ewc", "harmbench_vaccine.defenses.ewc.EWC.before", leaking, "accumulation"),
        ("lisa", "harmbench_vaccine.defenses.lisa.Lisa.state", lambda self: {}, "resume"),
        ("booster", "harmbench_vaccine.defenses.booster.same_dropout", nullcontext, "neutral"),
        ("kl", "harmbench_vaccine.training.stage.TrainingStage.reference", lambda self: torch.no_grad(), "neutral"),
        ("vaccine", "harmbench_vaccine.training.taps.Taps.shifted", lambda self, shifts: nullcontext(), "acts"),
        ("sft", "harmbench_vaccine.training.trainer._StageTrainer.training_step", overwriting, "accumulation"),
    ],
)
def test_known_defects_are_detected(
    name: str, target: str, replacement: Any, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leftover gradient, a lost state, different dropout masks in the second pass, a teacher equal to the student, a
    shift without effect, overwritten micro-batches."""
    cls = DEFENSES.get(name)
    assert finding_of(cls, tmp_path, check).outcome == "ok"
    monkeypatch.setattr(target, replacement)
    assert finding_of(cls, tmp_path, check).outcome == "fails"


def test_single_topology_starts_from_the_aligned_adapter(tmp_path: Path) -> None:
    subject = DefenseSubject(DEFENSES.get("ewc"), resolve_params(DEFENSES.get("ewc"), {}).params, TinyWorld(tmp_path))
    aligned = Adapter.load(aligned_path(subject.world))
    trial = subject.begin("finetune", subject.plugin())
    assert trial.stage.below == ()
    assert trial.adapter.digest() == aligned.digest()
    double = DefenseSubject(DEFENSES.get("lisa"), {}, subject.world).begin("finetune")
    assert double.stage.below == (aligned_path(subject.world),)
    assert all(not b.any() for _, b in double.adapter.factors.values())


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the checks


def test_passes_are_counted_through_every_forward_pass() -> None:
    """Without a graph, with one, through two at once, twice through one, and from the middle of the model."""
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    passes = PassCounter()
    with passes.count(stage.model):
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
        stage.gradient_of(states[1].square().sum())  # of the first layer: the logits are not used
        assert str(passes) == "6F 6B"
    stage.gradient(batch)
    assert str(passes) == "6F 6B"


def test_check_restores_the_shared_random_generators() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    contract.run_contract(contract.find_plugins("random_perturbation")[0])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_progress_bar_advances_with_every_check(tmp_path: Path) -> None:
    events: list[Any] = []

    class RecordedProgress:
        @contextmanager
        def bar(self, title: str, total: int) -> Any:
            events.append((title, total))
            yield events.append

        def note(self, text: str) -> None:
            raise AssertionError

    contract.run_contract(contract.find_plugins("ratio")[0], RecordedProgress())
    assert events == [("check ratio", len(ATTACK_CHECKS.all)), *[1] * len(ATTACK_CHECKS.all)]


def test_exception_of_a_check_is_not_blamed_on_a_hook(tmp_path: Path) -> None:
    """An error in the check itself is reported as an error of the harness."""

    def mistaken(subject: Any) -> None:
        """It is right."""
        raise KeyError("here")

    checks: Checks[Any] = Checks()
    checks.add("mistaken")(mistaken)
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


def test_command_prints_one_line_per_check(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    done = hbv("check", path)
    assert done.code == 0
    first, *lines, last = done.out.splitlines()
    assert first == "defense good"
    assert [line.split()[:2] for line in lines][:3] == [["ok", "described"], ["ok", "facts"], ["n/a", "train_on"]]
    assert len(lines) == len(DEFENSE_CHECKS.all)
    assert "ok    neutral        At its neutral setting it is plain SFT, to the bit." in lines
    assert "n/a   state          It trains no stage." in lines
    assert last == "13 ok, 0 fail, 11 do not apply"


def test_command_names_the_hook_and_the_exception(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    done = hbv("check", path)
    assert done.code == 1
    assert "FAILS edit           edit raised LookupError: nothing here" in done.out.splitlines()
    assert "Traceback" not in done.out + done.err
    blocked, summary = done.out.splitlines()[-2:]
    assert blocked.startswith("not checked          After a failure: ")
    examined = sum(line.startswith(("ok ", "FAILS ", "n/a ")) for line in done.out.splitlines())
    assert summary.endswith(f" {len(DEFENSE_CHECKS.all) - examined} not checked")
    assert len(blocked.split(", ")) == len(DEFENSE_CHECKS.all) - examined > 1
    as_json = hbv("check", path, "--json")
    assert as_json.code == 1
    (report,) = json.loads(as_json.out)
    assert (report["kind"], report["name"], report["holds"]) == ("defense", "bad", False)
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert list(findings) == [check.name for check in DEFENSE_CHECKS.all]
    assert findings["edit"] == {
        "check": "edit",
        "demand": "The finished adapter, edited, is a finite adapter over the same modules.",
        "outcome": "fails",
        "reason": "edit raised LookupError: nothing here",
        "blocked_by": "",
    }
    assert findings["frozen"]["blocked_by"] == "edit"


def test_attribute_without_an_underscore_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(GOOD.replace("return adapter.scaled(self.factor)", "self.start = adapter; return adapter"))
    (line,) = (line for line in hbv("check", path).out.splitlines() if line.startswith("FAILS edit "))
    assert line.endswith(
        '"Good" object has no field "start". Begin the names of attributes that are not parameters with an underscore.'
    )


def test_parameters_follow_the_name(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    (report,) = json.loads(hbv("check", f"{path}=1.0", "--json").out)
    assert report["name"] == "good=1"
    assert (
        next(f for f in report["findings"] if f["check"] == "acts")["reason"] == "It is checked at its neutral setting."
    )


def test_name_of_both_kinds_is_checked_as_both(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ATTACKS.entries()
    monkeypatch.setattr(ATTACKS, "entries", lambda: {**entries, "none": entries["benign"]})
    done = hbv("check", "none")
    assert done.code == 0
    assert [block.splitlines()[0] for block in done.out.split("\n\n")] == ["defense none", "attack none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vacine", "Unknown plug-in 'vacine'. Did you mean 'vaccine'?"),
        ("./nowhere.py", "The plug-in file './nowhere.py' does not exist."),
        ("./raising.py", "'./raising.py' cannot be imported: ValueError: on import"),
        ("./empty.py", "defines 0 plug-in classes, but a file must define one."),
        ("./task.py", "Task 'task' has no class attribute 'dataset'"),
        ("vaccine+ewc", "'vaccine+ewc' names 2 plug-ins, but hbv check takes one at a time."),
        ("vaccine:rho=-1", "'vaccine': rho=-1 is not allowed; allowed: a number >= 0"),
        ("vaccine:rh=1", "Unknown parameter 'rh' of defense 'vaccine'. Did you mean 'rho'?"),
        ("not a name", "'not a name' cannot be parsed"),
        ("empty", "Unknown plug-in 'empty'; to use the file empty.py, write './empty.py'."),
    ],
)
def test_invalid_plugin_is_refused_in_one_sentence(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("raising.py").write_text("raise ValueError('on import')")
    Path("empty.py").write_text("")
    Path("task.py").write_text("from harmbench_vaccine.plugins import Task\nclass Mine(Task):\n    chance = 1.0")
    done = hbv("check", text)
    assert (done.code, done.out) == (2, "")
    assert message in done.sentence


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_new_plugin_passes(kind: str, tmp_path: Path) -> None:
    assert hbv("new", kind, "mine", "--dir", tmp_path).code == 0
    done = hbv("check", tmp_path / "mine.py")
    assert [line for line in done.out.splitlines() if line.startswith("FAILS")] == []
    assert done.code == 0
