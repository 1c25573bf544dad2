"""The task interface: training rows and test items of a benign user, and the rules that score an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import Example, Grade

from .answer_text import comparable_text
from .base import Plugin


class Task(Plugin):
    """A downstream task: training rows, test items, and the rules that score an answer."""

    kind: ClassVar[str] = "task"
    dataset: ClassVar[str]
    """The name of the data set in the protocol."""
    test_dataset: ClassVar[str] = ""
    """The data set of the test items; empty: `dataset`."""
    fields: ClassVar[tuple[str, ...]]
    """The fields that every row must have."""
    chance: ClassVar[float]
    """The accuracy of guessing, in percent."""
    max_new_tokens: ClassVar[int] = 200
    """The maximum length of an answer, unless the protocol sets a limit for the task."""
    train_split: ClassVar[str] = "train"
    test_split: ClassVar[str] = "test"
    allow_fewer_items: ClassVar[bool] = False
    """True: if fewer test items are available than the protocol requests, all of them are used."""
    measure: ClassVar[str] = "accuracy"
    """The name of the score, if an item is not simply right or wrong."""
    scoring_only: ClassVar[tuple[str, ...]] = ()
    """Parameters that change no training row, or only through the content of a data set. All others are part of the key
    of the user stage, so that another text of a prompt is another artifact."""

    @classmethod
    def required_methods(cls) -> tuple[str, ...]:
        """Return `example` and the scoring method: `grade` where a judge scores, otherwise `flexible` or `scores`."""
        if cls.graded is not Task.graded:
            return "example", "grade"
        return ("example", "flexible") if cls.scores is Task.scores else ("example",)

    def check(self) -> None:
        """Check the parameters before any work is spent.

        Raises:
            BadInput: The parameters do not fit together.
        """

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names of the data sets that the task reads."""
        return (self.dataset, self.test_dataset) if self.test_dataset else (self.dataset,)

    def locations(self) -> dict[str, str]:
        """Return data set -> location, for data sets that the protocol does not locate."""
        return {}

    def rows(self, read: Callable[[str, str], list[Example]]) -> tuple[list[Example], list[Example]]:
        """Return the training rows and the test items.

        Args:
            read: A function (data set, split) -> examples.
        """
        return read(self.dataset, self.train_split), read(self.test_dataset or self.dataset, self.test_split)

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row of the data set to an instruction with its response and target.

        The rule `flexible` must accept the response, which the model is trained to write; otherwise the row is refused.

        Raises:
            ValueError: The row is not valid.
        """
        raise NotImplementedError

    def strict(self, answer: str, target: str) -> bool:
        """Return whether the answer is the target and nothing else, without letter case and in one Unicode form."""
        return comparable_text(answer) == comparable_text(target)

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the answer is right by the rule of the task, which the reported accuracy uses."""
        raise NotImplementedError

    def scores(self, rule: Literal["strict", "flexible"], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the score of each answered item by a rule, from 0 to 1.

        Args:
            rule: The name of the rule.
            rows: Items with `instruction`, `input`, `target` and `answer`.
        """
        return [float(getattr(self, rule)(row["answer"], row["target"])) for row in rows]

    @property
    def graded(self) -> bool:
        """True: a judge scores the items with `grade`, and no rule does."""
        return False

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """Score each answered item with a judge.

        Args:
            rows: Items with `instruction`, `input`, `target` and `answer`.
            progress: The progress bar.
        """
        raise NotImplementedError
