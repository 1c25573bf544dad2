"""What the stages of a cell are given: rows to train on and questions to ask, all drawn by the cell's seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harmbench_vaccine.core.errors import BadInput, too_few_rows
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import STAGES, Example, Mix, Pools
from harmbench_vaccine.data.pools import (
    RowPools,
    count_overlaps,
    draw_rows,
    load_row_pools,
    question_keys,
    without_duplicates,
)
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate
from harmbench_vaccine.data.sources import parse_split, provenance, read_rows
from harmbench_vaccine.plugins.teams import upload_rows

from .experiment import Experiment

HARM_DATA = ("beavertails", "beavertails_refusals", "alpaca")
"""The data sets that the pools are made of."""


def check_rows(cell: Experiment) -> None:
    """Draws what the protocol, attack and defense need from the data, so that a lack of rows is told before any work.

    Raises:
        BadInput: a file lacks a field, or more rows are asked for than there are.
    """
    pools = row_pools(cell)
    cell.team("align").train_on("align", list(pools.alignment), pools)
    cell.team("finetune").train_on("finetune", user_rows(cell, pools), pools)
    harmful_sets(cell)
    benign_set(cell)
    task_set(cell)


def row_pools(cell: Experiment) -> Pools:
    """The rows that plug-ins may draw from; the alignment rows are those of this cell's seed."""
    there = _rows(cell)
    count = cell.protocol.align.rows
    alignment = draw_rows(
        there.alignment, count, "alignment rows", cell.spec.seed, "alignment rows", in_order=cell.in_order
    )
    return Pools(alignment, there.paired, there.benign, there.attacker)


def user_rows(cell: Experiment, pools: Pools) -> list[Example]:
    """What the user uploads: the mix that the attack asks for, and what it makes of the rows."""
    attack = cell.attackers()
    mix = attack.mix(Mix(cell.finetune.samples))
    return upload_rows(mix, task_rows(cell), pools, attack, derive_seed(cell.spec.seed, "user"), cell.in_order)


def selection_inputs(cell: Experiment) -> dict[str, Any]:
    """What an artifact made of these rows depends on, besides data, splits, counts and seed: how they are chosen."""
    chosen = {"rows": cell.protocol.rows, "source": cell.protocol.align.source}
    usual = {"rows": "unique", "source": "safe"}
    return {name: value for name, value in chosen.items() if value != usual[name]}


def _rows(cell: Experiment) -> RowPools:
    protocol = cell.protocol
    places = [protocol.location(name) for name in HARM_DATA]
    return load_row_pools(*places, **protocol.splits.model_dump(), source=protocol.align.source, in_order=cell.in_order)


def dropped_rows(cell: Experiment) -> dict[str, int]:
    """Pool -> how many rows were left out of it to keep the pools apart by text."""
    return _rows(cell).dropped


def overlapping_questions(cell: Experiment) -> dict[str, int]:
    """How many questions the rows that this cell uses have in common (see `data.pools.overlaps`)."""
    pools = row_pools(cell)
    uploaded = user_rows(cell, pools)
    return count_overlaps({
        "alignment": pools.alignment, "pairs": [refusal for refusal, _ in pools.paired],
        "harmful user rows": [row for row in uploaded if row.harmful],
        "task rows": [row for row in uploaded if not row.harmful],
        "harmful questions": harmful_sets(cell)[0].examples, "benign questions": benign_set(cell).examples,
        "task questions": task_set(cell).examples,
    })  # fmt: skip


def data_provenance(cell: Experiment) -> dict[str, dict[str, Any]]:
    """Data set -> where it was read from, which revision or content, and how many rows of which splits."""
    return {name: provenance(cell.location(name)) for name in dict.fromkeys([*HARM_DATA, *cell.task.datasets])}


def task_rows(cell: Experiment) -> list[Example]:
    """The task's training rows whose question is not among its test items, each once; `rows=paper` takes all."""
    rows, items = _task_sides(cell)
    return rows if cell.in_order else without_duplicates(rows, question_keys(items))


def _task_sides(cell: Experiment) -> tuple[list[Example], list[Example]]:
    """The task's training rows and its test items, as they stand in the data."""
    task = cell.task

    def examples(dataset: str, split: str) -> list[Example]:
        found = []
        for row in read_rows(cell.location(dataset), split, task.fields):
            try:
                found.append(task.example(f"{task.name}:{parse_split(split)[0]}:{row.number}", row.values))
            except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise BadInput(f"{row.place}: not a row of task {task.name!r}: {error}.") from error
        return found

    return task.rows(examples)


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers


def harmful_sets(cell: Experiment) -> list[EvalSet]:
    """Held-out harmful prompts, as the attack and the defense have them asked; the first is the headline's."""
    limits = cell.protocol.answer.harmful
    asked = _first(_rows(cell).harmful_questions, limits.prompts, "held-out harmful prompts")
    sets = [EvalSet("harmful", asked, _answer_template(cell), limits.max_new_tokens)]
    for stage in STAGES:
        sets = cell.team(stage).evaluations(sets)
    sets = cell.attackers().evaluations(sets)
    names = [asked.name for asked in sets]
    if len({*names, "benign", "task"}) < len(names) + 2:
        raise BadInput(f"Sets of questions need names of their own, besides benign and task: {', '.join(names)}.")
    return sets


def benign_set(cell: Experiment) -> EvalSet:
    """Held-out benign instructions, which an aligned model should not refuse."""
    limits = cell.protocol.answer.benign
    asked = _first(_rows(cell).benign_questions, limits.prompts, "held-out benign prompts")
    return EvalSet("benign", asked, _answer_template(cell), limits.max_new_tokens)


def task_set(cell: Experiment) -> EvalSet:
    """The first test items of the user's task."""
    limits = cell.protocol.answer
    _, items = _task_sides(cell)
    items = items if cell.in_order else without_duplicates(items)
    count = limits.items.get(cell.task.name, limits.task_items)
    if cell.task.allow_fewer_items:
        count = min(count, len(items))
    asked = _first(items, count, f"test items of {cell.task.name}")
    tokens = limits.task_tokens.get(cell.task.name, cell.task.max_new_tokens)
    return EvalSet("task", asked, _answer_template(cell), tokens)


def _answer_template(cell: Experiment) -> PromptTemplate:
    chosen = cell.template
    for stage in STAGES:
        chosen = cell.team(stage).template("answer", chosen)
    return chosen


def _first(examples: Sequence[Example], count: int, what: str) -> list[Example]:
    if count > len(examples):
        raise too_few_rows(count, what, len(examples))
    return list(examples[:count])
