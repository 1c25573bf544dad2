"""What `hbv check` asks of a defense: what it declares, what its hooks return, what changes and what must not."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from harmbench_vaccine.core.types import STAGES, StageName
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Gradient

from .findings import Checks, Fails, NotApplicable, a, shape
from .shared import (
    examples_are_sound,
    misdeclared,
    raise_if,
    sets_are_sound,
    settings_are_sound,
    template_is_sound,
    undescribed,
)
from .stages import aligned
from .subject import DefenseSubject, in_stages
from .watch import own_random_states, touched
from .world import SAMPLES

CHECKS: Checks[DefenseSubject] = Checks()

# ---------------------------------------------------------------------------------------------------------------------
# What it declares


@CHECKS.add()
def described(subject: DefenseSubject) -> None:
    """It says where it comes from, and of every parameter what it is and where its default comes from."""
    raise_if(undescribed(subject))


@CHECKS.add()
def facts(subject: DefenseSubject) -> None:
    """What it declares can be: stages, cost, topology, the setting at which it changes nothing."""
    cls = subject.cls
    problems = misdeclared(subject)
    problems += [
        f"stage {name!r} is unknown, allowed: {', '.join(STAGES)}" for name in cls.stages if name not in STAGES
    ]
    if not cls.stages:
        problems.append("it names no stage that it acts in")
    if not re.fullmatch(r"none|\d+F \d+B", cls.cost):
        problems.append(f"cost {cls.cost!r} cannot be read, allowed: none, or passes a step such as '2F 1B'")
    if cls.topology not in (None, "double", "single"):
        problems.append(f"topology {cls.topology!r} is unknown, allowed: double, single, or None")
    raise_if(problems)


# ---------------------------------------------------------------------------------------------------------------------
# What its hooks return


@CHECKS.add()
@in_stages("training")
def train_on(subject: DefenseSubject, stage: StageName) -> None:
    """The rows that a stage trains on are a list of examples, and not empty."""
    world = subject.world
    examples_are_sound("train_on", subject.plugin().train_on(stage, world.given(stage), world.pools))


@CHECKS.add()
@in_stages("stages")
def settings(subject: DefenseSubject, stage: StageName) -> None:
    """The optimizer's settings are TrainSettings that can be trained with."""
    settings_are_sound(subject.plugin().settings(stage, subject.world.settings(SAMPLES)))


@CHECKS.add()
def template(subject: DefenseSubject) -> None:
    """The prompt keeps its slots, in training and when answering."""
    for use in ("train", "answer"):
        template_is_sound(f"template({use!r})", subject.plugin().template(use, subject.world.template))


@CHECKS.add()
def evaluations(subject: DefenseSubject) -> None:
    """The sets of harmful questions are evaluation sets with names of their own."""
    sets_are_sound(subject.plugin().evaluations(list(subject.world.questions)))


@CHECKS.add("train_on", "settings", "template")
@in_stages("training")
def gradient(subject: DefenseSubject, stage: StageName) -> None:
    """A micro-batch gives a scalar loss without a graph, and for every trainable parameter a finite tensor of its shape
    or None."""
    with own_random_states(1):
        trial = subject.begin(stage, subject.plugin(), lora_dropout=0.0)
        made = trial.stage
        made.rows, made.steps = trial.rows, 3
        with made.isolated("before"):
            trial.team.before(made)
        made.step = 1
        trial.team.before_step(made)
        numbers = list(range(min(trial.settings.batch, len(trial.rows))))
        batch = {**next(made.training_batches(len(numbers))), "rows": torch.tensor(numbers)}
        made.model.train()
        given = trial.team.gradient(made, batch)
    if not isinstance(given, Gradient):
        raise Fails(f"gradient returned {a(given)}; allowed: a Gradient, such as stage.gradient_of(loss) makes.")
    loss = given.loss
    if not isinstance(loss, Tensor) or loss.dim() or loss.requires_grad:
        raise Fails(f"Its loss is {a(loss)}; allowed: a scalar tensor without a graph (detach it).")
    if not loss.isfinite():
        raise Fails(f"Its loss is {loss.item()}.")
    if len(given.values) != len(made.trainable):
        raise Fails(f"It has {len(given.values)} values for {len(made.trainable)} trainable parameters.")
    for value, (name, parameter) in zip(given.values, made.trainable.items(), strict=True):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.requires_grad:
            raise Fails(f"For {name} it has {a(value)}; allowed: a tensor {shape(parameter)} without a graph, or None.")
        if not value.isfinite().all():
            raise Fails(f"For {name} it is not finite.")


@CHECKS.add("gradient")
@in_stages("training")
def trains(subject: DefenseSubject, stage: StageName) -> None:
    """A stage of a few steps runs to its end, in the user stage on top of an aligned model."""
    trial, _ = subject.watched(stage)
    for entry in trial.log:
        if not torch.tensor([entry["loss"], entry["grad_norm"]]).isfinite().all():
            raise Fails(
                f"At step {entry['step']:g} the loss is {entry['loss']}, the gradient's norm {entry['grad_norm']}."
            )


@CHECKS.add("trains")
@in_stages("stages")
def edit(subject: DefenseSubject, stage: StageName) -> None:
    """The finished adapter, edited, is a finite adapter over the same modules."""
    given, (adapter, _) = subject.watched(stage)[0].adapter, subject.watched_edit(stage)
    if not isinstance(adapter, Adapter):
        raise Fails(f"edit returned {a(adapter)}; allowed: an Adapter.")
    if adapter.factors.keys() != given.factors.keys():
        raise Fails(
            f"Its adapter is over {len(adapter.factors)} modules, the one that it was given over {len(given.factors)}, "
            f"or over others: {', '.join(sorted(adapter.factors.keys() ^ given.factors.keys()))}."
        )
    rank = adapter.rank
    for module, (one, two) in adapter.factors.items():
        old_a, old_b = given.factors[module]
        if one.shape != (rank, old_a.shape[1]) or two.shape != (old_b.shape[0], rank):
            raise Fails(f"Its factors for {module} are {shape(one)} and {shape(two)}, which do not fit at rank {rank}.")
        if not (one.isfinite().all() and two.isfinite().all()) or one.requires_grad or two.requires_grad:
            raise Fails(f"Its factors for {module} are not finite numbers without a graph.")


# ---------------------------------------------------------------------------------------------------------------------
# What changes, and what must not


@CHECKS.add("trains")
@in_stages("training")
def moves(subject: DefenseSubject, stage: StageName) -> None:
    """Training moves the adapter."""
    trial, _ = subject.watched(stage)
    if all(torch.equal(start, end) for start, end in zip(trial.start, trial.values, strict=True)):
        raise Fails(f"After {len(trial.log)} steps every trainable parameter is what it was, to the bit.")


@CHECKS.add("trains", "edit")
@in_stages("stages")
def frozen(subject: DefenseSubject, stage: StageName) -> None:
    """The base model's weights stay as they were, to the bit, and get no gradient."""
    seen = subject.watched_whole(stage)
    if changed := seen.changed(adapters=False):
        raise Fails(f"{changed[0]} changed{_more(changed)}: only the adapter is trained.")
    if there := seen.with_gradient():
        raise Fails(f"{there[0]} has something in .grad{_more(there)}: stage.gradient_of leaves .grad alone.")


@CHECKS.add("trains", "edit")
@in_stages("stages")
def below(subject: DefenseSubject, stage: StageName) -> None:
    """An adapter below the trained one, or the one that it goes on from, stays as it was, to the bit."""
    if stage == "align":
        raise NotApplicable("Nothing lies below the adapter of the alignment stage.")
    seen = subject.watched_whole(stage)
    if changed := seen.changed(adapters=True):
        raise Fails(f"{changed[0]} changed{_more(changed)}: it belongs to the aligned model.")
    if Adapter.load(subject.world.aligned).digest() != aligned().digest():
        raise Fails("The aligned adapter's file changed.")


@CHECKS.add("trains", "edit")
def random(subject: DefenseSubject) -> None:
    """Its hooks leave the shared random generators alone, so that dropout masks are those of SFT."""
    world, plugin, found = subject.world, subject.plugin(), dict[str, str]()
    with own_random_states(1):
        for stage in subject.training:
            with touched(found, "train_on"):
                plugin.train_on(stage, world.given(stage), world.pools)
            with touched(found, "settings"):
                plugin.settings(stage, world.settings(SAMPLES))
        with touched(found, "template"):
            plugin.template("answer", world.template)
        with touched(found, "evaluations"):
            plugin.evaluations(list(world.questions))
    for stage in subject.stages:
        found |= subject.watched_whole(stage).generators
    if found:
        hook, whose = next(iter(found.items()))
        raise Fails(
            f"{hook} draws from {whose} shared generator; allowed: self.random, self.draw, stage.generator, "
            "or work inside stage.apart or rehearsal."
        )


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
