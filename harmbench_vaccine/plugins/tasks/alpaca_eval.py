"""Open instructions (AlpacaEval): how often a judge prefers the answer of the model to that of a reference model.

Training rows: the answers of GPT-4 to the first 700 of the 805 instructions. Test items: the other instructions, with
the answers of text_davinci_003. The Vaccine authors skip the 701st instruction through an index, and judge with the
package `alpaca_eval` and ChatGPT, which sees the two answers in random order. Here the judge sees every pair in both
orders and the two verdicts are averaged, which cancels a preference for a position. `alpaca_eval.txt` is the pairwise
prompt of that package, unchanged (github.com/tatsu-lab/alpaca_eval, evaluators_configs/alpaca_eval_clf_cot_gpt4_turbo
at d07b909, Apache-2.0); its system part is the beginning of the only message to the judge.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.plugins import Example, Grade, Task, param

_TURN_MARKS = re.compile(r"<\|im_(?:start\|>(?:system|user)|end\|>)\n?")
_SLOTS = re.compile(r"\{(instruction|output_1|output_2)\}")
_MARKS = "*`\"'“”‘’()[]{}<>.,:;!#"
_OPEN_ENDS = frozenset(("m", "or", "and", "nor", "not", "than", "over", "to", "vs", "versus"))
"""Words before the last one after which it is not a choice: `m or M`, `m is better than M`."""
_JUDGE_PROMPT = _TURN_MARKS.sub("", Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))


class AlpacaEval(Task):
    """The score of an item is 1 if the judge prefers the answer in both orders, 1/2 if in one, and 0 if in none.

    An item has no score if one of its two verdicts is unread. A verdict is the last word of the judge's text.
    """

    dataset: ClassVar[str] = "alpaca_eval"
    test_dataset: ClassVar[str] = "alpaca_eval_reference"
    fields: ClassVar[tuple[str, ...]] = ("instruction", "output")
    train_split: ClassVar[str] = "eval[:700]"
    test_split: ClassVar[str] = "eval[700:]"
    chance: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 512
    measure: ClassVar[str] = "win rate"
    scoring_only: ClassVar[tuple[str, ...]] = ("model", "base_url")
    fixed_texts: ClassVar[tuple[str, ...]] = (_JUDGE_PROMPT,)

    model: str = param(
        "", "the chat model of the judge: a folder, hub id, or a name at base_url", source="the user", main=True
    )
    base_url: str = param("", "an OpenAI-compatible server with the judge", source="the user")

    def check(self) -> None:
        """Require a judge."""
        if not self.model:
            raise BadInput(
                "Task 'alpaca_eval' needs a chat model as a judge: write alpaca_eval:model=NAME, and base_url=URL for "
                "a server."
            )

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row: the target is the output of the reference model."""
        return Example(id, row["instruction"], response=row["output"], target=row["output"])

    @property
    def graded(self) -> bool:
        """True: a judge scores every item."""
        return True

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """Ask the judge about (answer, reference) and (reference, answer)."""
        from harmbench_vaccine.inference.chat_api import ChatJudge

        orders = [(row, *pair) for row in rows for pair in (("answer", "target"), ("target", "answer"))]
        prompts = [_prompt(row["instruction"], row[first], row[second]) for row, first, second in orders]
        texts = ChatJudge(self.model, self.base_url, self.models).ask(prompts, 512, progress)
        return [_grade(texts[number], texts[number + 1]) for number in range(0, len(texts), 2)]


def _grade(text: str, swapped_text: str) -> Grade:
    """Average the verdicts of both orders: the answer is `m` in the first one and `M` in the second one."""
    choices = (_choice(text), _choice(swapped_text))
    score = None if None in choices else sum(choice == name for choice, name in zip(choices, "mM", strict=True)) / 2
    return Grade(score, f"{text}\n---\n{swapped_text}")


def _choice(text: str) -> str | None:
    """Return the last word of a judge's text, `m` or `M`; None if it is another word, or if it is not a choice."""
    *_, before, last = ["", "", *(text.strip().splitlines() or [""])[-1].split()]
    name = last.strip(_MARKS).rpartition(":")[2].strip(_MARKS)
    is_open = before.strip(_MARKS).lower() in _OPEN_ENDS or before[-1:].isdigit()  # `5 m` is a length
    return name if name in ("m", "M") and not is_open else None


def _prompt(instruction: str, first: str, second: str) -> str:
    parts = {"instruction": instruction, "output_1": first, "output_2": second}
    return _SLOTS.sub(lambda slot: parts[slot[1]], _JUDGE_PROMPT).strip()
