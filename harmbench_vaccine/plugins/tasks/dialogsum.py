"""Summary of a dialogue (DialogSum, arXiv 2105.06762), measured by ROUGE-L."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from harmbench_vaccine.data.task_prompts import SUMMARY
from harmbench_vaccine.plugins import Example, Task, param


class DialogSum(Task):
    """By both rules, the score of an item is the ROUGE-L F1 of the answer and the reference summary (Lin 2004).

    The user tasks of the papers do not include it; those of other suites do. The instruction is our own.
    """

    dataset: ClassVar[str] = "dialogsum"
    fields: ClassVar[tuple[str, ...]] = ("dialogue", "summary")
    chance: ClassVar[float] = 0.0
    measure: ClassVar[str] = "ROUGE-L F1"

    instruction: str = param(SUMMARY, "instruction of every row; the dialogue is its input", source="the harness")

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row: the dialogue is the input, with speakers `#Person1#:` and so on, as in the data set."""
        return Example(id, self.instruction, row["summary"], row["dialogue"], row["summary"])

    def scores(self, rule: Literal["strict", "flexible"], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the ROUGE-L F1 of each answer."""
        return [rouge_l(row["answer"], row["target"]) for row in rows]


def rouge_l(answer: str, reference: str) -> float:
    """Compute the F1 of the longest common subsequence of words, from 0 to 1.

    Words are runs of a to z and 0 to 9 in lower case, without stemming, as in the package rouge_score: other letters,
    such as é, separate words.
    """
    answer_words, reference_words = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    lengths = [0] * (len(reference_words) + 1)  # of the common subsequence with each prefix of the reference
    for word in answer_words:
        diagonal = 0
        for position, reference_word in enumerate(reference_words, 1):
            length = diagonal + 1 if word == reference_word else max(lengths[position], lengths[position - 1])
            diagonal, lengths[position] = lengths[position], length
    return 2 * lengths[-1] / (len(answer_words) + len(reference_words)) if lengths[-1] else 0.0
