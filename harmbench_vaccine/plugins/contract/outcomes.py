"""What `hbv check` asks of a defense: seeds, what it comes to, interruptions, accumulation, precision, cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmbench_vaccine.core.progress import Advance
from harmbench_vaccine.core.types import StageName
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Gradient

from ..defense import Defense
from .findings import Checks, Fails, NotApplicable
from .shared import differing_numbers, drawn_by_seed
from .stages import Trial, edited, trained
from .subject import DefenseSubject, in_stages
from .watch import own_random_states
from .world import drawn

CHECKS: Checks[DefenseSubject] = Checks()
CUT = 2
"""The step at whose end a stage is interrupted."""

# ---------------------------------------------------------------------------------------------------------------------
# Seeds


@CHECKS.add("trains", "edit")
@in_stages("stages")
def deterministic(subject: DefenseSubject, stage: StageName) -> None:
    """The same seed gives the same rows and the same adapter, to the bit."""
    one, other = subject.usual(stage), subject.run(stage, subject.plugin(), salt=2)
    if one.examples != other.examples:
        raise Fails("train_on gave other rows the second time.")
    if difference := _difference(one.adapter, other.adapter):
        raise Fails(f"The second run ended with another adapter ({difference}).")


@CHECKS.add("deterministic")
@in_stages("stages")
def seeds(subject: DefenseSubject, stage: StageName) -> None:
    """Where it draws, another seed gives other draws."""
    world = subject.world
    taken, numbers = [], []
    for seed in (0, 1):
        trial, seen = subject.watched(stage, seed)
        subject.watched_edit(stage, seed)
        taken.append(drawn(world.pools, [*trial.examples, *seen.encoded], world.given(stage)))
        numbers.append(seen.draws.drawn)
    drew = drawn_by_seed(world.pools, *taken)
    drew = differing_numbers(*numbers) or drew
    if not drew:
        raise NotApplicable("It draws nothing, or too little to tell.")


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to


@CHECKS.add("facts", "deterministic", "template", "evaluations")
def acts(subject: DefenseSubject) -> None:
    """It does something: rows, questions or the adapter differ from plain SFT."""
    if not subject.hooks():
        raise NotApplicable("It overrides no hook: it is plain SFT, or leaves the stage out.")
    if subject.is_neutral():
        raise NotApplicable("It is checked at its neutral setting.")
    if not any(_departures(subject, subject.plugin(), subject.usual)):
        raise Fails(
            f"At {subject.words()} nothing differs from plain SFT, in the few steps of a check "
            "(if it acts later or seldom, NAME:key=value checks it where it acts at once)."
        )


@CHECKS.add("facts", "deterministic", "template", "evaluations")
def neutral(subject: DefenseSubject) -> None:
    """At its neutral setting it is plain SFT, to the bit."""
    if subject.cls.neutral is None:
        raise NotApplicable("It declares no setting at which it changes nothing.")
    if departure := next(
        _departures(subject, subject.neutral(), lambda stage: subject.run(stage, subject.neutral())), None
    ):
        raise Fails(f"At its neutral setting {departure}.")


def _departures(subject: DefenseSubject, plugin: Defense, run: Callable[[StageName], Trial]) -> Iterator[str]:
    """In what a defense departs from plain SFT."""
    world = subject.world
    if plugin.template("answer", world.template) != world.template:
        yield "the prompt that questions are asked with is another"
    if plugin.evaluations(list(world.questions)) != world.questions:
        yield "the sets of questions are others"
    for stage in subject.stages:
        plain, ours = subject.plain(stage), run(stage)
        if ours.rows != plain.rows:
            yield f"the {stage} stage trains on other rows"
        elif difference := _difference(ours.adapter, plain.adapter):
            yield f"the {stage} stage ends with another adapter than SFT's ({difference})"


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions, accumulation, precision, cost


@CHECKS.add("trains")
@in_stages("training")
def state(subject: DefenseSubject, stage: StageName) -> None:
    """What `state` gives comes back after `restore`, through a safetensors file."""
    (member,) = subject.watched(stage)[0].team.members
    kept = member.state()
    if not kept:
        raise NotApplicable("It keeps nothing between steps.")
    path = subject.world.new_folder() / "state.safetensors"
    save_file(kept, path)
    fresh = subject.plugin()
    fresh.restore(load_file(path))
    back = fresh.state()
    if back.keys() != kept.keys():
        raise Fails(f"What comes back has other names: {', '.join(sorted(back.keys() ^ kept.keys()))}.")
    for name, value in kept.items():
        if back[name].dtype != value.dtype or not torch.equal(back[name].cpu(), value.cpu()):
            raise Fails(f"{name!r} comes back with other numbers.")


class _Cut(Exception):
    """An interruption."""


class _Cutting:
    """A progress bar that interrupts a stage, as Ctrl-C would, at the end of step CUT."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        left = CUT

        def advance(steps: int) -> None:
            nonlocal left
            left -= steps
            if left <= 0:
                raise _Cut

        yield advance

    def note(self, text: str) -> None:
        pass


@CHECKS.add("deterministic", "state")
@in_stages("training")
def resume(subject: DefenseSubject, stage: StageName) -> None:
    """A stage that is interrupted and goes on from its checkpoint ends like one that was not, to the bit."""
    folder, whole = subject.world.new_folder(), subject.usual(stage)
    if len(whole.log) <= CUT:
        raise NotApplicable(f"The stage has {len(whole.log)} steps.")
    share = 1 / len(whole.log)
    with own_random_states(2), suppress(_Cut):
        trained(subject.begin(stage, subject.plugin()), folder, save_share=share, progress=_Cutting())
    with own_random_states(3):
        resumed = edited(trained(subject.begin(stage, subject.plugin()), folder, save_share=share))
    if difference := _difference(resumed.adapter, whole.adapter):
        raise Fails(
            f"Interrupted in step {CUT} and resumed, it ends with another adapter ({difference}): what it remembers "
            "between steps belongs into `state`."
        )


@CHECKS.add("trains")
@in_stages("training")
def accumulation(subject: DefenseSubject, stage: StageName) -> None:
    """With accumulation no micro-batch is lost: a step takes the mean of their gradients, and nothing else."""
    trial, seen = subject.watched(stage)
    if seen.left:
        raise Fails(f"{seen.left[0]} leaves something in .grad, which adds to the next step.")
    if all(len(gradients) == 1 for gradients, _ in seen.steps):
        raise NotApplicable("It sets accumulation to 1.")
    for number, (gradients, found) in enumerate(seen.steps, 1):
        expected = _mean(gradients)
        for name, ours, theirs in zip(trial.stage.trainable, expected, found, strict=True):
            if (ours is None) != (theirs is None) or (ours is not None and theirs is not None and _far(ours, theirs)):
                raise Fails(
                    f"At step {number} .grad of {name} is not the mean over {len(gradients)} micro-batches: "
                    "leave .grad, zero_grad and backward() to the trainer."
                )


@CHECKS.add("trains")
@in_stages("stages")
def bfloat16(subject: DefenseSubject, stage: StageName) -> None:
    """On a bfloat16 model it runs, its adapter stays float32, and every number is finite."""
    trial = subject.run(stage, subject.plugin(), dtype="bfloat16")
    for parameter in [*trial.values, *(factor for pair in trial.adapter.factors.values() for factor in pair)]:
        if parameter.dtype != torch.float32:
            raise Fails(f"The adapter is {parameter.dtype}.")
        if not parameter.isfinite().all():
            raise Fails("The adapter is not finite.")


@CHECKS.add("facts", "trains", "edit")
@in_stages("stages")
def cost(subject: DefenseSubject, stage: StageName) -> None:
    """The passes of a step of one micro-batch are those that it declares."""
    words = subject.plugin().passes()
    if words == "none":
        raise NotApplicable("It declares no cost a step.")
    trial, seen = subject.watched(stage)
    passes, share = seen.micro_batches, 1
    if stage == "repair":
        _, edit = subject.watched_edit(stage)
        passes, share = [edit], trial.nested.micro_batches
        if subject.training or not share:
            raise NotApplicable("Its cost a step is not of the repair stage.")
    # The dearest micro-batch; what is done beside it counts where every step does it (else it belongs to `once`).
    counted = [
        max(getattr(each, way) for each in passes) / share + min((getattr(e, way) for e in seen.around), default=0)
        for way in ("forward", "backward")
    ]
    found = f"{counted[0]:g}F {counted[1]:g}B"
    if found != words:
        raise Fails(f"It declares {words}; a step took {found}.")


def _mean(gradients: Sequence[Gradient]) -> list[Tensor | None]:
    columns = zip(*(gradient.values for gradient in gradients), strict=True)
    there = [[value for value in column if value is not None] for column in columns]
    return [torch.stack(values).sum(0) / len(gradients) if values else None for values in there]


def _far(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-5 * one.abs().max())


def _difference(one: Adapter, other: Adapter) -> str:
    """How far apart two adapters are; empty: equal to the bit."""
    if one.factors.keys() != other.factors.keys() or one.rank != other.rank:
        return "over other modules, or of another rank"
    pairs = [pair for module in one.factors for pair in zip(one.factors[module], other.factors[module], strict=True)]
    if one.scale == other.scale and all(torch.equal(a, b) for a, b in pairs):
        return ""
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return f"by up to {largest:.1e} in an entry" if largest else "of another scale"
