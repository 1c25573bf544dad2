"""Checks of a defense: its declarations, the values that its hooks return, and the state that they must not change."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from harmbench_vaccine.core.types import StageName
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Gradient

from ..defense import ROW_KINDS
from .defense_subject import DefenseSubject, for_stages
from .findings import Checks, Fails, NotApplicable, describe_value, format_shape
from .observation import preserved_random_states, record_shared_draws
from .requirements import (
    declaration_problems,
    documentation_problems,
    raise_problems,
    require_eval_sets,
    require_examples,
    require_settings,
    require_template,
)
from .trials import aligned_adapter, aligned_path
from .world import SAMPLES

HOOK_CHECKS: Checks[DefenseSubject] = Checks()

# ---------------------------------------------------------------------------------------------------------------------
# Declarations


@HOOK_CHECKS.add("described")
def _described(subject: DefenseSubject) -> None:
    """It has a docstring and a citation, and every parameter has a description and a source of its default."""
    raise_problems(documentation_problems(subject))


@HOOK_CHECKS.add("facts")
def _facts(subject: DefenseSubject) -> None:
    """Its declarations are valid: stages, cost, topology, data, neutral setting."""
    cls = subject.cls
    problems = declaration_problems(subject)
    plugin = subject.plugin()
    if not cls.stages and not (plugin.changes_answers or plugin.changes_generation):
        problems.append("it declares no stage and does not override `answer`, `first_tokens` or `steering`")
    if not re.fullmatch(r"none|\d+F \d+B", cls.cost):
        problems.append(f"cost {cls.cost!r} is not valid, allowed: none, or the passes of a step such as '2F 1B'")
    problems += [
        f"data {kind!r} is unknown, allowed: {', '.join(ROW_KINDS)}" for kind in cls.data if kind not in ROW_KINDS
    ]
    raise_problems(problems)


# ---------------------------------------------------------------------------------------------------------------------
# Return values of the hooks


@HOOK_CHECKS.add("train_on")
@for_stages("training_stages")
def _train_on(subject: DefenseSubject, stage: StageName) -> None:
    """The rows of a training stage are a list of examples, and not empty."""
    world = subject.world
    require_examples("train_on", subject.plugin().train_on(stage, world.stage_rows(stage), world.pools))


@HOOK_CHECKS.add("settings")
@for_stages("stages")
def _settings(subject: DefenseSubject, stage: StageName) -> None:
    """The optimizer settings are TrainSettings with positive values."""
    require_settings(subject.plugin().settings(stage, subject.world.settings(SAMPLES)))


@HOOK_CHECKS.add("template")
def _template(subject: DefenseSubject) -> None:
    """The prompt keeps its slots, in training and when answering."""
    for use in ("train", "answer"):
        require_template(f"template({use!r})", subject.plugin().template(use, subject.world.template))


@HOOK_CHECKS.add("evaluations")
def _evaluations(subject: DefenseSubject) -> None:
    """The sets of harmful questions are evaluation sets with unique names."""
    require_eval_sets(subject.plugin().evaluations(list(subject.world.questions)))


@HOOK_CHECKS.add("gradient", after=["train_on", "settings", "template"])
@for_stages("training_stages")
def _gradient(subject: DefenseSubject, stage: StageName) -> None:
    """A micro-batch gives a scalar loss without a graph, and for every trainable parameter a finite tensor of its shape
    or None."""
    with preserved_random_states(1):
        trial = subject.begin(stage, subject.plugin(), lora_dropout=0.0)
        training = trial.stage
        training.rows, training.steps = trial.rows, 3
        with training.isolated("before"):
            trial.team.before(training)
        training.step = 1
        trial.team.before_step(training)
        numbers = list(range(min(trial.settings.batch, len(trial.rows))))
        batch = next(training.training_batches(len(numbers)))
        batch = {**batch, "rows": torch.tensor(numbers, device=batch["input_ids"].device)}
        training.model.train()
        gradient = trial.team.gradient(training, batch)
    if not isinstance(gradient, Gradient):
        raise Fails(
            f"gradient returned {describe_value(gradient)}; allowed: a Gradient, for example stage.gradient_of(loss)."
        )
    loss = gradient.loss
    if not isinstance(loss, Tensor) or loss.dim() or loss.requires_grad:
        raise Fails(f"Its loss is {describe_value(loss)}; allowed: a scalar tensor without a graph (detach it).")
    if not loss.isfinite():
        raise Fails(f"Its loss is {loss.item()}.")
    if len(gradient.values) != len(training.trainable):
        raise Fails(f"It has {len(gradient.values)} values for {len(training.trainable)} trainable parameters.")
    for value, (name, parameter) in zip(gradient.values, training.trainable.items(), strict=True):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.requires_grad:
            shape = format_shape(parameter)
            raise Fails(
                f"For {name} it has {describe_value(value)}; allowed: a tensor {shape} without a graph, or None."
            )
        if not value.isfinite().all():
            raise Fails(f"For {name} it is not finite.")


@HOOK_CHECKS.add("trains", after=["gradient"])
@for_stages("training_stages")
def _trains(subject: DefenseSubject, stage: StageName) -> None:
    """A stage of a few steps runs to its end; the user stage starts from an aligned model."""
    trial, _ = subject.observed(stage)
    for entry in trial.log:
        loss, norm = entry["loss"], entry["grad_norm"]
        if not torch.tensor([loss, norm]).isfinite().all():
            raise Fails(f"At step {entry['step']:g} the loss is {loss} and the gradient norm is {norm}.")


@HOOK_CHECKS.add("edit", after=["trains"])
@for_stages("stages")
def _edit(subject: DefenseSubject, stage: StageName) -> None:
    """The finished adapter, edited, is a finite adapter over the same modules."""
    before, (after, _) = subject.observed(stage)[0].adapter, subject.observed_edit(stage)
    if not isinstance(after, Adapter):
        raise Fails(f"edit returned {describe_value(after)}; allowed: an Adapter.")
    if after.factors.keys() != before.factors.keys():
        raise Fails(
            f"Its adapter covers {len(after.factors)} modules instead of {len(before.factors)}, or other modules: "
            f"{', '.join(sorted(after.factors.keys() ^ before.factors.keys()))}."
        )
    rank = after.rank
    for module, (a, b) in after.factors.items():
        old_a, old_b = before.factors[module]
        if a.shape != (rank, old_a.shape[1]) or b.shape != (old_b.shape[0], rank):
            shapes = f"{format_shape(a)} and {format_shape(b)}"
            raise Fails(f"Its factors for {module} are {shapes}, which do not fit at rank {rank}.")
        if not (a.isfinite().all() and b.isfinite().all()) or a.requires_grad or b.requires_grad:
            raise Fails(f"Its factors for {module} are not finite numbers without a graph.")


# ---------------------------------------------------------------------------------------------------------------------
# State that changes, and state that must not


@HOOK_CHECKS.add("moves", after=["trains"])
@for_stages("training_stages")
def _moves(subject: DefenseSubject, stage: StageName) -> None:
    """Training changes the adapter."""
    trial, _ = subject.observed(stage)
    if all(torch.equal(start, end) for start, end in zip(trial.start, trial.values, strict=True)):
        raise Fails(f"After {len(trial.log)} steps every trainable parameter is unchanged, to the bit.")


@HOOK_CHECKS.add("frozen", after=["trains", "edit"])
@for_stages("stages")
def _frozen(subject: DefenseSubject, stage: StageName) -> None:
    """The weights of the base model stay unchanged, to the bit, and get no gradient."""
    observation = subject.observed_with_edit(stage)
    if names := observation.changed_parameters(adapters=False):
        raise Fails(f"{names[0]} changed{_count_more(names)}: only the adapter is trained.")
    if names := observation.parameters_with_gradient():
        raise Fails(f"{names[0]} has a value in .grad{_count_more(names)}: stage.gradient_of does not change .grad.")


@HOOK_CHECKS.add("below", after=["trains", "edit"])
@for_stages("stages")
def _below(subject: DefenseSubject, stage: StageName) -> None:
    """An adapter below the trained one, or the one that training starts from, stays unchanged, to the bit."""
    if stage == "align":
        raise NotApplicable("The alignment stage has no adapter below the trained one.")
    if names := subject.observed_with_edit(stage).changed_parameters(adapters=True):
        raise Fails(f"{names[0]} changed{_count_more(names)}: it is part of the aligned model.")
    if Adapter.load(aligned_path(subject.world)).digest() != aligned_adapter().digest():
        raise Fails("The file of the aligned adapter changed.")


@HOOK_CHECKS.add("random", after=["trains", "edit"])
def _random(subject: DefenseSubject) -> None:
    """Its hooks do not draw from the shared random generators, so that dropout masks are those of SFT."""
    world, plugin, draws = subject.world, subject.plugin(), dict[str, str]()
    with preserved_random_states(1):
        for stage in subject.training_stages:
            with record_shared_draws(draws, "train_on"):
                plugin.train_on(stage, world.stage_rows(stage), world.pools)
            with record_shared_draws(draws, "settings"):
                plugin.settings(stage, world.settings(SAMPLES))
        with record_shared_draws(draws, "template"):
            plugin.template("answer", world.template)
        with record_shared_draws(draws, "evaluations"):
            plugin.evaluations(list(world.questions))
    for stage in subject.stages:
        draws |= subject.observed_with_edit(stage).shared_draws
    if draws:
        hook, generator = next(iter(draws.items()))
        raise Fails(
            f"{hook} draws from {generator} shared generator; allowed: self.random, self.draw, stage.generator, "
            "or work inside stage.isolated or same_dropout."
        )


def _count_more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
