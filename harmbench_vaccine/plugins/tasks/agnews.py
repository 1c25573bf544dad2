"""Topic of a news text (AG News)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.data.task_prompts import TOPIC, TOPICS
from harmbench_vaccine.plugins import Example, Task


class AGNews(Task):
    """An answer is right by the papers' rule if the name of the class occurs in it."""

    dataset: ClassVar[str] = "ag_news"
    fields: ClassVar[tuple[str, ...]] = ("text", "label")
    chance: ClassVar[float] = 25.0
    fixed_texts: ClassVar[tuple[str, ...]] = (TOPIC, *TOPICS)

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row; the labels 0 to 3 are World, Sports, Business, Sci/Tech."""
        if row["label"] not in (0, 1, 2, 3):
            raise ValueError(f"label is {row['label']!r}; allowed: 0, 1, 2, 3")
        word = TOPICS[row["label"]]
        return Example(id, TOPIC, response=word, input=row["text"], target=word)

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the target is a substring of the answer, ignoring case."""
        return target.lower() in answer.lower()
