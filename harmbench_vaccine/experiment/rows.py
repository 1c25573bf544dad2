"""The rows of an experiment: training rows and evaluation sets, drawn by its seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from harmbench_vaccine.core.errors import BadInput, too_few_rows
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, Mix, Pools
from harmbench_vaccine.data.over_refusal import OVER_REFUSAL, load_over_refusal
from harmbench_vaccine.data.pools import (
    RowPools,
    count_overlaps,
    draw_rows,
    load_row_pools,
    question_keys,
    validation_rows,
    without_duplicates,
)
from harmbench_vaccine.data.prompts import EvalSet
from harmbench_vaccine.data.sources import RowReader, fingerprint, provenance
from harmbench_vaccine.plugins import Task
from harmbench_vaccine.plugins.task_rows import convert_rows, training_and_test_rows
from harmbench_vaccine.plugins.teams import upload_rows

from .experiment import Experiment
from .protocol import Questions
from .stage_config import StageConfig

HARM_DATA = ("beavertails", "beavertails_refusals", "alpaca")
"""The data sets that the pools are drawn from."""


def check_rows(experiment: Experiment) -> None:
    """Draw every row that the experiment needs, so that missing rows are reported before any work is spent.

    Raises:
        BadInput: A file lacks a field, fewer rows are available than requested, or a stage would train no step.
    """
    pools = plugin_pools(experiment)
    rows = {"align": list(pools.alignment), "finetune": user_rows(experiment, pools)}
    for name, config in experiment.stages.items():
        if name in rows:
            trained = config.defenses.fresh().train_on(name, rows[name], pools)
            check_steps(config, len(trained))
    eval_sets(experiment)


def check_steps(stage: StageConfig, rows: int) -> None:
    """Refuse a number of rows with which a stage would train no step.

    Raises:
        BadInput: The epochs are less than half a batch.
    """
    if rows and not stage.settings.micro_batches(rows):
        raise BadInput(
            f"Stage {stage.name!r} would train no step: {stage.settings.epochs:g} epochs of {rows} rows are less than "
            f"half a batch of {stage.settings.batch} rows; allowed: more epochs, or a smaller batch."
        )


def plugin_pools(experiment: Experiment) -> Pools:
    """Return the rows that plug-ins may draw from; the alignment rows are those of the experiment's seed.

    The safe rows come first in the alignment rows, then the benign instructions that the protocol adds to them.
    """
    pools, align, seed = _row_pools(experiment), experiment.protocol.align, experiment.spec.seed
    safe, instructions = (
        draw_rows(
            rows,
            count,
            what,
            seed,
            what,
            in_order=experiment.in_order,
            fix=f"lower {value}, as in --set {value}=N",
        )
        for rows, count, what, value in (
            (pools.alignment, align.rows, "alignment rows", "align.rows"),
            (pools.benign, align.instructions, "alignment instructions", "align.instructions"),
        )
    )
    aligned = {row.id for row in instructions}
    benign = [row for row in pools.benign if row.id not in aligned]
    return Pools([*safe, *instructions], pools.paired, benign, pools.attacker)


def user_rows(experiment: Experiment, pools: Pools) -> list[Example]:
    """Return the rows that the user uploads: the mix that the attack requests, after the attack changed the rows."""
    attack = experiment.attack_team.fresh()
    mix = attack.mix(Mix(experiment.finetune.samples))
    seed = derive_seed(experiment.spec.seed, "user")
    return upload_rows(mix, task_rows(experiment), pools, attack, seed, experiment.in_order)


def task_rows(experiment: Experiment) -> list[Example]:
    """Return the task's training rows without duplicates and test questions; with `rows=paper`, all of them."""
    return _read_task(experiment).rows


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation sets


def eval_sets(experiment: Experiment) -> list[EvalSet]:
    """Return every evaluation set: the harmful ones (the headline first), the benign one, the task's, over-refusal."""
    return [
        *(*harmful_sets(experiment), benign_set(experiment), task_set(experiment)),
        *(over_refusal_set(experiment, name) for name in experiment.spec.over_refusal),
    ]


def harmful_sets(experiment: Experiment) -> list[EvalSet]:
    """Return the held-out harmful prompts, after changes by attack and defenses; the first set is the headline.

    Raises:
        BadInput: Fewer prompts are available than requested, or two sets have one name.
    """
    sets = [_question_set(experiment, "harmful", _row_pools(experiment).harmful_questions)]
    for config in experiment.stages.values():
        sets = config.defenses.fresh().evaluations(sets)
    sets = experiment.attack_team.fresh().evaluations(sets)
    sets = [*sets, *_headline_parts(sets, _row_pools(experiment))]
    names = [eval_set.name for eval_set in sets]
    other = ("benign", "task", *OVER_REFUSAL)
    if len({*names, *other}) < len(names) + len(other):
        raise BadInput(f"Evaluation sets need different names, other than {', '.join(other)}; got {', '.join(names)}.")
    return sets


def _headline_parts(sets: Sequence[EvalSet], pools: RowPools) -> list[EvalSet]:
    """Return the parts of the headline set that a division of the rows names, without empty ones."""
    parts = []
    for name, questions in pools.question_sets.items():
        ids = {question.id for question in questions}
        if examples := [example for example in sets[0].examples if example.id in ids]:
            parts.append(replace(sets[0], name=name, examples=examples))
    return parts


def benign_set(experiment: Experiment) -> EvalSet:
    """Return the held-out benign instructions, which an aligned model should not refuse."""
    return _question_set(experiment, "benign", _row_pools(experiment).benign_questions)


def over_refusal_set(experiment: Experiment, name: str) -> EvalSet:
    """Return all prompts of an over-refusal set, in the order of the file, with the token limit of the benign set.

    Repeated prompts, and those that are harmful prompts of the evaluation, are left out.
    """
    examples = _read_over_refusal(experiment, name).examples
    return EvalSet(name, examples, experiment.answer_template, experiment.protocol.answer.benign.max_new_tokens)


def task_set(experiment: Experiment) -> EvalSet:
    """Return the test items of the user's task, of the part that the protocol names."""
    limits, task = experiment.protocol.answer, experiment.task
    items = _read_task(experiment).items
    count = limits.items.get(task.name, limits.task_items)
    if task.allow_fewer_items:
        count = min(count, len(items))
    examples = _evaluation_rows(experiment, items, count, f"test items of {task.name}")
    max_new_tokens = limits.task_tokens.get(task.name, task.max_new_tokens)
    return EvalSet("task", examples, experiment.answer_template, max_new_tokens)


def _question_set(experiment: Experiment, name: str, questions: Sequence[Example]) -> EvalSet:
    limits: Questions = getattr(experiment.protocol.answer, name)
    examples = _evaluation_rows(experiment, questions, limits.prompts, f"held-out {name} prompts")
    return EvalSet(name, examples, experiment.answer_template, limits.max_new_tokens)


def _evaluation_rows(
    experiment: Experiment, examples: Sequence[Example], count: int, description: str
) -> list[Example]:
    """Return the first examples, or those of the validation.

    Raises:
        BadInput: Fewer than `count` examples are available, or none is left for the validation.
    """
    if count > len(examples):
        raise too_few_rows(count, description, len(examples))
    if experiment.protocol.answer.part == "report":
        return list(examples[:count])
    if validation := validation_rows(examples, count):
        return validation
    raise BadInput(f"No {description} are left for the validation: results use all {count}. Lower their number.")


# ---------------------------------------------------------------------------------------------------------------------
# Facts about the rows, for the result


def dropped_rows(experiment: Experiment) -> dict[str, int]:
    """Count the dropped rows of each pool and over-refusal set.

    Their question occurs in an earlier one, or the attack divides the rows.
    """
    sets = {name: _read_over_refusal(experiment, name).dropped for name in experiment.spec.over_refusal}
    return {**_row_pools(experiment).dropped, **sets}


def overlapping_questions(experiment: Experiment) -> dict[str, int]:
    """Count the questions that occur in several uses of rows (see `data.pools.count_overlaps`)."""
    pools = plugin_pools(experiment)
    uploaded = user_rows(experiment, pools)
    uses = {
        "alignment": pools.alignment,
        "pairs": [refusal for refusal, _ in pools.paired],
        "harmful user rows": [row for row in uploaded if row.harmful],
        "task rows": [row for row in uploaded if not row.harmful],
        "harmful questions": harmful_sets(experiment)[0].examples,
        "benign questions": benign_set(experiment).examples,
        "task questions": task_set(experiment).examples,
    }
    return count_overlaps(uses)


def data_provenance(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Describe each data set: its location, its revision or content hash, and the rows read from each split."""
    sets = [_read_over_refusal(experiment, name).rows_read for name in experiment.spec.over_refusal]
    rows_read: dict[str, dict[str, int]] = {}
    for counts in (_row_pools(experiment).rows_read, _read_task(experiment).rows_read, *sets):
        for location, rows in counts.items():
            rows_read[location] = rows_read.get(location, {}) | rows
    return {
        name: provenance(location, rows_read.get(location, {})) for name, location in data_locations(experiment).items()
    }


def data_locations(experiment: Experiment) -> dict[str, str]:
    """Return the data sets that the experiment reads: name -> location."""
    names = (*HARM_DATA, *experiment.task.datasets, *experiment.spec.over_refusal)
    return {name: experiment.location(name) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _row_pools(experiment: Experiment) -> RowPools:
    """Return all rows by their users, as the attack divides them."""
    protocol = experiment.protocol
    locations = tuple(experiment.location(name) for name in HARM_DATA)
    pools = _read_pools(
        locations,
        tuple(fingerprint(location, "dataset") for location in locations),
        tuple(protocol.splits.model_dump().items()),
        protocol.align.source,
        experiment.in_order,
        experiment.in_order and protocol.answer.rows_in_order == "all",
    )
    return experiment.attack_team.fresh().divide(pools)


@lru_cache(maxsize=4)  # by content: a file that changes is read again
def _read_pools(
    locations: tuple[str, ...],
    fingerprints: tuple[str, ...],
    splits: tuple[tuple[str, str], ...],
    source: str,
    in_order: bool,
    safe_prompts: bool,
) -> RowPools:
    return load_row_pools(*locations, **dict(splits), source=source, in_order=in_order, safe_prompts=safe_prompts)


@dataclass(frozen=True)
class _TaskRows:
    rows: list[Example]
    """Training rows in the order of the file, without test questions and duplicates unless the rows are in order."""
    items: list[Example]
    """Test items in the order of the file, without duplicates unless the rows are in order."""
    rows_read: dict[str, dict[str, int]]


@dataclass(frozen=True)
class _TaskData:
    """The task of an experiment with its data: equal if the rows are equal."""

    experiment: Experiment = field(compare=False)
    task: tuple[type[Task], str]
    """Class and parameters."""
    contents: tuple[tuple[str, str, str], ...]
    """Name, location and fingerprint of each data set."""
    in_order: bool


def _read_task(experiment: Experiment) -> _TaskRows:
    task = experiment.task
    locations = {name: experiment.location(name) for name in task.datasets}
    contents = tuple((name, place, fingerprint(place, "dataset")) for name, place in locations.items())
    return _read_task_data(_TaskData(experiment, (type(task), task.model_dump_json()), contents, experiment.in_order))


@lru_cache(maxsize=4)  # by content, as above
def _read_task_data(data: _TaskData) -> _TaskRows:
    experiment, reader = data.experiment, RowReader()
    task = experiment.task

    def examples(dataset: str, split: str) -> list[Example]:
        return convert_rows(task, split, reader.read(experiment.location(dataset), split, task.fields))

    rows, items = training_and_test_rows(task, examples)
    if not data.in_order:
        rows, items = without_duplicates(rows, question_keys(items)), without_duplicates(items)
    return _TaskRows(rows, items, reader.counts)


@dataclass(frozen=True)
class _OverRefusalRows:
    examples: list[Example]
    """The prompts in the order of the file."""
    dropped: int
    """Number of prompts that were left out."""
    rows_read: dict[str, dict[str, int]]


def _read_over_refusal(experiment: Experiment, name: str) -> _OverRefusalRows:
    location = experiment.location(name)
    prompts, rows_read = _read_prompts(name, location, fingerprint(location, "dataset"))
    examples = without_duplicates(prompts, question_keys(_row_pools(experiment).harmful_questions))
    if not examples:
        raise BadInput(f"Over-refusal set {name!r}: each prompt in {location} is a harmful prompt of the evaluation.")
    return _OverRefusalRows(examples, len(prompts) - len(examples), rows_read)


@lru_cache(maxsize=4)  # by content, as above
def _read_prompts(name: str, location: str, content: str) -> tuple[list[Example], dict[str, dict[str, int]]]:
    reader = RowReader()
    return load_over_refusal(reader, name, location), reader.counts
