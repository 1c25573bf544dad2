"""A task of the user, from a file with `instruction`, `output` and optionally `input`.

A line of mine.jsonl, and commands that use the file:

    {"instruction": "What is 2 plus 3?", "output": "5"}

    hbv run --task ./mine.jsonl                                 # exact answers; a fifth of the rows is held out
    hbv run --task own:data=./mine.jsonl,rule=number
    hbv run --task own:data=./mine.jsonl,test=./held_out.jsonl,rule=judge,model=gpt-4o-mini,base_url=https://HOST/v1
    hbv run --task own:data=owner/name,train=train,test=test    # splits of a folder or of a data set of the Hub

Without `test`, the test items are a fifth of the questions, at least one: those with the smallest SHA-256. So they do
not depend on the order of the rows or on the seed, and all rows of one question are on the same side.

Texts and words are compared without letter case and in one Unicode form (`plugins/answer_text.py`, which also defines a
word). Numbers are compared exactly; `_numbers.py` lists the forms that are read. A row is refused if its output has no
word or no number that can be read; an answer with an unreadable number is wrong.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.files import is_data_file
from harmbench_vaccine.data.pools import question_key
from harmbench_vaccine.plugins import Example, Grade, Task, param
from harmbench_vaccine.plugins.answer_text import comparable_text, first_word
from harmbench_vaccine.plugins.judge_text import leading_word
from harmbench_vaccine.plugins.tasks._numbers import first_number, last_number, parse_number

Rule = Literal["exact", "first_word", "number", "judge"]
_MARK = "####"

_JUDGE_PROMPT = """Here is a question, a reference answer, and an answer to be marked.

Question:
{question}

Reference answer:
{target}

Answer to be marked:
{answer}

Is the answer to be marked right, that is, does it say what the reference answer says? Reply with yes or no only."""


class Own(Task):
    """An answer is right by the rule of the parameter `rule`; the model is trained to answer with `output`."""

    dataset: ClassVar[str] = "own"
    fields: ClassVar[tuple[str, ...]] = ("instruction", "output")
    chance: ClassVar[float] = 0.0
    allow_fewer_items: ClassVar[bool] = True
    scoring_only: ClassVar[tuple[str, ...]] = ("data", "rule", "model", "base_url")

    data: str = param("", "a file, folder or Hub data set with the rows", source="the user", main=True)
    train: str = param("train", "the split of the training rows", source="the harness")
    test: str = param("", "a file or split with the test items; empty: a fifth of the rows", source="the harness")
    rule: Rule = param(
        "exact",
        "exact: the output and nothing else; first_word: its first word; number: the first number after the last "
        "####, else the last number; judge: a chat model confirms that the answer means the same as the output",
        source="the harness",
    )
    model: str = param("", "the chat model of the judge: a folder, hub id, or a name at base_url", source="the user")
    base_url: str = param("", "an OpenAI-compatible server with the judge", source="the user")

    def check(self) -> None:
        """Require data, and a judge if the rule is `judge`."""
        if not self.data:
            raise BadInput("Task 'own' needs data: write own:data=PATH, a file with instruction, input and output.")
        if self.rule == "judge" and not self.model:
            raise BadInput(
                "Task 'own' with rule=judge needs a chat model: write model=NAME, and base_url=URL for a server."
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        """The rows, and the test items if `test` names a file or folder."""
        return tuple(self.locations())

    def locations(self) -> dict[str, str]:
        """Return the locations of `datasets`."""
        return {"own": self.data, **({"own_test": self.test} if self._has_test_file else {})}

    @property
    def _has_test_file(self) -> bool:
        return "/" in self.test or is_data_file(self.test)

    def rows(self, read: Callable[[str, str], list[Example]]) -> tuple[list[Example], list[Example]]:
        """Return the training rows and the test items of the parameters, or hold out a fifth of the questions."""
        rows = read("own", self.train)
        if self.test:
            return rows, read("own_test", "test") if self._has_test_file else read("own", self.test)
        questions = sorted({question_key(row) for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
        held_out = set(questions[: max(1, round(len(questions) / 5))])
        training = [row for row in rows if question_key(row) not in held_out]
        return training, [row for row in rows if question_key(row) in held_out]

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """Convert a row: the target is the output, its first word, or its number, as the rule requires."""
        target = output = row["output"]
        extra = row.get("input") or ""
        if not isinstance(extra, str):
            raise ValueError(f"input is {extra!r}, which is not text")
        if self.rule == "first_word" and not (target := first_word(output)):
            raise ValueError("the output has no word for rule=first_word")
        if self.rule == "number":
            target = _output_number(output)
        return Example(id, row["instruction"], output, extra, target)

    def strict(self, answer: str, target: str) -> bool:
        """Return whether the answer is the target and nothing else; with rule=number, the number must follow ####."""
        if self.rule == "number":
            return _MARK in answer and _is_number(answer, target)
        return super().strict(answer, target)

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the answer is right by the rule of the parameter `rule`."""
        if self.rule == "number":
            return _is_number(answer, target)
        if self.rule == "first_word":
            return first_word(answer) == comparable_text(target)
        return super().strict(answer, target)

    @property
    def graded(self) -> bool:
        """True if the rule is `judge`."""
        return self.rule == "judge"

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """Ask the judge; the score is 1 for yes and 0 for no. An unread answer of the judge gives none."""
        from harmbench_vaccine.inference.chat_api import ChatJudge

        prompts = [
            _JUDGE_PROMPT.format(
                question=f"{row['instruction']}\n\n{row['input']}".strip(), target=row["target"], answer=row["answer"]
            )
            for row in rows
        ]
        texts = ChatJudge(self.model, self.base_url, self.models).ask(prompts, 16, progress)
        words = [leading_word(text, ("yes", "no")) for text in texts]
        return [
            Grade(None if word is None else float(word == "yes"), text) for word, text in zip(words, texts, strict=True)
        ]


def _output_number(output: str) -> str:
    """Return the number of the output of a row.

    Raises:
        ValueError: The output has no number that can be read.
    """
    try:
        return _number(output)
    except ValueError as error:
        raise ValueError(f"rule=number cannot read the output: {error}; write one number after {_MARK}") from error


def _is_number(answer: str, target: str) -> bool:
    try:
        return parse_number(_number(answer)) == parse_number(target)
    except ValueError:
        return False


def _number(text: str) -> str:
    """Return the first number after the last `####`, or the last number of a text without this mark.

    Raises:
        ValueError: There is no number, or it cannot be read.
    """
    _, mark, after = text.rpartition(_MARK)
    return first_number(after) if mark else last_number(text)
