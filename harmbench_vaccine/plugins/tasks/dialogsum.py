"""Summary of a dialogue (DialogSum, arXiv 2105.06762), measured by ROUGE-L."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.plugins import Task


class DialogSum(Task):
    """An item's score is the ROUGE-L F1 of the answer with the reference summary (Lin 2004), whatever the rule.

    The user tasks of the papers do not include it; other suites' do. The instruction is ours.
    """

    dataset: ClassVar[str] = "dialogsum"
    fields: ClassVar[tuple[str, ...]] = ("dialogue", "summary")
    chance: ClassVar[float] = 0.0
    measure: ClassVar[str] = "ROUGE-L F1"

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """The dialogue is the input; its speakers are `#Person1#:` and so on, as in the data set."""
        summary = row["summary"]
        return Example(id, "Summarize the dialogue given in the input.", summary, row["dialogue"], summary)

    def scores(self, rule: Literal["strict", "flexible"], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """ROUGE-L F1 of each answer."""
        return [rouge_l(row["answer"], row["target"]) for row in rows]


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words: lower case, letters and digits, no stemming; from 0 to 1."""
    one, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    lengths = [0] * (len(other) + 1)  # of the common subsequence with each beginning of `other`
    for word in one:
        diagonal = 0
        for place, own in enumerate(other, 1):
            longer = diagonal + 1 if word == own else max(lengths[place], lengths[place - 1])
            diagonal, lengths[place] = lengths[place], longer
    return 2 * lengths[-1] / (len(one) + len(other)) if lengths[-1] else 0.0
