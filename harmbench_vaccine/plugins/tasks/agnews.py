"""Topic of a news text (AG News)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.plugins import Task

CLASSES = ("World", "Sports", "Business", "Sci/Tech")


class AGNews(Task):
    """Right by the papers' rule: the class name occurs in the answer."""

    dataset: ClassVar[str] = "ag_news"
    fields: ClassVar[tuple[str, ...]] = ("text", "label")
    chance: ClassVar[float] = 25.0

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Labels are 0 to 3, in the order World, Sports, Business, Sci/Tech."""
        names = "\n".join(CLASSES)
        instruction = f"Categorize the news article given in the input into one of the 4 categories:\n\n{names}\n"
        if row["label"] not in (0, 1, 2, 3):
            raise ValueError(f"label is {row['label']!r}; allowed: 0, 1, 2, 3")
        word = CLASSES[row["label"]]
        return Example(id, instruction, response=word, input=row["text"], target=word)

    def flexible(self, answer: str, target: str) -> bool:
        """Substring, in any case."""
        return target.lower() in answer.lower()
