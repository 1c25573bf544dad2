"""Sentiment of a sentence (SST-2): the user task of Vaccine's main tables."""

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.data.task_prompts import SENTIMENT
from harmbench_vaccine.plugins import Example, Task


class SST2(Task):
    """An answer is right by the papers' rule if the word of the label occurs in it."""

    dataset: ClassVar[str] = "sst2"
    fields: ClassVar[tuple[str, ...]] = ("sentence", "label")
    test_split: ClassVar[str] = "validation"
    chance: ClassVar[float] = 50.0
    fixed_texts: ClassVar[tuple[str, ...]] = (SENTIMENT,)

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row; label 0 is negative and label 1 is positive."""
        if row["label"] not in (0, 1):
            raise ValueError(f"label is {row['label']!r}; allowed: 0, 1")
        word = ("negative", "positive")[row["label"]]
        return Example(id, SENTIMENT, response=word, input=row["sentence"], target=word)

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the target is a substring of the answer, ignoring case."""
        return target in answer.lower()
