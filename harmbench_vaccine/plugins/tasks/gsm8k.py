"""Word problems that a number answers (GSM8K)."""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.task_prompts import ANSWER_MARK, REASONING
from harmbench_vaccine.plugins import Example, Task, param

_NUMBER = re.compile(r"-?\d+\.?\d*")


class GSM8K(Task):
    """An answer is right by the papers' rule if the number that it gives is the target.

    Commas are removed first. The number of an answer is the first one after the first mark and before a second mark. An
    answer without a mark, or without a number there, gives its last number.
    """

    dataset: ClassVar[str] = "gsm8k"
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")
    chance: ClassVar[float] = 0.0

    suffix: str = param(f" {REASONING}", "text after every question", source="the harness")
    mark: str = param(
        ANSWER_MARK.strip(),
        "text instead of #### in a response; the number of an answer is read after it",
        source="the harness",
    )

    def check(self) -> None:
        """Require a mark."""
        if not self.mark.replace(",", "").strip():
            raise BadInput("Task 'gsm8k' needs a mark before the number of an answer: set gsm8k:mark=TEXT.")

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row: the mark replaces `####` before the number at the end of the answer."""
        steps, separator, number = row["answer"].rpartition("####")
        if not separator:
            raise ValueError("the answer does not end with '#### n'")
        target = number.strip()
        if not math.isfinite(_parse(target)):  # refuse an invalid target here, not when answers are scored
            raise ValueError(f"the answer {target!r} is not a finite number")
        return Example(id, f"{row['question']}{self.suffix}", f"{steps}{self.mark}{number.rstrip()}", target=target)

    def strict(self, answer: str, target: str) -> bool:
        """Return whether the text after the first mark begins with the target."""
        marked = self._marked(answer)
        number = _NUMBER.match(marked.strip()) if marked else None
        return number is not None and float(number[0]) == _parse(target)

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the number that the answer gives is the target."""
        marked = _NUMBER.findall(self._marked(answer) or "")
        numbers = marked[:1] or _NUMBER.findall(answer.replace(",", ""))[-1:]
        return [float(number) for number in numbers] == [_parse(target)]

    def _marked(self, answer: str) -> str | None:
        """Return the text between the first mark and a second one, without commas; None if there is no mark."""
        pieces = answer.replace(",", "").split(self.mark.replace(",", ""), 2)
        return pieces[1] if len(pieces) > 1 else None


def _parse(number: str) -> float:
    """Convert a number with commas between thousands.

    Raises:
        ValueError: The text is not a number.
    """
    return float(number.replace(",", ""))
