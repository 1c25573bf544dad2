"""Tasks: what a benign user fine-tunes on, and how its answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import Example, Grade

from .base import Plugin


class Task(Plugin):
    """What the benign user wants: rows to train on, test questions, and when an answer is right."""

    kind: ClassVar[str] = "task"
    dataset: ClassVar[str]
    """The data set's name in the protocol."""
    test_dataset: ClassVar[str] = ""
    """Another one that the test items are of."""
    fields: ClassVar[tuple[str, ...]]
    """The fields that a row must have."""
    chance: ClassVar[float]
    """The accuracy of guessing, in percent."""
    max_new_tokens: ClassVar[int] = 200
    """How long an answer may be where the protocol sets no limit for the task."""
    train_split: ClassVar[str] = "train"
    test_split: ClassVar[str] = "test"
    allow_fewer_items: ClassVar[bool] = False
    """Where there are fewer test items than the protocol asks for, all are asked."""
    measure: ClassVar[str] = "accuracy"
    """What an item's score is, where it is not right or wrong."""
    scoring_only: ClassVar[tuple[str, ...]] = ()
    """Parameters that no training row depends on but by what a data set holds."""

    def check(self) -> None:
        """Raises `BadInput` where its parameters do not fit together, before any work is spent."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names of the data sets that it reads."""
        return (self.dataset, self.test_dataset) if self.test_dataset else (self.dataset,)

    def places(self) -> dict[str, str]:
        """Data set -> location, of those that it brings itself."""
        return {}

    def rows(self, read: Callable[[str, str], list[Example]]) -> tuple[list[Example], list[Example]]:
        """Its training rows and its test items; `read` gives the examples of (data set, split)."""
        return read(self.dataset, self.train_split), read(self.test_dataset or self.dataset, self.test_split)

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """A row of the data set as an instruction with its response and target."""
        raise NotImplementedError

    def strict(self, answer: str, target: str) -> bool:
        """Whether the answer is the target and nothing else."""
        return answer.strip().lower() == target.strip().lower()

    def flexible(self, answer: str, target: str) -> bool:
        """Whether the answer is right by the rule of the papers."""
        raise NotImplementedError

    def scores(self, rule: Literal["strict", "flexible"], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The score of each answered item from 0 to 1, by a rule; a row has `instruction`, `input`, `target` and
        `answer`."""
        return [float(getattr(self, rule)(row["answer"], row["target"])) for row in rows]

    @property
    def graded(self) -> bool:
        """Its items are scored by `grade`, once, and no rule scores them."""
        return False

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """What a judge makes of each answered item."""
        raise NotImplementedError
