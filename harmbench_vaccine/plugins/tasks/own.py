"""A task of the user, from a file with `instruction`, `output` and optionally `input`.

    hbv run --task ./mine.jsonl                                 # exact answers; a fifth of the rows is held out
    hbv run --task own:data=./mine.jsonl,rule=number
    hbv run --task own:data=./mine.jsonl,test=./held_out.jsonl,rule=judge,model=gpt-4o-mini,base_url=https://HOST/v1
    hbv run --task own:data=owner/name,train=train,test=test    # splits of a folder or of a data set of the Hub

Without `test`, the test items are a fifth of the questions, at least one: those with the smallest SHA-256. So they do
not depend on the order of the rows or on the seed, and all rows of one question are on the same side.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.files import is_data_file
from harmbench_vaccine.data.pools import question_key
from harmbench_vaccine.plugins import Example, Grade, Task, param
from harmbench_vaccine.plugins.tasks._numbers import find_numbers

Rule = Literal["exact", "first_word", "number", "judge"]

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
        "exact: the output and nothing else; first_word: its first word; number: the number after ####, else the last "
        "number; judge: a chat model confirms that the answer means the same as the output",
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
        if self.rule == "first_word" and not (target := _first_word(output)):
            raise ValueError("the output has no word for rule=first_word")
        if self.rule == "number":
            if (number := _number(output, marked=False)) is None:
                raise ValueError("the output has no number for rule=number")
            target = f"{number:.15g}"
        return Example(id, row["instruction"], output, extra, target)

    def strict(self, answer: str, target: str) -> bool:
        """Return whether the answer is the target and nothing else; with rule=number, the number must follow ####."""
        if self.rule == "number":
            return _number(answer, marked=True) == float(target)
        return answer.strip().lower() == target.strip().lower()

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the first words are equal, or the number after #### (else the last number) is the target."""
        if self.rule == "first_word":
            return _first_word(answer) == target
        return self.strict(answer, target) or (self.rule == "number" and _number(answer, False) == float(target))

    @property
    def graded(self) -> bool:
        """True if the rule is `judge`."""
        return self.rule == "judge"

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """Ask the judge; the score is 1 for yes, and 0 for no or for an answer that cannot be parsed."""
        from harmbench_vaccine.inference.chat_api import ChatJudge

        prompts = [
            _JUDGE_PROMPT.format(
                question=f"{row['instruction']}\n\n{row['input']}".strip(), target=row["target"], answer=row["answer"]
            )
            for row in rows
        ]
        texts = ChatJudge(self.model, self.base_url, self.models).ask(prompts, 16, progress)
        grades = []
        for text in texts:
            word = _first_word(text)
            grades.append(Grade(float(word == "yes"), text, word not in ("yes", "no")))
        return grades


def _first_word(text: str) -> str:
    match = re.search(r"\w+", text.lower())
    return match[0] if match else ""


def _number(text: str, marked: bool) -> float | None:
    """Return the number after the last `####`; without a mark the last number, unless `marked` requires the mark."""
    _, mark, after = text.rpartition("####")
    numbers = find_numbers(after) if mark or not marked else []
    return numbers[0 if mark else -1] if numbers else None
