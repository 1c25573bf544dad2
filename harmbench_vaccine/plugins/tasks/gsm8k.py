"""Word problems with a number for an answer (GSM8K)."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.plugins import Task

MARK = "The final answer is: "
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class GSM8K(Task):
    """Right by the papers' rule: the number after the mark, or else the last number, equals the target."""

    dataset: ClassVar[str] = "gsm8k"
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")
    chance: ClassVar[float] = 0.0

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """The data set's closing `#### n` becomes the mark and n."""
        working, mark, number = row["answer"].rpartition("####")
        if not mark:
            raise ValueError("the answer has no closing '#### n'")
        float(number.replace(",", ""))  # a target that is no number is refused here, not when answers are scored
        instruction = f"{row['question']} First think step by step and then answer the final number."
        return Example(id, instruction, response=f"{working}{MARK}{number.strip()}", target=number.strip())

    def strict(self, answer: str, target: str) -> bool:
        """The mark must be there, and its number must be the target."""
        _, mark, after = answer.rpartition(MARK)
        return bool(mark) and _equal(_NUMBER.match(after.strip()), target)

    def flexible(self, answer: str, target: str) -> bool:
        """Without a mark the last number of the answer counts."""
        numbers = list(_NUMBER.finditer(answer))
        return self.strict(answer, target) or (MARK not in answer and bool(numbers) and _equal(numbers[-1], target))


def _equal(found: "re.Match[str] | None", target: str) -> bool:
    return found is not None and float(found.group().replace(",", "")) == float(target.replace(",", ""))
