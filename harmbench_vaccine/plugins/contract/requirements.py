"""Requirements that `hbv check` applies to defenses and attacks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example, Pools, TrainSettings
from harmbench_vaccine.data.over_refusal import OVER_REFUSAL
from harmbench_vaccine.data.pools import RowPools, question_keys
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate

from ..base import resolve_params
from .findings import Fails, Subject, describe_value, hook_names

_PROBE = Example("probe", "a question {with} braces", input="its input")


def documentation_problems(subject: Subject, *, cited: bool = True) -> list[str]:
    """Return the gaps in the documentation of a plug-in: docstring, citation, parameters.

    Args:
        subject: The plug-in.
        cited: Whether plug-ins of its kind need a citation.
    """
    cls, problems = subject.cls, []
    if not vars(cls).get("__doc__"):
        problems.append("its class has no docstring")
    if cited and not cls.citation and subject.hooks():
        problems.append("it has no citation (write 'unpublished' if it has none)")
    for key, info in cls.model_fields.items():
        if not info.description:
            problems.append(
                f"parameter {key!r} has no description: declare it with param(DEFAULT, DESCRIPTION, source=...)"
            )
        if not cls.source_of(key):
            problems.append(f"parameter {key!r} has no source (where its default comes from)")
    return problems


def declaration_problems(subject: Subject) -> list[str]:
    """Return the contradictions in the declarations that all kinds of plug-ins share."""
    cls, problems = subject.cls, []
    if cls.model_fields and not subject.hooks():
        hooks = ", ".join(hook_names(subject.base))
        problems.append(f"it has parameters but overrides no hook that would read them ({hooks})")
    if cls.neutral is not None:
        try:
            resolve_params(cls, cls.neutral)
        except BadInput as error:
            problems.append(f"its neutral setting is not valid: {error}".rstrip("."))
    return problems


def raise_problems(problems: Sequence[str]) -> None:
    """Raise `Fails` with all problems in one sentence, if there are any."""
    if problems:
        text = "; ".join(problems)
        raise Fails(f"{text[:1].upper()}{text[1:]}.")


def require_examples(hook: str, rows: object) -> None:
    """Raise `Fails` unless a hook returned a non-empty list of examples with instructions and responses."""
    if not isinstance(rows, list):
        raise Fails(f"{hook} returned {describe_value(rows)}; allowed: a list of Example.")
    if not rows:
        raise Fails(f"{hook} returned no row.")
    for number, row in enumerate(rows):
        if not isinstance(row, Example):
            raise Fails(f"{hook} returned {describe_value(row)} as row {number}; allowed: Example.")
        if not row.instruction or not row.response:
            raise Fails(f"{hook} returned row {number} ({row.id}) without an instruction or a response.")


def require_settings(settings: object) -> None:
    """Raise `Fails` unless `settings` returned settings that training can use."""
    if not isinstance(settings, TrainSettings):
        raise Fails(
            f"settings returned {describe_value(settings)}; allowed: TrainSettings, for example "
            "dataclasses.replace(settings, ...)."
        )
    for name in ("lr", "epochs", "batch", "accumulation", "lora_rank"):
        if not getattr(settings, name) > 0:
            raise Fails(f"settings sets {name} to {getattr(settings, name)}; allowed: more than 0.")


def require_template(name: str, template: object) -> None:
    """Raise `Fails` unless a prompt template contains the instruction and the input of a row unchanged."""
    if not isinstance(template, PromptTemplate):
        raise Fails(f"{name} is {describe_value(template)}; allowed: a PromptTemplate.")
    for text, slots in ((template.no_input, ["{instruction}"]), (template.with_input, ["{instruction}", "{input}"])):
        for slot in slots:
            if slot not in text:
                raise Fails(f"{name} has no {slot} slot: {text!r:.80}.")
    for probe in (_PROBE, replace(_PROBE, input="")):
        try:
            prompt = template.render(probe)
        except (KeyError, IndexError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Fails(f"{name} cannot be rendered ({reason}): double the braces of its text.") from error
        if probe.instruction not in prompt or probe.input not in prompt:
            raise Fails(f"{name} changes the question.")


def require_eval_sets(sets: object) -> None:
    """Raise `Fails` unless `evaluations` returned evaluation sets with unique names."""
    if not isinstance(sets, list) or not all(isinstance(eval_set, EvalSet) for eval_set in sets):
        raise Fails("evaluations returned something other than a list of EvalSet.")
    if not sets:
        raise Fails("evaluations returned no set, so the harmful score cannot be computed.")
    names = [eval_set.name for eval_set in sets]
    for name in names:
        if name in ("benign", "task"):
            raise Fails(f"evaluations returned a set named {name!r}, which every run has.")
        if name in OVER_REFUSAL:
            raise Fails(f"evaluations returned a set named {name!r}, which --over-refusal adds to a run.")
        if names.count(name) > 1:
            raise Fails(f"evaluations returned {names.count(name)} sets named {name!r}.")
    for eval_set in sets:
        if not eval_set.examples or eval_set.max_new_tokens < 1:
            raise Fails(f"Set {eval_set.name!r} has no question, or allows no token for an answer.")
        require_template(f"The template of set {eval_set.name!r}", eval_set.template)


def require_division(before: RowPools, after: object) -> None:
    """Raise `Fails` unless `divide` returned existing rows for each user, and left the evaluation unchanged."""
    if not isinstance(after, RowPools):
        raise Fails(
            f"divide returned {describe_value(after)}; allowed: RowPools, such as dataclasses.replace(rows, ...)."
        )
    existing = {*_defender_rows(before), *before.attacker, *before.benign}
    defender = _defender_rows(after)
    if added := [row.id for row in (*defender, *after.attacker, *after.benign) if row not in existing]:
        raise Fails(f"divide returned the row {added[0]!r}, which the data do not have.")
    evaluation = ("harmful_questions", "benign_questions")
    if changed := [name for name in evaluation if getattr(before, name) != getattr(after, name)]:
        raise Fails(f"divide changes {changed[0]}, which every run is evaluated on.")
    for name, questions in after.question_sets.items():
        if name in ("harmful", "benign", "task") or not set(questions) <= set(after.harmful_questions):
            raise Fails(
                f"divide names the set {name!r}, which every run has or which is not part of harmful_questions."
            )
    others = question_keys([*defender, *after.harmful_questions])
    if shared := question_keys(after.attacker) & others:
        raise Fails(
            f"After divide, the attacker and the defender or the evaluation share the question {min(shared)!r}."
        )


def _defender_rows(rows: RowPools) -> list[Example]:
    return [*rows.alignment, *(row for pair in rows.paired for row in pair)]


def draws_rows_by_seed(pools: Pools, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether a plug-in draws rows from a pool.

    Args:
        pools: The pools of the world.
        first: Pool -> the row numbers that it takes with one seed.
        second: The same with another seed.

    Raises:
        Fails: Both seeds take the same rows, but not all rows of the pool.
    """
    draws = False
    for name, rows in first.items():
        size = len(getattr(pools, name))
        if 0 < len(rows) < size:
            if rows == second[name]:
                raise Fails(
                    f"Every seed takes the same {len(rows)} of {size} rows of pools.{name}: draw them with self.draw."
                )
            draws = True
    return draws


def draws_numbers_by_seed(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether a plug-in draws random numbers: at least 8, so that two streams are distinguishable.

    Args:
        first: The numbers that it draws with one seed.
        second: The numbers that it draws with another seed.

    Raises:
        Fails: The numbers are equal.
    """
    count = sum(numbers.numel() for numbers in first)
    if count < 8:
        return False
    if len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True)):
        raise Fails(f"It draws {count} random numbers, the same for every seed: stage.generator draws by the seed.")
    return True
