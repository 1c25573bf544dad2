"""What `hbv check` asks of an attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, Mix
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.trainer import train

from ..attack import Attack
from ..registry import ATTACKS
from ..teams import DefenseTeam
from .findings import Checks, Fails, NotApplicable, Subject, a
from .shared import (
    drawn_by_seed,
    examples_are_sound,
    misdeclared,
    raise_if,
    sets_are_sound,
    settings_are_sound,
    undescribed,
)
from .watch import own_random_states, touched
from .world import LONGEST, PAD, RATIO, SAMPLES, TinyWorld, drawn


@dataclass
class Ablated:
    """A model whose weights an attack edited."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    encoded: list[Example]
    """The rows that it had encoded."""
    generators: dict[str, str]
    """`ablate`, and whose shared random generator it drew from."""
    logits: Tensor


@dataclass
class AttackSubject(Subject):
    """An attack, and the world that it is checked in."""

    cls: type[Attack]
    world: TinyWorld
    _done: dict[Any, Ablated] = field(default_factory=dict)

    def plugin(self, seed: int = 0) -> Attack:
        """A fresh object."""
        return self.cls(**self.params).seeded(seed)

    @property
    def asked(self) -> Mix:
        """A mix as another attack leaves it, or as it was where none may stand beside this one."""
        return Mix(SAMPLES, None if {"ratio", "*"} & set(self.cls.excludes) else RATIO)

    def given(self, plugin: Attack) -> list[Example]:
        """The draw of task rows and harmful rows that the attack asks for."""
        return self.world.uploaded(plugin.mix(self.asked), Attack())

    def doings(self, plugin: Attack) -> dict[str, Any]:
        """Hook -> what comes of it, for the user who trains."""
        world, mix = self.world, plugin.mix(self.asked)
        uploaded = plugin.upload(world.uploaded(mix, Attack()), world.pools)
        return {
            "mix": (mix.samples, mix.harmful),
            "upload": uploaded,
            "filter": plugin.filter(list(uploaded), world.judge),
            "settings": plugin.settings(world.settings(SAMPLES)),
            "evaluations": plugin.evaluations(list(world.questions)),
        }

    def stage(self, dtype: str = "float32", *, whole: bool) -> TrainingStage:
        """A user stage on the aligned model, or on one whose weights have no adapter."""
        world = self.world

        def encode(examples: Sequence[Example]) -> list[Encoded]:
            return world.encode(examples, world.template, world.settings(SAMPLES).max_length)

        return TrainingStage(
            "finetune", LoraStack(world.base(dtype)), {}, derive_seed(0, "finetune"), world.settings(SAMPLES), world.pools,
            below=() if whole else (world.aligned,), encode=encode, pad=PAD,
        )  # fmt: skip

    def ablated(self, seed: int = 0, salt: int = 1, dtype: str = "float32") -> Ablated:
        """What it makes of a model's weights."""
        key = seed, salt, dtype
        if key not in self._done:
            self._done[key] = _ablated(self, seed, salt, dtype)
        return self._done[key]

    def only_training(self) -> None:
        """Ends a check about a user who trains, where the attack edits weights instead."""
        if not self.cls.trains:
            raise NotApplicable("It edits weights in place of training.")


def _ablated(subject: AttackSubject, seed: int, salt: int, dtype: str) -> Ablated:
    stage, plugin = subject.stage(dtype, whole=True), subject.plugin(seed)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    encoded: list[Example] = []
    encode = stage.encode
    assert encode is not None

    def noted(examples: Sequence[Example]) -> list[Encoded]:
        encoded.extend(examples)
        return encode(examples)

    stage.encode = noted
    found: dict[str, str] = {}
    with own_random_states(salt), stage.isolated("ablate"), touched(found, "ablate", "torch's"):  # `apart` protects it
        plugin.ablate(stage)
    stage.encode = encode
    with torch.no_grad():
        logits = stage.output(next(stage.batches(subject.world.users[:4], 4))).logits
    after = {name: value.clone() for name, value in stage.model.state_dict().items()}
    return Ablated(before, after, encoded, found, logits)


CHECKS: Checks[AttackSubject] = Checks()


@CHECKS.add()
def described(subject: AttackSubject) -> None:
    """It says where it comes from, and of every parameter what it is and where its default comes from."""
    raise_if(undescribed(subject))


@CHECKS.add()
def facts(subject: AttackSubject) -> None:
    """What it declares can be: what it cannot stand beside, the setting at which it changes nothing."""
    cls, problems, known = subject.cls, misdeclared(subject), ATTACKS.entries()
    for name in cls.excludes:
        if name != "*" and name not in known:
            problems.append(f"it excludes {name!r}, which is no attack, allowed: *, {', '.join(known)}")
    if not cls.trains and cls.ablate is Attack.ablate:
        problems.append("it trains nothing and has no `ablate`")
    raise_if(problems)


# ---------------------------------------------------------------------------------------------------------------------
# What its hooks return


@CHECKS.add()
def mix(subject: AttackSubject) -> None:
    """It asks for a number of rows and a share of harmful ones between 0 and 1."""
    for given in (Mix(SAMPLES), subject.asked):
        made = subject.plugin().mix(given)
        if not isinstance(made, Mix):
            raise Fails(f"mix returned {a(made)}; dataclasses.replace(mix, ...) makes another Mix.")
        if made.samples < 1 or not 0 <= (made.ratio or 0) <= 1:
            raise Fails(f"mix asks for {made.samples} rows and a share of {made.ratio}.")


@CHECKS.add("mix")
def upload(subject: AttackSubject) -> None:
    """What is uploaded is a list of examples, and not empty."""
    subject.only_training()
    plugin = subject.plugin()
    examples_are_sound("upload", plugin.upload(subject.given(plugin), subject.world.pools))


@CHECKS.add("upload")
def filter(subject: AttackSubject) -> None:
    """What the provider lets through are some of the uploaded rows, as they were and in their order."""
    subject.only_training()
    plugin = subject.plugin()
    uploaded = plugin.upload(subject.given(plugin), subject.world.pools)
    kept = plugin.filter(list(uploaded), subject.world.judge)
    examples_are_sound("filter", kept)
    left = iter(uploaded)
    if not all(row in left for row in kept):
        raise Fails("filter returned a row that was not uploaded, a changed one, or another order.")


@CHECKS.add()
def settings(subject: AttackSubject) -> None:
    """The user's training settings are TrainSettings that can be trained with."""
    subject.only_training()
    settings_are_sound(subject.plugin().settings(subject.world.settings(SAMPLES)))


@CHECKS.add()
def evaluations(subject: AttackSubject) -> None:
    """The sets of harmful questions are evaluation sets with names of their own."""
    sets_are_sound(subject.plugin().evaluations(list(subject.world.questions)))


@CHECKS.add("filter", "settings")
def trains(subject: AttackSubject) -> None:
    """A user stage on its rows runs with its settings, and moves the model."""
    subject.only_training()
    plugin, world = subject.plugin(), subject.world
    rows = plugin.filter(plugin.upload(subject.given(plugin), world.pools), world.judge)
    settings = plugin.settings(world.settings(SAMPLES))
    settings = replace(settings, epochs=min(settings.epochs, LONGEST / math.ceil(len(rows) / settings.batch)))
    stage = subject.stage(whole=settings.full)
    stack = stage.stack
    stage.trainable = stack.whole() if settings.full else stack.train(stage.below, settings, stage.seed)
    start = stage.values()
    assert stage.encode is not None
    with own_random_states(1):
        train(stage, DefenseTeam(), stage.encode(rows), settings, world.new_folder(), pad=PAD, save_share=1.0)
    if not all(value.isfinite().all() for value in stage.values()):
        raise Fails("After a few steps the model is not finite.")
    if all(torch.equal(one, other) for one, other in zip(start, stage.values(), strict=True)):
        raise Fails("After a few steps the model is what it was, to the bit.")


@CHECKS.add()
def ablate(subject: AttackSubject) -> None:
    """The edited model has other weights of the same shapes, all finite, and still answers."""
    if subject.cls.trains:
        raise NotApplicable("It trains, and edits no weights.")
    made = subject.ablated()
    for name, value in made.after.items():
        if name in made.before and value.shape != made.before[name].shape:
            raise Fails(f"{name} is {tuple(value.shape)} after the edit and was {tuple(made.before[name].shape)}.")
        if not value.isfinite().all():
            raise Fails(f"{name} is not finite after the edit.")
    if missing := sorted(made.before.keys() - made.after.keys()):
        raise Fails(f"{missing[0]} is gone after the edit.")
    if all(torch.equal(value, made.after[name]) for name, value in made.before.items()):
        raise Fails("Every weight is what it was, to the bit.")
    if not made.logits.isfinite().all():
        raise Fails("The edited model's logits are not finite.")


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


@CHECKS.add("filter", "settings", "evaluations", "ablate")
def random(subject: AttackSubject) -> None:
    """Its hooks leave the shared random generators alone."""
    world, plugin, found = subject.world, subject.plugin(), dict[str, str]()
    with own_random_states(1):
        if subject.cls.trains:
            with touched(found, "mix"):
                plugin.mix(subject.asked)
            given = subject.given(subject.plugin())
            with touched(found, "upload"):
                uploaded = plugin.upload(given, world.pools)
            with touched(found, "filter"):
                plugin.filter(uploaded, world.judge)
            with touched(found, "settings"):
                plugin.settings(world.settings(SAMPLES))
        else:
            found |= subject.ablated().generators
        with touched(found, "evaluations"):
            plugin.evaluations(list(world.questions))
    if found:
        hook, whose = next(iter(found.items()))
        raise Fails(f"{hook} draws from {whose} shared generator; allowed: self.random, self.draw, stage.generator.")


@CHECKS.add("filter", "settings", "evaluations", "ablate")
def deterministic(subject: AttackSubject) -> None:
    """The same seed gives the same rows, settings, questions and weights, to the bit."""
    with own_random_states(1):
        one = subject.doings(subject.plugin())
    with own_random_states(2):
        other = subject.doings(subject.plugin())
    if hook := _departure(one, other):
        raise Fails(f"{hook} gave something else the second time.")
    if not subject.cls.trains and not _same_weights(subject.ablated().after, subject.ablated(salt=2).after):
        raise Fails("ablate gave other weights the second time.")


@CHECKS.add("deterministic")
def seeds(subject: AttackSubject) -> None:
    """Where it draws, another seed gives other draws."""
    pools, given = subject.world.pools, subject.given(subject.plugin())
    if subject.cls.trains:
        rows = [subject.plugin(seed).upload(list(given), pools) for seed in (0, 1)]
    else:
        rows, given = [subject.ablated(seed).encoded for seed in (0, 1)], []
    if not drawn_by_seed(pools, *(drawn(pools, each, given) for each in rows)):
        raise NotApplicable("It draws no rows.")


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to


@CHECKS.add("facts", "deterministic")
def acts(subject: AttackSubject) -> None:
    """It does something: rows, settings, questions or weights differ from a benign user's."""
    if not subject.hooks():
        raise NotApplicable("It overrides no hook: it is a benign user.")
    if subject.is_neutral():
        raise NotApplicable("It is checked at its neutral setting.")
    if subject.cls.trains and not _departure(subject.doings(subject.plugin()), subject.doings(Attack())):
        raise Fails(f"At {subject.words()} nothing differs from what a benign user does.")


@CHECKS.add("facts", "deterministic")
def neutral(subject: AttackSubject) -> None:
    """At its neutral setting it changes no row, setting or question."""
    if subject.cls.neutral is None:
        raise NotApplicable("It declares no setting at which it changes nothing.")
    hook = _departure(subject.doings(subject.cls(**subject.cls.neutral).seeded(0)), subject.doings(Attack()))
    if hook:
        raise Fails(f"At its neutral setting {hook} changes something.")


@CHECKS.add("ablate")
def bfloat16(subject: AttackSubject) -> None:
    """A bfloat16 model can be edited, and stays bfloat16 and finite."""
    if subject.cls.trains:
        raise NotApplicable("It trains, and edits no weights.")
    made = subject.ablated(dtype="bfloat16")
    for name, value in made.after.items():
        if value.dtype != made.before.get(name, value).dtype:
            raise Fails(f"{name} is {value.dtype} after the edit.")
        if not value.isfinite().all():
            raise Fails(f"{name} is not finite after the edit.")


def _departure(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first hook in which two attacks differ; empty: in none."""
    return next((hook for hook in one if one[hook] != other[hook]), "")


def _same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
