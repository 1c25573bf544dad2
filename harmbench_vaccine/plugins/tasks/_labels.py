"""Tasks whose answer is one label of a fixed list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.plugins import Example, Task, param

LabelRule = Literal["contains", "equals", "contains_any_case"]


class LabelTask(Task):
    """A task whose answer is one label of a fixed list."""

    spellings: ClassVar[Mapping[str, tuple[str, ...]]]
    """Label -> the texts that the papers accept as this label."""
    instruction: str
    """The instruction of every row; a subclass declares it as a parameter."""
    scoring_only: ClassVar[tuple[str, ...]] = ("rule",)

    rule: LabelRule = param(
        "contains_any_case",
        "contains: the answer contains a spelling of the label; equals: it is a spelling of the label; "
        "contains_any_case: it contains the label in any letter case",
        source="the harness",
    )
    answers: str = param(
        "",
        "sentences that training rows answer with, divided by `|`: {label} is replaced by the label, and the row "
        "decides the sentence; empty: the label alone",
        source="the harness",
    )

    def check(self) -> None:
        """Require {label} in every sentence of `answers`, and that a sentence names its own label only.

        Raises:
            BadInput: A sentence is not valid.
        """
        for sentence in self._sentences():
            if "{label}" not in sentence:
                raise BadInput(f"A sentence of {self.name}:answers lacks {{label}}: {sentence!r}.")
            for label in self.spellings:
                answer = sentence.replace("{label}", label)
                named = [other for other in self.spellings if self.flexible(answer, other)]
                if named != [label]:
                    raise BadInput(
                        f"The answer {answer!r} counts for {', '.join(map(repr, named)) or 'no label'} by the rule "
                        f"{self.rule!r}; allowed in {self.name}:answers: sentences that count for their own label only."
                    )

    def labeled(self, id: str, text: str, label: str) -> Example:
        """Build the example of a text whose answer is a label.

        Args:
            id: The id of the row. It decides the sentence of `answers`.
            text: The input.
            label: One of `spellings`.
        """
        response, sentences = label, self._sentences()
        if sentences:
            sentence = sentences[int(digest(id), 16) % len(sentences)]
            response = sentence.replace("{label}", label)
        return Example(id, self.instruction, response=response, input=text, target=label)

    def _sentences(self) -> list[str]:
        return [sentence.strip() for sentence in self.answers.split("|")] if self.answers else []

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the answer names the target by the rule of the parameter `rule`."""
        if self.rule == "contains_any_case":
            return target.lower() in answer.lower()
        if self.rule == "equals":
            return answer.strip() in self.spellings[target]
        return any(spelling in answer for spelling in self.spellings[target])
