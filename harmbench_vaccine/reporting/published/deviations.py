"""List the differences between a run and the paper whose figure is shown next to it.

The shipped protocol file represents the paper, except for the values that `names.yaml` lists as its `reference`. So a
value that the user changed (`--set`, `--data`, `--scorer`) is a deviation, and so is a value that differs from the
paper on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harmbench_vaccine.experiment.protocol import Protocol, leaf_values, load_protocol

from .matching import MatchedFigure, Paper

_NOT_IN_PAPERS = (
    *("name", "version", "model", "models", "sources", "gates", "defenses", "attacks", "answer.benign"),
    *("splits.benign_train", "splits.benign_test"),
)
"""Protocol values that papers do not have, or that are equal by construction."""

_COUNTS = ("answer.harmful.prompts", "answer.task_items", "answer.items", "finetune.samples")
"""Protocol values that are compared by their outcome, the counts of a result."""


def list_deviations(
    paper: Paper, protocol: Protocol, rows: Sequence[Mapping[str, Any]], matched: MatchedFigure
) -> Iterator[str]:
    """Yield one sentence per difference between the rows of an experiment and the paper.

    Args:
        paper: Correspondence between the paper and this harness.
        protocol: Protocol of the runs. Its values are compared only if its hash is the one in the rows.
        rows: Results of the experiment, one per seed.
        matched: The paper's figure for the experiment.
    """
    first, task = rows[0], matched.task
    shipped = load_protocol(first["protocol"])
    if protocol.hash == first["protocol_hash"]:
        yield from _changed_values(paper, _paper_values(protocol, task), _paper_values(shipped, task))
    else:
        yield (
            f"values or data of the protocol were changed (hash {first['protocol_hash']}, its file has "
            f"{protocol.hash}): the result.json of each run lists the user's changes"
        )
    if first["model"] != matched.model:
        yield f"the model is read from {first['model']} (paper: {matched.model})"
    items = paper.reference.get(f"answer.items.{task}")
    seed = paper.reference.get("seed")
    for name, column, expected in (
        ("harmful prompts", "harmful_score_n", shipped.answer.harmful.prompts),
        (
            "test items",
            "finetune_accuracy_n",
            items.value if items else shipped.answer.items.get(task, shipped.answer.task_items),
        ),
        ("seed", "seed", seed and seed.value),
    ):
        values = sorted({int(row[column]) for row in rows})
        if expected and values != [expected]:
            yield f"{name}: {', '.join(map(str, values))} (paper: {expected})"
    yield from paper.deviations


def _changed_values(paper: Paper, values: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[str]:
    for path in dict.fromkeys([*shipped, *values]):
        reference = paper.reference.get(path)
        expected = reference.value if reference else shipped.get(path)
        if values.get(path) != expected:
            message = f"{path}: {_format(values.get(path))} (paper: {_format(expected)})"
            yield (reference and reference.message) or message


def _paper_values(protocol: Protocol, task: str) -> dict[str, Any]:
    """Return dotted path -> value for the values that a paper has too, with the user stage of one task."""
    tokens = {task: protocol.answer.task_tokens.get(task)}
    answer = protocol.answer.model_copy(update={"task_tokens": tokens})
    of_task = protocol.model_copy(update={"finetune": protocol.finetune.of(task), "answer": answer})
    excluded = (*_NOT_IN_PAPERS, *_COUNTS)
    return {
        path: value
        for path, value in leaf_values(of_task)
        if not any(path == group or path.startswith(f"{group}.") for group in excluded)
    }


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
