"""A task under test, and the rows that it is checked with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.sources import TESTBED, TESTBED_PARTS, SourceRow, is_available, parse_split, read_rows
from harmbench_vaccine.testbed.world import generate

from ..task import Task
from ..task_rows import convert_rows, training_and_test_rows
from .findings import Fails, NotApplicable, Subject, describe_value

ITEMS = 24
"""Number of test items that are scored."""
PLACEHOLDERS = 1000
"""Number of placeholder rows in each split."""

Read = Callable[[str, str], list[Example]]
Rule = Literal["strict", "flexible"]
RULES: tuple[Rule, ...] = ("strict", "flexible")


@cache
def _testbed_files() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every data file of the testbed, which are generated in memory."""
    return generate().files()


@dataclass
class TaskSubject(Subject):
    """A task, and the source of its rows."""

    cls: type[Task]
    placeholders: set[str] = field(default_factory=set)
    """The data sets that are not on this machine, of which the rows are placeholders."""
    sources: dict[tuple[str, str], list[SourceRow]] = field(default_factory=dict)
    """(data set, split) -> the rows that were read."""
    _rows: tuple[list[Example], list[Example]] | None = None

    def plugin(self, **changes: Any) -> Task:
        """Create the task with its parameters, some of them changed."""
        return self.cls(**{**self.params, **changes})

    def source_rows(self, dataset: str, split: str) -> list[SourceRow]:
        """Return the rows of a split of a data set: those of its location, of the testbed, or placeholders."""
        key = dataset, split
        if key not in self.sources:
            location = self._location(dataset)
            if location.startswith(TESTBED):
                name, part = parse_split(split)
                self.sources[key] = _numbered(_testbed_split(location, name), f"{location}, {name}")[part]
            elif location:
                self.sources[key] = read_rows(location, split, self.cls.fields)
            else:
                self.placeholders.add(dataset)
                self.sources[key] = _placeholder_rows(self.cls.fields, dataset, split)
        return self.sources[key]

    def _location(self, dataset: str) -> str:
        """Return where a data set is read from; empty if it is not on this machine."""
        location = self.plugin().locations().get(dataset, "")
        if not location and f"data/{dataset}" in TESTBED_PARTS:
            return f"{TESTBED}data/{dataset}"
        return location if location.startswith(TESTBED) or (location and is_available(location)) else ""

    def convert(self, task: Task, dataset: str, split: str) -> list[Example]:
        """Return the rows of a split as examples."""
        try:
            return convert_rows(task, split, self.source_rows(dataset, split))
        except BadInput as error:
            if dataset in self.placeholders:
                raise NotApplicable(
                    f"Data set {dataset!r} is not on this machine, and placeholders are not valid rows: {error}"
                ) from error
            raise Fails(str(error)) from error

    def rows_of(self, task: Task, read: Read | None = None) -> tuple[list[Example], list[Example]]:
        """Return the training rows and the test items that a task makes of its data sets."""

        def convert(dataset: str, split: str) -> list[Example]:
            return self.convert(task, dataset, split)

        try:
            return training_and_test_rows(task, read or convert)
        except BadInput as error:
            raise Fails(str(error)) from error

    @property
    def rows(self) -> tuple[list[Example], list[Example]]:
        """The training rows and the test items, which are computed once."""
        if self._rows is None:
            self._rows = self.rows_of(self.plugin())
        return self._rows

    @property
    def items(self) -> list[Example]:
        """The test items that are scored."""
        return self.rows[1][:ITEMS]

    def require_rule(self) -> None:
        """Raise `NotApplicable` if a judge grades the answers instead of a rule."""
        if self.plugin().graded:
            raise NotApplicable("A judge grades its answers, not a rule.")

    def scores(self, rule: Rule, rows: Sequence[dict[str, Any]]) -> list[float]:
        """Score answered items by a rule, and check the form of the scores."""
        scores = self.plugin().scores(rule, rows)
        if not isinstance(scores, list) or len(scores) != len(rows):
            raise Fails(f"scores returned {describe_value(scores)}; allowed: a list with one number for each item.")
        for score in scores:
            if not isinstance(score, int | float) or not 0 <= score <= 1:
                raise Fails(f"scores returned {score!r}; allowed: a number from 0 to 1.")
        return scores


def answered(item: Example, answer: str) -> dict[str, Any]:
    """Return an item with an answer, as `Task.scores` and `Task.grade` receive it."""
    return {"instruction": item.instruction, "input": item.input, "target": item.target, "answer": answer}


def _testbed_split(location: str, split: str) -> list[dict[str, Any]]:
    folder = location.removeprefix(f"{TESTBED}data/")
    splits = {name.partition("/")[2].removesuffix(".jsonl"): name for name in _testbed_files() if folder in name}
    if split not in splits:
        raise BadInput(f"{location} has no split {split!r}. Allowed: {', '.join(sorted(splits))}.")
    return _testbed_files()[splits[split]]


def _placeholder_rows(fields: Sequence[str], dataset: str, split: str) -> list[SourceRow]:
    """Return rows whose fields are different texts."""
    name, part = parse_split(split)
    values = [
        {field: f"{field} of row {number} in {dataset} {name}" for field in fields} for number in range(PLACEHOLDERS)
    ]
    return _numbered(values, f"placeholders of {dataset}, {name}")[part]


def _numbered(values: Sequence[dict[str, Any]], place: str) -> list[SourceRow]:
    return [SourceRow(number, row, f"{place}, row {number}") for number, row in enumerate(values)]
