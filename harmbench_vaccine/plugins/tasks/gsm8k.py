"""Word problems that a number answers (GSM8K)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.data.task_prompts import ANSWER_MARK, REASONING
from harmbench_vaccine.plugins import Example, Task
from harmbench_vaccine.plugins.tasks._numbers import find_numbers, leading_number, parse_number


class GSM8K(Task):
    """An answer is right by the papers' rule if the number after the mark, or else the last number, is the target."""

    dataset: ClassVar[str] = "gsm8k"
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")
    chance: ClassVar[float] = 0.0
    fixed_texts: ClassVar[tuple[str, ...]] = (REASONING, ANSWER_MARK)

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row: `#### n` at the end of the answer becomes the mark and n."""
        steps, mark, number = row["answer"].rpartition("####")
        if not mark:
            raise ValueError("the answer does not end with '#### n'")
        parse_number(number)  # refuse an invalid target here, not when answers are scored
        response = f"{steps}{ANSWER_MARK}{number.strip()}"
        return Example(id, f"{row['question']} {REASONING}", response=response, target=number.strip())

    def strict(self, answer: str, target: str) -> bool:
        """Return whether the mark occurs and its number is the target."""
        _, mark, after = answer.rpartition(ANSWER_MARK)
        return bool(mark) and leading_number(after) == parse_number(target)

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the answer is right by `strict`, or has no mark and its last number is the target."""
        if ANSWER_MARK in answer:
            return self.strict(answer, target)
        numbers = find_numbers(answer)
        return bool(numbers) and numbers[-1] == parse_number(target)
