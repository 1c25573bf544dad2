"""What `hbv check` asks of defenses and attacks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example, Pools, TrainSettings
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate

from ..base import resolve_params
from .findings import Fails, Subject, a, hooks_of

_PROBE = Example("probe", "a question {with} braces", input="its input")


def undescribed(subject: Subject) -> list[str]:
    """What is missing in what a plug-in says of itself."""
    cls, problems = subject.cls, []
    if not vars(cls).get("__doc__"):
        problems.append("its class has no docstring")
    if not cls.citation and subject.hooks():
        problems.append("it has no citation (say 'unpublished' if there is none)")
    for key, info in cls.model_fields.items():
        if not info.description:
            problems.append(f"parameter {key!r} has no doc")
        if not cls.source_of(key):
            problems.append(f"parameter {key!r} has no source (where its default comes from)")
    return problems


def misdeclared(subject: Subject) -> list[str]:
    """What cannot be in what a plug-in declares, whatever its kind."""
    cls, problems = subject.cls, []
    if cls.model_fields and not subject.hooks():
        hooks = ", ".join(hooks_of(subject.base))
        problems.append(f"it has parameters but overrides no hook that would read them ({hooks})")
    if cls.neutral is not None:
        try:
            resolve_params(cls, cls.neutral)
        except BadInput as error:
            problems.append(f"its neutral setting cannot be set: {error}".rstrip("."))
    return problems


def raise_if(problems: Sequence[str]) -> None:
    """Raises `Fails` with all problems as one sentence, if there are any."""
    if problems:
        text = "; ".join(problems)
        raise Fails(f"{text[:1].upper()}{text[1:]}.")


def examples_are_sound(hook: str, rows: object) -> None:
    """Raises `Fails` where a hook did not return a list of examples with something to learn in it."""
    if not isinstance(rows, list):
        raise Fails(f"{hook} returned {a(rows)}; allowed: a list of Example.")
    if not rows:
        raise Fails(f"{hook} returned no row.")
    for number, row in enumerate(rows):
        if not isinstance(row, Example):
            raise Fails(f"{hook} returned {a(row)} as row {number}; allowed: Example.")
        if not row.instruction or not row.response:
            raise Fails(f"{hook} returned row {number} ({row.id}) without an instruction or a response.")


def settings_are_sound(settings: object) -> None:
    """Raises `Fails` where a hook did not return settings that can be trained with."""
    if not isinstance(settings, TrainSettings):
        raise Fails(f"settings returned {a(settings)}; dataclasses.replace(settings, ...) makes other TrainSettings.")
    for name in ("lr", "epochs", "batch", "accumulation", "lora_rank"):
        if not getattr(settings, name) > 0:
            raise Fails(f"settings puts {name} at {getattr(settings, name)}; allowed: more than 0.")


def template_is_sound(what: str, template: object) -> None:
    """Raises `Fails` where a prompt lost what is asked."""
    if not isinstance(template, PromptTemplate):
        raise Fails(f"{what} is {a(template)}; allowed: a PromptTemplate.")
    for text, slots in ((template.no_input, ["{instruction}"]), (template.with_input, ["{instruction}", "{input}"])):
        for slot in slots:
            if slot not in text:
                raise Fails(f"{what} has no {slot} slot: {text!r:.80}.")
    for probe in (_PROBE, replace(_PROBE, input="")):
        try:
            asked = template.render(probe)
        except (KeyError, IndexError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise Fails(f"{what} cannot be filled in ({said}): double the braces of its text.") from error
        if probe.instruction not in asked or probe.input not in asked:
            raise Fails(f"{what} does not put the question as it is.")


def sets_are_sound(sets: object) -> None:
    """Raises `Fails` where a hook did not return evaluation sets that a run can tell apart."""
    if not isinstance(sets, list) or not all(isinstance(each, EvalSet) for each in sets):
        raise Fails("evaluations returned something other than a list of EvaluationSet.")
    if not sets:
        raise Fails("evaluations returned no set: the harmful score would be of nothing.")
    names = [each.name for each in sets]
    for name in names:
        if name in ("benign", "task"):
            raise Fails(f"evaluations returned a set named {name!r}, which every run has.")
        if names.count(name) > 1:
            raise Fails(f"evaluations returned {names.count(name)} sets named {name!r}.")
    for each in sets:
        if not each.examples or each.max_new_tokens < 1:
            raise Fails(f"Set {each.name!r} asks nothing, or leaves no token for an answer.")
        template_is_sound(f"The template of set {each.name!r}", each.template)


def drawn_by_seed(pools: Pools, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether rows were drawn from a pool, given the numbers taken by two seeds.

    Raises:
        Fails: both seeds took the same rows, and not all.
    """
    drew = False
    for name, rows in one.items():
        every = len(getattr(pools, name))
        if 0 < len(rows) < every:
            if rows == other[name]:
                raise Fails(
                    f"Every seed takes the same {len(rows)} of {every} rows of pools.{name}: draw them with self.draw."
                )
            drew = True
    return drew


def differing_numbers(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether random numbers were drawn, given those of two seeds: enough of them to tell two streams apart.

    Raises:
        Fails: they are the same.
    """
    count = sum(numbers.numel() for numbers in one)
    if count < 8:
        return False
    if len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True)):
        raise Fails(f"It draws {count} random numbers, the same for every seed: stage.generator draws by the seed.")
    return True
