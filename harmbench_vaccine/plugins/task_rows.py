"""Read the rows of a task: convert the rows of its data sets, and check what its hooks return."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harmbench_vaccine.core.errors import BadInput, shortened
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.sources import SourceRow, parse_split

from .task import Task


def convert_rows(task: Task, split: str, rows: Iterable[SourceRow]) -> list[Example]:
    """Convert rows of a split with `Task.example`.

    Raises:
        BadInput: A row is not valid, or its own answer is wrong by the rule of the task.
    """
    converted = []
    for row in rows:
        try:
            example = task.example(f"{task.name}:{parse_split(split)[0]}:{row.number}", row.values)
            _check_texts(example)
            _check_own_answer(task, example)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{row.place} is not a row of task {task.name!r}: {error}.") from error
        converted.append(example)
    return converted


def training_and_test_rows(
    task: Task, read: Callable[[str, str], list[Example]]
) -> tuple[list[Example], list[Example]]:
    """Return the training rows and the test items of a task.

    Args:
        task: The task.
        read: A function (data set, split) -> examples.

    Raises:
        BadInput: `Task.rows` returned something else.
    """
    pair = task.rows(read)
    is_pair = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(rows, list) for rows in pair)
    if not is_pair or not all(isinstance(row, Example) for rows in pair for row in rows):
        raise BadInput(
            f"Task {task.name!r}: rows returned {shortened(repr(pair))}; allowed: a pair of lists of Example, the "
            "training rows and the test items."
        )
    return pair


def _check_texts(example: Example) -> None:
    """Refuse an example with a part that is not a text.

    Raises:
        ValueError: A part is a number or another value.
    """
    for name in ("instruction", "input", "response", "target"):
        if not isinstance(value := getattr(example, name), str):
            raise ValueError(f"its {name} is {value!r}, but must be a text")


def _check_own_answer(task: Task, example: Example) -> None:
    """Refuse a row whose own answer is wrong by the rule of the task; a task that a judge grades has no rule.

    Raises:
        ValueError: The rule does not accept the answer.
    """
    if task.graded:
        return
    answer = example.response
    item = {"instruction": example.instruction, "input": example.input, "target": example.target, "answer": answer}
    if not task.scores("flexible", [item])[0]:
        shown = answer if len(answer) <= 80 else f"... {answer[-80:]}"
        raise ValueError(f"its answer {shown!r} is wrong by the rule of the task; the target is {example.target!r}")
