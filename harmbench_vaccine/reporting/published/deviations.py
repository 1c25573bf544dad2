"""What a run did in another way than the paper whose figure stands beside it.

Our file of a paper's protocol stands for the paper, except for the values that `names.yaml` lists as its `reference`.
So what a user changed (`--set`, `--data`, `--scorer`) is a deviation, and so is what our file has otherwise on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harmbench_vaccine.experiment.protocol import Protocol, leaf_values, load_protocol

from .matching import MatchedFigure, Paper

_OURS = (
    *("name", "version", "model", "models", "sources", "gates", "defenses", "attacks", "answer.benign"),
    *("splits.benign_train", "splits.benign_test"),
)
"""Values of a protocol that no paper has, or that have to agree anyway."""

_COUNTED = ("answer.harmful.prompts", "answer.task_items", "answer.items", "finetune.samples")
"""Values whose outcome is compared."""


def list_deviations(
    paper: Paper, ran: Protocol, rows: Sequence[Mapping[str, Any]], known: MatchedFigure
) -> Iterator[str]:
    """What a cell's rows did in another way than the paper that prints `known`, a sentence each.

    `ran` is the protocol that they ran under. If their hash says that it is not, its values are not compared.
    """
    first, task = rows[0], known.task
    shipped = load_protocol(first["protocol"])
    if ran.hash == first["protocol_hash"]:
        yield from _values(paper, _flat(ran, task), _flat(shipped, task))
    else:
        yield (
            f"values or data of the protocol were changed (hash {first['protocol_hash']}, its file has {ran.hash}): "
            "the result.json of each run has what the user wrote"
        )
    if first["model"] != known.model:
        yield f"the model is read from {first['model']} (paper: {known.model})"
    items = paper.reference.get(f"answer.items.{task}")
    asked = items.value if items else shipped.answer.items.get(task, shipped.answer.task_items)
    seed = paper.reference.get("seed")
    for what, column, wanted in (
        ("harmful prompts", "harmful_score_n", shipped.answer.harmful.prompts),
        ("test items", "finetune_accuracy_n", asked),
        ("seed", "seed", seed and seed.value),
    ):
        there = sorted({int(row[column]) for row in rows})
        if wanted and there != [wanted]:
            yield f"{what}: {', '.join(map(str, there))} (paper: {wanted})"
    yield from paper.differs


def _values(paper: Paper, ran: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[str]:
    for path in dict.fromkeys([*shipped, *ran]):
        reference = paper.reference.get(path)
        wanted = reference.value if reference else shipped.get(path)
        if ran.get(path) != wanted:
            told = f"{path}: {_said(ran.get(path))} (paper: {_said(wanted)})"
            yield (reference and reference.text) or told


def _flat(protocol: Protocol, task: str) -> dict[str, Any]:
    """Dotted path -> value, of what a paper's protocol has too; the user stage is the task's."""
    tokens = {task: protocol.answer.task_tokens.get(task)}
    answer = protocol.answer.model_copy(update={"task_tokens": tokens})
    whole = protocol.model_copy(update={"finetune": protocol.finetune.of(task), "answer": answer})
    left_out = (*_OURS, *_COUNTED)
    return {
        path: value
        for path, value in leaf_values(whole)
        if not any(path == group or path.startswith(f"{group}.") for group in left_out)
    }


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
