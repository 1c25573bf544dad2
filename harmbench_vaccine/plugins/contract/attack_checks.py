"""Checks of an attack."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmbench_vaccine.core.types import Mix
from harmbench_vaccine.training.trainer import train

from ..attack import Attack
from ..registry import ATTACKS
from ..teams import DefenseTeam
from .attack_subject import AttackSubject
from .findings import Checks, Fails, NotApplicable, describe_value
from .observation import preserved_random_states, record_shared_draws
from .requirements import (
    declaration_problems,
    documentation_problems,
    draws_rows_by_seed,
    raise_problems,
    require_division,
    require_eval_sets,
    require_examples,
    require_settings,
)
from .world import LONGEST, PAD, SAMPLES, drawn_pool_rows

ATTACK_CHECKS: Checks[AttackSubject] = Checks()


@ATTACK_CHECKS.add("described")
def _described(subject: AttackSubject) -> None:
    """It has a docstring and a citation, and every parameter has a description and a source of its default."""
    raise_problems(documentation_problems(subject))


@ATTACK_CHECKS.add("facts")
def _facts(subject: AttackSubject) -> None:
    """Its declarations are valid: excluded attacks, neutral setting."""
    cls, problems, known = subject.cls, declaration_problems(subject), ATTACKS.entries()
    for name in cls.excludes:
        if name != "*" and name not in known:
            problems.append(f"it excludes the unknown attack {name!r}, allowed: *, {', '.join(known)}")
    if not cls.trains and cls.ablate is Attack.ablate:
        problems.append("it does not train and does not override `ablate`")
    raise_problems(problems)


# ---------------------------------------------------------------------------------------------------------------------
# Return values of the hooks


@ATTACK_CHECKS.add("mix")
def _mix(subject: AttackSubject) -> None:
    """The mix has at least one row and a proportion of harmful rows between 0 and 1."""
    for before in (Mix(SAMPLES), subject.input_mix):
        after = subject.plugin().mix(before)
        if not isinstance(after, Mix):
            raise Fails(
                f"mix returned {describe_value(after)}; allowed: a Mix, for example dataclasses.replace(mix, ...)."
            )
        if after.samples < 1 or not 0 <= (after.ratio or 0) <= 1:
            raise Fails(f"mix returned {after.samples} rows and a ratio of {after.ratio}.")


@ATTACK_CHECKS.add("divide")
def _divide(subject: AttackSubject) -> None:
    """The attacker shares no question with defender and evaluation, no row is new, and the evaluation is unchanged."""
    before = subject.world.row_pools
    rows = deepcopy(before)
    after = subject.plugin().divide(rows)
    if rows != before:
        raise Fails("divide changes its argument, which other runs use; allowed: dataclasses.replace(rows, ...).")
    require_division(before, after)


@ATTACK_CHECKS.add("upload", after=["mix", "divide"])
def _upload(subject: AttackSubject) -> None:
    """The upload is a list of examples, and not empty."""
    subject.require_training()
    plugin = subject.plugin()
    require_examples("upload", plugin.upload(subject.input_rows(plugin), subject.pools(plugin)))


@ATTACK_CHECKS.add("filter", after=["upload"])
def _filter(subject: AttackSubject) -> None:
    """The filter returns some of the uploaded rows, unchanged and in their order."""
    subject.require_training()
    plugin = subject.plugin()
    uploaded = subject.chosen_rows(plugin, plugin.upload(subject.input_rows(plugin), subject.pools(plugin)))
    require_examples("select", uploaded)
    accepted = plugin.filter(list(uploaded), subject.world.judge)
    require_examples("filter", accepted)
    remaining = iter(uploaded)
    if not all(row in remaining for row in accepted):
        raise Fails("filter returned a row that was not uploaded, a changed row, or another order.")


@ATTACK_CHECKS.add("settings")
def _settings(subject: AttackSubject) -> None:
    """The training settings of the user are TrainSettings with positive values."""
    subject.require_training()
    require_settings(subject.plugin().settings(subject.world.settings(SAMPLES)))


@ATTACK_CHECKS.add("evaluations")
def _evaluations(subject: AttackSubject) -> None:
    """The sets of harmful questions are evaluation sets with unique names."""
    require_eval_sets(subject.plugin().evaluations(list(subject.world.questions)))


@ATTACK_CHECKS.add("trains", after=["filter", "settings"])
def _trains(subject: AttackSubject) -> None:
    """A user stage on its rows runs with its settings, and changes the model."""
    subject.require_training()
    plugin, world = subject.plugin(), subject.world
    uploaded = subject.chosen_rows(plugin, plugin.upload(subject.input_rows(plugin), subject.pools(plugin)))
    rows = plugin.filter(uploaded, world.judge)
    settings = plugin.settings(world.settings(SAMPLES))
    settings = replace(settings, epochs=min(settings.epochs, LONGEST / math.ceil(len(rows) / settings.batch)))
    stage = subject.stage(aligned=not settings.full)
    stack = stage.stack
    stage.trainable = stack.train_all_weights() if settings.full else stack.train(stage.below, settings, stage.seed)
    start = stage.values()
    with preserved_random_states(1):
        train(stage, DefenseTeam(), stage.encode(rows), settings, world.new_folder(), pad=PAD, save_share=1.0)
    if not all(value.isfinite().all() for value in stage.values()):
        raise Fails("After a few steps the model is not finite.")
    if all(torch.equal(before, after) for before, after in zip(start, stage.values(), strict=True)):
        raise Fails("After a few steps the model is unchanged, to the bit.")


@ATTACK_CHECKS.add("ablate")
def _ablate(subject: AttackSubject) -> None:
    """The edited model has different weights of the same shapes, all finite, and still answers."""
    subject.require_edit()
    model = subject.edited_model()
    for name, value in model.after.items():
        if name in model.before and value.shape != model.before[name].shape:
            raise Fails(f"The edit changes {name} from {tuple(model.before[name].shape)} to {tuple(value.shape)}.")
        if not value.isfinite().all():
            raise Fails(f"{name} is not finite after the edit.")
    if missing := sorted(model.before.keys() - model.after.keys()):
        raise Fails(f"{missing[0]} is missing after the edit.")
    if all(torch.equal(value, model.after[name]) for name, value in model.before.items()):
        raise Fails("Every weight is unchanged, to the bit.")
    if not model.logits.isfinite().all():
        raise Fails("The logits of the edited model are not finite.")


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


@ATTACK_CHECKS.add("random", after=["filter", "settings", "evaluations", "ablate"])
def _random(subject: AttackSubject) -> None:
    """Its hooks do not draw from the shared random generators."""
    world, plugin, draws = subject.world, subject.plugin(), dict[str, str]()
    with preserved_random_states(1):
        if subject.cls.trains:
            with record_shared_draws(draws, "mix"):
                plugin.mix(subject.input_mix)
            with record_shared_draws(draws, "divide"):
                plugin.divide(world.row_pools)
            rows = subject.input_rows(subject.plugin())
            with record_shared_draws(draws, "upload"):
                rows = plugin.upload(rows, subject.pools(plugin))
            with record_shared_draws(draws, "select", "torch's"):  # `isolated` restores torch's
                rows = subject.chosen_rows(plugin, rows)
            with record_shared_draws(draws, "filter"):
                plugin.filter(rows, world.judge)
            with record_shared_draws(draws, "settings"):
                plugin.settings(world.settings(SAMPLES))
        if not subject.cls.trains or subject.stresses:
            draws |= subject.edited_model().shared_draws
        with record_shared_draws(draws, "evaluations"):
            plugin.evaluations(list(world.questions))
    if draws:
        hook, generator = next(iter(draws.items()))
        raise Fails(
            f"{hook} draws from {generator} shared generator; allowed: self.random, self.draw, stage.generator."
        )


@ATTACK_CHECKS.add("deterministic", after=["filter", "settings", "evaluations", "ablate"])
def _deterministic(subject: AttackSubject) -> None:
    """The same seed gives the same rows, settings, questions and weights, to the bit."""
    with preserved_random_states(1):
        first = subject.hook_results(subject.plugin())
    with preserved_random_states(2):
        second = subject.hook_results(subject.plugin())
    if hook := _differing_hook(first, second):
        raise Fails(f"The second call of {hook} returned a different result.")
    edits = not subject.cls.trains or subject.stresses
    if edits and not _same_weights(subject.edited_model().after, subject.edited_model(salt=2).after):
        raise Fails("The second edit of the weights gave different ones.")


@ATTACK_CHECKS.add("seeds", after=["deterministic"])
def _seeds(subject: AttackSubject) -> None:
    """If it draws, different seeds give different draws."""
    pools, inputs = subject.world.pools, subject.input_rows(subject.plugin())
    if subject.cls.trains:
        plugins = [subject.plugin(seed) for seed in (0, 1)]
        uploads = [plugin.upload(list(inputs), subject.pools(plugin)) for plugin in plugins]
    else:
        uploads, inputs = [subject.edited_model(seed).encoded for seed in (0, 1)], []
    if not draws_rows_by_seed(pools, *(drawn_pool_rows(pools, rows, inputs) for rows in uploads)):
        raise NotApplicable("It draws no rows.")


# ---------------------------------------------------------------------------------------------------------------------
# Effect


@ATTACK_CHECKS.add("acts", after=["facts", "deterministic"])
def _acts(subject: AttackSubject) -> None:
    """It has an effect: rows, settings, questions or weights differ from those of a benign user."""
    if not subject.hooks():
        raise NotApplicable("It overrides no hook: it is a benign user.")
    if subject.is_neutral():
        raise NotApplicable("It is checked at its neutral setting.")
    if subject.cls.trains and not _differing_hook(
        subject.hook_results(subject.plugin()), subject.hook_results(Attack())
    ):
        raise Fails(f"At {subject.setting()} nothing differs from a benign user.")


@ATTACK_CHECKS.add("neutral", after=["facts", "deterministic"])
def _neutral(subject: AttackSubject) -> None:
    """At its neutral setting it changes no row, setting or question."""
    if subject.cls.neutral is None:
        raise NotApplicable("It declares no neutral setting.")
    plugin = subject.cls(**subject.cls.neutral).seeded(0)
    if hook := _differing_hook(subject.hook_results(plugin), subject.hook_results(Attack())):
        raise Fails(f"At its neutral setting {hook} has an effect.")


@ATTACK_CHECKS.add("bfloat16", after=["ablate"])
def _bfloat16(subject: AttackSubject) -> None:
    """An edited bfloat16 model stays bfloat16 and finite."""
    subject.require_edit()
    model = subject.edited_model(dtype="bfloat16")
    for name, value in model.after.items():
        if value.dtype != model.before.get(name, value).dtype:
            raise Fails(f"{name} is {value.dtype} after the edit.")
        if not value.isfinite().all():
            raise Fails(f"{name} is not finite after the edit.")


def _differing_hook(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return the first hook whose results differ, or an empty text."""
    return next((hook for hook in first if first[hook] != second[hook]), "")


def _same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
