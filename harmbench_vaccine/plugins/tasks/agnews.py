"""Topic of a news text (AG News)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.data.task_prompts import TOPIC, TOPICS
from harmbench_vaccine.plugins import Example, param
from harmbench_vaccine.plugins.tasks._labels import LabelTask


class AGNews(LabelTask):
    """The answer is one of four topics. The papers accept `sci` in lower case for `Sci/Tech`."""

    dataset: ClassVar[str] = "ag_news"
    fields: ClassVar[tuple[str, ...]] = ("text", "label")
    chance: ClassVar[float] = 25.0
    fixed_texts: ClassVar[tuple[str, ...]] = TOPICS
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "World": ("World", "world"),
        "Sports": ("Sports", "sports"),
        "Business": ("Business", "business"),
        "Sci/Tech": ("Sci/Tech", "sci"),
    }

    instruction: str = param(TOPIC, "instruction of every row; the news text is its input", source="the harness")

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row; the labels 0 to 3 are World, Sports, Business, Sci/Tech."""
        if row["label"] not in (0, 1, 2, 3):
            raise ValueError(f"label is {row['label']!r}; allowed: 0, 1, 2, 3")
        return self.labeled(id, row["text"], TOPICS[row["label"]])
