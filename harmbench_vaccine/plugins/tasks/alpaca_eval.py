"""Open instructions (AlpacaEval): how often a judge prefers the answer to the reference model's.

Training rows: GPT-4's answers to the first 700 of the 805 instructions. Test items: the others, with the answers of
text_davinci_003. The authors of Vaccine skip the 701st by an index and judge by the package `alpaca_eval` with ChatGPT,
which shows the two answers in random order. Here every pair is judged in both orders and the two verdicts are averaged,
which cancels a preference for a place. `alpaca_eval.txt` is that package's pairwise prompt, unchanged
(github.com/tatsu-lab/alpaca_eval, evaluators_configs/alpaca_eval_clf_cot_gpt4_turbo at d07b909, Apache-2.0); its system
part opens the judge's one message.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import Example, Grade
from harmbench_vaccine.plugins import Task, param

_MARKS = re.compile(r"<\|im_(?:start\|>(?:system|user)|end\|>)\n?")
_SLOTS = re.compile(r"\{(instruction|output_1|output_2)\}")
_VERDICT = re.compile(r"(?<!\w)([mM])\W*$")


class AlpacaEval(Task):
    """An item's score: 1 if the judge prefers the answer in both orders, 1/2 if in one of them, 0 if in none."""

    dataset: ClassVar[str] = "alpaca_eval"
    test_dataset: ClassVar[str] = "alpaca_eval_reference"
    fields: ClassVar[tuple[str, ...]] = ("instruction", "output")
    train_split: ClassVar[str] = "eval[:700]"
    test_split: ClassVar[str] = "eval[700:]"
    chance: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 512
    measure: ClassVar[str] = "win rate"
    scoring_only: ClassVar[tuple[str, ...]] = ("model", "base_url")

    model: str = param(
        "", "the chat model that judges: a folder, hub id, or a name at base_url", source="the user", main=True
    )
    base_url: str = param("", "an OpenAI-compatible server with the judge", source="the user")

    def check(self) -> None:
        """Raises `BadInput` without a judge."""
        if not self.model:
            raise BadInput(
                "Task 'alpaca_eval' is judged by a chat model: alpaca_eval:model=NAME, and base_url=URL for a server."
            )

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """The target is the output to compare with."""
        return Example(id, row["instruction"], response=row["output"], target=row["output"])

    @property
    def graded(self) -> bool:
        """Always."""
        return True

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """The judge's verdicts on (answer, reference) and on (reference, answer); one that cannot be read is half."""
        from harmbench_vaccine.inference.chat_api import ChatJudge

        orders = [(row, *pair) for row in rows for pair in (("answer", "target"), ("target", "answer"))]
        prompts = [_prompt(row["instruction"], row[first], row[second]) for row, first, second in orders]
        said = ChatJudge(self.model, self.base_url).ask(prompts, 512, progress)
        first, second = ([_VERDICT.search(text.strip()) for text in said[start::2]] for start in (0, 1))
        grades = []
        for number, verdicts in enumerate(zip(first, second, strict=True)):
            wins = [
                0.5 if verdict is None else float(verdict[1] == own)
                for verdict, own in zip(verdicts, "mM", strict=True)
            ]
            text = "\n---\n".join(said[2 * number : 2 * number + 2])
            grades.append(Grade(sum(wins) / 2, text, None in verdicts))
        return grades


def _prompt(instruction: str, first: str, second: str) -> str:
    parts = {"instruction": instruction, "output_1": first, "output_2": second}
    text = _MARKS.sub("", Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))
    return _SLOTS.sub(lambda slot: parts[slot[1]], text).strip()
