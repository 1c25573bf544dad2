"""Checks of the results of a defense: seeds, departures from SFT, interruptions, accumulation, precision, cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmbench_vaccine.core.progress import Advance, Silent
from harmbench_vaccine.core.types import Pools, StageName
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Gradient, SeparateRun

from ..defense import Defense, SeparateTraining, TrainedPool
from .attributes import copy_attributes, differing_attributes, list_names
from .defense_subject import DefenseSubject, for_stages
from .findings import Checks, Fails, NotApplicable
from .generation import chosen_tokens, steering_of
from .observation import preserved_random_states
from .requirements import draws_numbers_by_seed, draws_rows_by_seed
from .trials import Trial, edit_trial, train_trial
from .world import drawn_pool_rows

OUTCOME_CHECKS: Checks[DefenseSubject] = Checks()
CUT = 2
"""The number of steps after which a stage is interrupted."""

# ---------------------------------------------------------------------------------------------------------------------
# Seeds


@OUTCOME_CHECKS.add("deterministic", after=["trains", "edit"])
@for_stages("stages")
def _deterministic(subject: DefenseSubject, stage: StageName) -> None:
    """The same seed gives the same rows and the same adapter, to the bit."""
    first, second = subject.defended(stage), subject.run(stage, subject.plugin(), salt=2)
    if first.examples != second.examples:
        raise Fails("The second call of train_on returned different rows.")
    if difference := _difference(first.adapter, second.adapter):
        raise Fails(f"The second run ended with a different adapter ({difference}).")


@OUTCOME_CHECKS.add("seeds", after=["deterministic"])
@for_stages("stages")
def _seeds(subject: DefenseSubject, stage: StageName) -> None:
    """If it draws, different seeds give different draws."""
    world = subject.world
    rows, numbers = [], []
    for seed in (0, 1):
        trial, observation = subject.observed(stage, seed)
        subject.observed_edit(stage, seed)
        examples = [*trial.examples, *observation.encoded]
        rows.append(drawn_pool_rows(world.pools, examples, world.stage_rows(stage)))
        numbers.append(observation.draws.numbers)
    draws = draws_rows_by_seed(world.pools, *rows)
    draws = draws_numbers_by_seed(*numbers) or draws
    if not draws:
        raise NotApplicable("It draws nothing, or too little to compare two seeds.")


# ---------------------------------------------------------------------------------------------------------------------
# Departures from SFT


@OUTCOME_CHECKS.add("acts", after=["facts", "deterministic", "template", "evaluations"])
def _acts(subject: DefenseSubject) -> None:
    """It has an effect: rows, questions or the adapter differ from plain SFT."""
    if not subject.hooks():
        raise NotApplicable("It overrides no hook: it is plain SFT, or skips the stage.")
    if subject.is_neutral():
        raise NotApplicable("It is checked at its neutral setting.")
    if not any(_departures(subject, subject.plugin(), subject.defended)):
        raise Fails(
            f"At {subject.setting()} nothing differs from plain SFT, in the few steps of a check "
            "(if it acts later or rarely, set parameters with NAME:key=value at which it acts at once)."
        )


@OUTCOME_CHECKS.add("neutral", after=["facts", "deterministic", "template", "evaluations"])
def _neutral(subject: DefenseSubject) -> None:
    """At its neutral setting it is plain SFT, to the bit."""
    if subject.cls.neutral is None:
        raise NotApplicable("It declares no neutral setting.")

    def neutral_trial(stage: StageName) -> Trial:
        return subject.run(stage, subject.neutral_plugin())

    if departure := next(_departures(subject, subject.neutral_plugin(), neutral_trial), None):
        raise Fails(f"At its neutral setting {departure}.")


def _departures(subject: DefenseSubject, plugin: Defense, run: Callable[[StageName], Trial]) -> Iterator[str]:
    """Yield the differences between a defense and plain SFT."""
    world = subject.world
    if plugin.template("answer", world.template) != world.template:
        yield "the prompt of the questions changes"
    if plugin.evaluations(list(world.questions)) != world.questions:
        yield "the evaluation sets change"
    pairs = [
        (question.instruction, question.instruction) for eval_set in world.questions for question in eval_set.examples
    ]
    if plugin.answer(pairs, world.judge) != [answer for _, answer in pairs]:
        yield "answers change"
    if plugin.chooses_tokens and any(chosen_tokens(world, plugin)):
        yield "the first tokens of answers change"
    if plugin.steers and any(bool(vector.any()) for vector in steering_of(world, plugin).values()):
        yield "the hidden states of answers change"
    for stage in subject.stages:
        plain, defended = subject.undefended(stage), run(stage)
        if defended.rows != plain.rows:
            yield f"the {stage} stage trains on different rows"
        elif difference := _difference(defended.adapter, plain.adapter):
            yield f"the {stage} stage ends with a different adapter than SFT ({difference})"


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions, accumulation, precision, cost


@OUTCOME_CHECKS.add("state", after=["trains"])
@for_stages("training_stages")
def _state(subject: DefenseSubject, stage: StageName) -> None:
    """`restore` brings back the values of `state`, through a safetensors file, and everything that `before` sets."""
    (member,) = subject.observed(stage)[0].team.members
    values = member.state()
    restored = _restored(subject, values).state()
    if restored.keys() != values.keys():
        raise Fails(f"The restored state has different names: {', '.join(sorted(restored.keys() ^ values.keys()))}.")
    for name, value in values.items():
        if restored[name].dtype != value.dtype or not torch.equal(restored[name].cpu(), value.cpu()):
            raise Fails(f"The restored state has different numbers in {name!r}.")
    in_before, in_steps = _lost_attributes(subject, stage)
    if in_before:
        raise Fails(
            f"Attribute {list_names(in_before)} changes in before() and is not in state(): a resumed run differs, "
            "because before() does not run again."
        )
    if not values and in_steps:
        raise NotApplicable(f"state() is empty; {list_names(in_steps)} changes in the steps: see 'resume'.")
    if not values:
        raise NotApplicable("It has no state between steps.")


def _lost_attributes(subject: DefenseSubject, stage: StageName) -> tuple[list[str], list[str]]:
    """Return the attributes that `restore` loses: those that change in `before`, and those that change in the steps."""
    trial, observation = subject.observed(stage)
    (member,) = trial.team.members
    end = copy_attributes(member)
    lost = differing_attributes(copy_attributes(_restored(subject, member.state())), end)
    in_before = differing_attributes(observation.created, observation.prepared)
    in_steps = differing_attributes(observation.prepared, end)
    return [name for name in lost if name in in_before], [name for name in lost if name in in_steps]


def _restored(subject: DefenseSubject, state: dict[str, Tensor]) -> Defense:
    """Return a new copy of the defense that has the state of a checkpoint."""
    path = subject.world.new_folder() / "state.safetensors"
    save_file(state, path)
    plugin = subject.plugin()
    plugin.restore(load_file(path))
    return plugin


class _Interruption(Exception):
    """An interruption of training, like Ctrl-C."""


class _InterruptingProgress(Silent):
    """A progress bar that interrupts a stage at the end of step CUT."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Yield a callback that raises after CUT steps."""
        remaining = CUT

        def advance(steps: int, detail: str = "", seconds_left: float | None = None) -> None:
            nonlocal remaining
            remaining -= steps
            if remaining <= 0:
                raise _Interruption

        yield advance


@OUTCOME_CHECKS.add("resume", after=["deterministic", "state"])
@for_stages("training_stages")
def _resume(subject: DefenseSubject, stage: StageName) -> None:
    """A stage that is interrupted and resumed from its checkpoint ends like an uninterrupted one, to the bit."""
    folder, uninterrupted = subject.world.new_folder(), subject.defended(stage)
    if len(uninterrupted.log) <= CUT:
        raise NotApplicable(f"The stage has {len(uninterrupted.log)} steps.")
    share = 1 / len(uninterrupted.log)
    with preserved_random_states(2), suppress(_Interruption):
        trial = subject.begin(stage, subject.plugin())
        train_trial(trial, folder, save_share=share, progress=_InterruptingProgress())
    with preserved_random_states(3):
        resumed = edit_trial(train_trial(subject.begin(stage, subject.plugin()), folder, save_share=share))
    if difference := _difference(resumed.adapter, uninterrupted.adapter):
        _, in_steps = _lost_attributes(subject, stage)
        cause = "`state` must return everything that it remembers between steps"
        if in_steps:
            cause = f"attribute {list_names(in_steps)} changes in the steps and is not in state()"
        raise Fails(f"Interrupted in step {CUT} and resumed, it ends with a different adapter ({difference}): {cause}.")


@OUTCOME_CHECKS.add("accumulation", after=["trains"])
@for_stages("training_stages")
def _accumulation(subject: DefenseSubject, stage: StageName) -> None:
    """With accumulation no micro-batch is lost: a step uses the mean of their gradients, and nothing else."""
    trial, observation = subject.observed(stage)
    if observation.leftovers:
        raise Fails(f"{observation.leftovers[0]} leaves a value in .grad, which is added to the next step.")
    if all(len(gradients) == 1 for gradients, _ in observation.steps):
        raise NotApplicable("It sets accumulation to 1.")
    for number, (gradients, actual) in enumerate(observation.steps, 1):
        expected = _mean(gradients)
        for name, ours, theirs in zip(trial.stage.trainable, expected, actual, strict=True):
            if (ours is None) != (theirs is None) or (ours is not None and theirs is not None and _far(ours, theirs)):
                raise Fails(
                    f"At step {number} .grad of {name} is not the mean over {len(gradients)} micro-batches: "
                    "leave .grad, zero_grad and backward() to the trainer."
                )


@OUTCOME_CHECKS.add("bfloat16", after=["trains"])
@for_stages("stages")
def _bfloat16(subject: DefenseSubject, stage: StageName) -> None:
    """It runs on a bfloat16 model, its adapter stays float32, and every number is finite."""
    trial = subject.run(stage, subject.plugin(), dtype="bfloat16")
    for parameter in [*trial.values, *(factor for pair in trial.adapter.factors.values() for factor in pair)]:
        if parameter.dtype != torch.float32:
            raise Fails(f"The adapter is {parameter.dtype}.")
        if not parameter.isfinite().all():
            raise Fails("The adapter is not finite.")


@OUTCOME_CHECKS.add("cost", after=["facts", "trains", "edit"])
@for_stages("stages")
def _cost(subject: DefenseSubject, stage: StageName) -> None:
    """The number of passes in a step of one micro-batch is the declared cost."""
    declared = subject.plugin().passes(stage)
    if declared == "none":
        raise NotApplicable("It declares no cost of a step.")
    trial, observation = subject.observed(stage)
    passes, share = observation.micro_batches, 1
    if stage == "repair":
        _, edit = subject.observed_edit(stage)
        passes, share = [edit], trial.nested.micro_batches
        if subject.training_stages or not share:
            raise NotApplicable("Its cost of a step does not include the repair stage.")
    # The maximum over micro-batches. Passes outside of `gradient` count if every step has them; others are in `once`.
    outside = observation.outside_gradient
    counts = [
        max(getattr(counter, way) for counter in passes) / share
        + min((getattr(counter, way) for counter in outside), default=0)
        for way in ("forward", "backward")
    ]
    counted = f"{counts[0]:g}F {counts[1]:g}B"
    if counted != declared:
        raise Fails(f"It declares {declared}; a step took {counted}.")


@OUTCOME_CHECKS.add("separate", after=["trains", "edit"])
@for_stages("stages")
def _separate(subject: DefenseSubject, stage: StageName) -> None:
    """The trainings inside a stage are those that `separate_trainings` declares, in their order."""
    trial, _ = subject.observed(stage)
    subject.observed_edit(stage)
    declared = subject.plugin().separate_trainings(stage)
    requests = [_described(*pair, trial.stage.pools) for pair in zip_longest(trial.nested.requests, declared)]
    if requests != list(declared):
        raise Fails(
            f"separate_trainings declares {_trainings_text(declared)}; the stage requested {_trainings_text(requests)}."
        )
    if not declared:
        raise NotApplicable("It requests no training inside a stage.")


def _described(request: SeparateRun | None, declared: SeparateTraining | None, pools: Pools) -> SeparateTraining | None:
    """Return a request as a declaration, with its rows in the form of the declared ones; None: no request."""
    if request is None:
        return None
    names = [name for name in get_args(TrainedPool) if list(getattr(pools, name)) == list(request.rows)]
    rows = names[0] if names else len(request.rows)
    if declared and not isinstance(declared.rows, str):
        rows = declared.rows and len(request.rows)
    return SeparateTraining(request.purpose, rows, request.steps, request.start is not None, request.on_base)


def _trainings_text(trainings: Sequence[SeparateTraining | None]) -> str:
    return ", ".join(str(training) for training in trainings if training) or "none"


def _mean(gradients: Sequence[Gradient]) -> list[Tensor | None]:
    columns = zip(*(gradient.values for gradient in gradients), strict=True)
    tensors = [[value for value in column if value is not None] for column in columns]
    return [torch.stack(values).sum(0) / len(gradients) if values else None for values in tensors]


def _far(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-5 * first.abs().max())


def _difference(first: Adapter, second: Adapter) -> str:
    """Describe the difference of two adapters; empty if they are equal to the bit."""
    if first.factors.keys() != second.factors.keys() or first.rank != second.rank:
        return "over different modules, or of a different rank"
    pairs = [
        pair for module in first.factors for pair in zip(first.factors[module], second.factors[module], strict=True)
    ]
    if first.scale == second.scale and all(torch.equal(a, b) for a, b in pairs):
        return ""
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return f"by up to {largest:.1e} in an entry" if largest else "of a different scale"
