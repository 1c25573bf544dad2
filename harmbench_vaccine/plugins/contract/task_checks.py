"""Checks of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from harmbench_vaccine.core.errors import BadInput, HbvError, shortened
from harmbench_vaccine.core.types import Example, Grade
from harmbench_vaccine.data.pools import question_key, question_keys
from harmbench_vaccine.data.sources import is_available

from ..answer_text import comparable_text
from .attributes import copy_attributes, differing_attributes, list_names
from .findings import Checks, Fails, NotApplicable, describe_value
from .observation import preserved_random_states
from .requirements import declaration_problems, documentation_problems, raise_problems, require_examples
from .side_effects import observe_side_effects
from .task_subject import RULES, TaskSubject, answered

_ODD_ANSWERS = {
    "an empty answer": "",
    "white space": " \n\t",
    "an answer of 100,000 characters": "word " * 20_000,
    "a number of 5000 digits": "1" * 5000,
    "Unicode text": "é ß 中文 🙂 \u200b \u0661\u00bd \ud83d",
    "control tokens": "<|im_end|></s>[/INST]<|eot_id|><|begin_of_text|>",
    "braces and escapes": "{question} %s \\boxed{} #### ####",
}
_ODD_VALUES: tuple[Any, ...] = ("", " ", "1/0", -1, 0.5, 10**400, True, [], {})
"""Values of a field that a damaged row may have."""
_ROW_ERRORS = (IndexError, KeyError, TypeError, ValueError, AttributeError)
"""Errors of `example` that the harness reports as a damaged row."""

TASK_CHECKS: Checks[TaskSubject] = Checks()


@TASK_CHECKS.add("described")
def _described(subject: TaskSubject) -> None:
    """It has a docstring, and every parameter has a description and a source of its default."""
    raise_problems(documentation_problems(subject, cited=False))


@TASK_CHECKS.add("facts")
def _facts(subject: TaskSubject) -> None:
    """Its declarations are valid: data set, fields, chance, length of an answer, name of the score."""
    cls, problems = subject.cls, declaration_problems(subject)
    if not 0 <= cls.chance <= 100:
        problems.append(f"chance is {cls.chance}, allowed: a percentage from 0 to 100")
    if cls.max_new_tokens < 1:
        problems.append(f"max_new_tokens is {cls.max_new_tokens}, allowed: 1 or more")
    if not cls.measure:
        problems.append("measure is empty, allowed: the name of the score")
    for name in cls.scoring_only:
        if name not in cls.model_fields:
            problems.append(f"scoring_only names the unknown parameter {name!r}")
    raise_problems(problems)


@TASK_CHECKS.add("parameters")
def _parameters(subject: TaskSubject) -> None:
    """Every parameter refuses values that are not of its type."""
    for name in subject.cls.model_fields:
        try:
            subject.plugin(**{name: object()})
        except BadInput:
            continue
        raise Fails(f"Parameter {name!r} accepts any value: annotate it with a type, such as str or float.")


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@TASK_CHECKS.add("rows", after=["facts"])
def _rows(subject: TaskSubject) -> None:
    """It has training rows and test items, with instructions, responses and targets."""
    for name, rows in zip(("training rows", "test items"), subject.rows, strict=True):
        require_examples(f"rows, as {name},", rows)
        if not subject.plugin().graded and (empty := [row for row in rows if not row.target]):
            raise Fails(f"Row {empty[0].id} has no target, with which an answer is compared.")


@TASK_CHECKS.add("data", after=["rows"])
def _data(subject: TaskSubject) -> None:
    """It reads only data sets that it declares, and they are on this machine."""
    read: list[str] = []
    task = subject.plugin()

    def record(dataset: str, split: str) -> list[Example]:
        read.append(dataset)
        return subject.convert(task, dataset, split)

    subject.rows_of(task, record)
    for name in read:
        if name not in task.datasets:
            raise Fails(f"rows reads {name!r}, but `datasets` names only {', '.join(task.datasets)}.")
    for name in sorted(subject.placeholders):
        raise NotApplicable(
            f"Data set {name!r} is not on this machine: the checks use placeholders, texts in the fields "
            f"{', '.join(task.fields)}."
        )


@TASK_CHECKS.add("fields", after=["rows"])
def _fields(subject: TaskSubject) -> None:
    """A row with only the declared fields is sufficient."""
    for values in _sample_values(subject):
        if missing := [name for name in subject.cls.fields if name not in values]:
            raise Fails(f"`fields` declares {missing[0]!r}, but a row has {', '.join(values)}.")
        declared = {name: values[name] for name in subject.cls.fields}
        try:
            subject.plugin().example("row", declared)
        except KeyError as error:
            raise Fails(f"example reads the field {error}, which `fields` does not declare.") from error


@TASK_CHECKS.add("damaged rows", after=["rows"])
def _damaged_rows(subject: TaskSubject) -> None:
    """A damaged row is converted, or refused with a ValueError."""
    values = next(_sample_values(subject))
    for name in subject.cls.fields:
        for odd in _ODD_VALUES:
            try:
                subject.plugin().example("row", {**values, name: odd})
            except _ROW_ERRORS:
                continue
            except Exception as error:
                raise Fails(
                    f"example raised {type(error).__name__} for {name}={shortened(repr(odd), 20)}: raise a ValueError "
                    "with the reason, which the harness reports with the line of the row."
                ) from error


def _sample_values(subject: TaskSubject) -> Iterator[Mapping[str, Any]]:
    """Yield the values of the first row of each split that the task reads."""
    for rows in subject.sources.values():
        yield rows[0].values


@TASK_CHECKS.add("rows repeat", after=["rows"])
def _rows_repeat(subject: TaskSubject) -> None:
    """The rows are equal each time that they are read."""
    for salt in (1, 2):
        with preserved_random_states(salt):
            again = subject.rows_of(subject.plugin())
        for name, rows, first in zip(("training rows", "test items"), again, subject.rows, strict=True):
            if rows != first:
                raise Fails(f"The {name} differ when they are read again: draw with a fixed seed, or not at all.")


@TASK_CHECKS.add("unique", after=["rows"])
def _unique(subject: TaskSubject) -> None:
    """No row occurs twice, and no test question has two targets."""
    ids = [row.id for rows in subject.rows for row in rows]
    if len(set(ids)) < len(ids):
        double = next(name for name in ids if ids.count(name) > 1)
        raise Fails(f"Row {double} occurs {ids.count(double)} times among the training rows and test items.")
    targets: dict[str, str] = {}
    for item in subject.rows[1]:
        first = targets.setdefault(question_key(item), item.target)
        if first != item.target:
            raise Fails(f"Test item {item.id} repeats the question of another one, with another target.")


@TASK_CHECKS.add("held out", after=["unique"])
def _held_out(subject: TaskSubject) -> None:
    """No question of a test item is also in a training row."""
    rows, items = subject.rows
    shared = question_keys(rows) & question_keys(items)
    if shared:
        raise Fails(
            f"{len(shared)} of {len(question_keys(items))} test questions are also in training rows, such as "
            f"{shortened(min(shared))!r}."
        )


@TASK_CHECKS.add("fewer rows", after=["rows"])
def _fewer_rows(subject: TaskSubject) -> None:
    """It works with half of the rows of each split."""
    task = subject.plugin()

    def half(dataset: str, split: str) -> list[Example]:
        rows = subject.convert(task, dataset, split)
        return rows[: max(1, len(rows) // 2)]

    for name, rows in zip(("training rows", "test items"), subject.rows_of(task, half), strict=True):
        if not rows:
            raise Fails(f"With half of the rows of each split, it has no {name}.")


@TASK_CHECKS.add("training key", after=["rows"])
def _training_key(subject: TaskSubject) -> None:
    """A parameter in `scoring_only` changes no training row."""
    for name in subject.cls.scoring_only:
        for value in _other_values(subject, name):
            try:
                rows, _ = subject.rows_of(subject.plugin(**{name: value}))
            except (Fails, NotApplicable):  # the rows are not valid with this value
                continue
            if list(map(_trained_text, rows)) != list(map(_trained_text, subject.rows[0])):
                raise Fails(f"{name}={value} changes a training row: remove {name!r} from `scoring_only`.")


def _other_values(subject: TaskSubject, name: str) -> list[Any]:
    """Return the other values of a parameter that has a fixed list of them."""
    kind = subject.cls.model_fields[name].annotation
    values = get_args(kind) if get_origin(kind) is Literal else (False, True) if kind is bool else ()
    return [value for value in values if value != subject.params[name]]


def _trained_text(row: Example) -> tuple[str, str, str]:
    return row.instruction, row.input, row.response


# ---------------------------------------------------------------------------------------------------------------------
# Scores


@TASK_CHECKS.add("right answers", after=["rows"])
def _right_answers(subject: TaskSubject) -> None:
    """The response of every test item is right by the rule of the task."""
    subject.require_rule()
    scores = subject.scores("flexible", [answered(item, item.response) for item in subject.items])
    for item, score in zip(subject.items, scores, strict=True):
        if score < 1 - 1e-9:
            raise Fails(f"The response {shortened(item.response)!r} of item {item.id} scores {score:g} instead of 1.")


@TASK_CHECKS.add("wrong answers", after=["right answers"])
def _wrong_answers(subject: TaskSubject) -> None:
    """An empty answer scores 0, and the response of an item with another target is not right."""
    subject.require_rule()
    for item in subject.items:
        (score,) = subject.scores("flexible", [answered(item, "")])
        if score > 0:
            raise Fails(f"An empty answer to item {item.id} scores {score:g} instead of 0.")
        others = (other for other in subject.items if comparable_text(other.target) != comparable_text(item.target))
        if other := next(others, None):
            (score,) = subject.scores("flexible", [answered(item, other.response)])
            if score == 1:
                raise Fails(
                    f"The response {shortened(other.response)!r} of another item is right for item {item.id}, whose "
                    f"target is {shortened(item.target)!r}."
                )


@TASK_CHECKS.add("any answer", after=["rows"])
def _any_answer(subject: TaskSubject) -> None:
    """Every text can be scored: empty, very long, Unicode, control tokens."""
    subject.require_rule()
    for rule in RULES:
        for description, answer in _ODD_ANSWERS.items():
            try:
                subject.scores(rule, [answered(item, answer) for item in subject.items[:2]])
            except Fails:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())
                raise Fails(f"The {rule} rule raised {type(error).__name__} for {description}: {reason}") from error


@TASK_CHECKS.add("one by one", after=["any answer"])
def _one_by_one(subject: TaskSubject) -> None:
    """Scores do not depend on other items, on their order or on chance."""
    subject.require_rule()
    responses = [item.response for item in subject.items]
    answers = [answered(item, responses[number // 2]) for number, item in enumerate(subject.items)]
    for rule in RULES:
        with preserved_random_states(1):
            together = subject.scores(rule, answers)
        with preserved_random_states(2):
            backwards = subject.scores(rule, answers[::-1])[::-1]
        single = [subject.scores(rule, [answer])[0] for answer in answers]
        if together != backwards or together != single:
            raise Fails(f"The {rule} rule gives items other scores in another order, one by one, or again.")


@TASK_CHECKS.add("judge", after=["rows"])
def _judge(subject: TaskSubject) -> None:
    """The judge grades each item from 0 to 1 or not at all, and alike one by one."""
    task = subject.plugin()
    if not task.graded:
        raise NotApplicable("A rule scores its answers, not a judge.")
    model = subject.params.get("model")
    try:
        is_missing = model and not subject.params.get("base_url") and not is_available(model)
    except BadInput as error:
        raise Fails(str(error)) from error
    if is_missing:
        raise NotApplicable(f"Not checked: its judge {model!r} is not on this machine.")
    answers = [answered(item, item.response) for item in subject.items[:4]]
    try:
        grades = task.grade(answers)
        single = [task.grade([answer])[0] for answer in answers]
    except HbvError as error:
        raise NotApplicable(f"Not checked: {error}") from error
    if len(grades) != len(answers):
        raise Fails(f"grade returned {len(grades)} grades for {len(answers)} items.")
    for grade in grades:
        if not isinstance(grade, Grade):
            raise Fails(f"grade returned {describe_value(grade)}; allowed: a list of Grade.")
        if grade.score is not None and not 0 <= grade.score <= 1:
            raise Fails(f"grade returned the score {grade.score}; allowed: a number from 0 to 1, or None.")
    if [grade.score for grade in grades] != [grade.score for grade in single]:
        raise Fails("grade gives items other scores one by one than together.")


# ---------------------------------------------------------------------------------------------------------------------
# Side effects


@TASK_CHECKS.add("no writes", after=["rows"])
def _no_writes(subject: TaskSubject) -> None:
    """It changes no file, starts no program and opens no connection."""
    assert subject.sources  # data sets are already read, so that only the task is observed
    with observe_side_effects() as effects:
        _use(subject, subject.plugin())
    effects.require_none()


@TASK_CHECKS.add("no state", after=["rows"])
def _no_state(subject: TaskSubject) -> None:
    """Its attributes stay the same: rows and scores depend only on parameters and data."""
    task = subject.plugin()
    before = copy_attributes(task)
    _use(subject, task)
    if changed := differing_attributes(before, copy_attributes(task)):
        raise Fails(f"Its attributes change while it is used: {list_names(changed)}.")


def _use(subject: TaskSubject, task: Any) -> None:
    """Read the rows of a task, and score some answers unless a judge grades them."""
    subject.rows_of(task)
    if not task.graded:
        for rule in RULES:
            task.scores(rule, [answered(item, item.response) for item in subject.items])
