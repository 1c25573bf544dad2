"""Sentiment of a sentence (SST-2): the user task of Vaccine's main tables."""

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.data.task_prompts import SENTIMENT
from harmbench_vaccine.plugins import Example, param
from harmbench_vaccine.plugins.tasks._labels import LabelTask


class SST2(LabelTask):
    """The answer is `positive` or `negative`."""

    dataset: ClassVar[str] = "sst2"
    fields: ClassVar[tuple[str, ...]] = ("sentence", "label")
    test_split: ClassVar[str] = "validation"
    chance: ClassVar[float] = 50.0
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "negative": ("negative", "Negative"),
        "positive": ("positive", "Positive"),
    }

    instruction: str = param(SENTIMENT, "instruction of every row; the sentence is its input", source="the harness")

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row; label 0 is negative and label 1 is positive."""
        if row["label"] not in (0, 1):
            raise ValueError(f"label is {row['label']!r}; allowed: 0, 1")
        word = ("negative", "positive")[row["label"]]
        return self.labeled(id, row["sentence"], word)
