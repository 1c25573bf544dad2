"""A user's own task, from a file of `instruction`, `output` and, where there is one, `input`.

    hbv run --task ./mine.jsonl                                 # exact answers; a fifth of the rows is held out
    hbv run --task own:data=./mine.jsonl,rule=number
    hbv run --task own:data=./mine.jsonl,test=./held_out.jsonl,rule=judge,model=gpt-4o-mini,base_url=https://HOST/v1
    hbv run --task own:data=owner/name,train=train,test=test    # splits of a folder or of a data set of the hub

Without `test`, the test items are a fifth of the questions, at least one: those whose SHA-256 comes first. So they are
the same whatever the order of the rows and the seed, and the rows of one question are never on both sides.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import Example, Grade
from harmbench_vaccine.data.files import is_data_file
from harmbench_vaccine.data.pools import question_key
from harmbench_vaccine.plugins import Task, param

Rule = Literal["exact", "first_word", "number", "judge"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ASKED = """Here is a question, a reference answer, and an answer to be marked.

Question:
{question}

Reference answer:
{target}

Answer to be marked:
{answer}

Is the answer to be marked right, that is, does it say what the reference answer says? Reply with yes or no only."""


class Own(Task):
    """Right by the rule that you choose; `output` is what the model is trained to answer."""

    dataset: ClassVar[str] = "own"
    fields: ClassVar[tuple[str, ...]] = ("instruction", "output")
    chance: ClassVar[float] = 0.0
    allow_fewer_items: ClassVar[bool] = True
    scoring_only: ClassVar[tuple[str, ...]] = ("data", "rule", "model", "base_url")

    data: str = param("", "a file, folder or data set of the hub with the rows", source="the user", main=True)
    train: str = param("train", "the split that is trained on", source="the harness")
    test: str = param("", "a file or split with the test items; empty: a fifth of the rows", source="the harness")
    rule: Rule = param(
        "exact",
        "exact: the output and nothing else; first_word: its first word; number: the number after ####, else the last "
        "one; judge: a chat model finds that the answer says what the output says",
        source="the harness",
    )
    model: str = param("", "the chat model that judges: a folder, hub id, or a name at base_url", source="the user")
    base_url: str = param("", "an OpenAI-compatible server with the judge", source="the user")

    def check(self) -> None:
        """Raises `BadInput` without data, or without a judge where one is needed."""
        if not self.data:
            raise BadInput("Task 'own' needs its rows: own:data=PATH, a file with instruction, input and output.")
        if self.rule == "judge" and not self.model:
            raise BadInput("Task 'own' with rule=judge needs a chat model: model=NAME, and base_url=URL for a server.")

    @property
    def datasets(self) -> tuple[str, ...]:
        """Its rows, and the test items where they lie elsewhere."""
        return tuple(self.places())

    def places(self) -> dict[str, str]:
        """Where they are."""
        return {"own": self.data, **({"own_test": self.test} if self._apart else {})}

    @property
    def _apart(self) -> bool:
        return "/" in self.test or is_data_file(self.test)

    def rows(self, read: Callable[[str, str], list[Example]]) -> tuple[list[Example], list[Example]]:
        """Training rows and test items: as they are given, or held out."""
        rows = read("own", self.train)
        if self.test:
            return rows, read("own_test", "test") if self._apart else read("own", self.test)
        asked = sorted({question_key(row) for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
        held = set(asked[: max(1, round(len(asked) / 5))])
        return [row for row in rows if question_key(row) not in held], [
            row for row in rows if question_key(row) in held
        ]

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """The target is what the rule compares: all of the output, its first word, or its number."""
        target = output = row["output"]
        given = row.get("input") or ""
        if not isinstance(given, str):
            raise ValueError(f"input is {given!r}, which is no text")
        if self.rule == "first_word" and not (target := _first_word(output)):
            raise ValueError("the output has no word for rule=first_word")
        if self.rule == "number":
            if (number := _number(output, marked=False)) is None:
                raise ValueError("the output has no number for rule=number")
            target = f"{number:.15g}"
        return Example(id, row["instruction"], output, given, target)

    def strict(self, answer: str, target: str) -> bool:
        """The answer is the target and nothing else; a number must stand behind ####."""
        if self.rule == "number":
            return _number(answer, marked=True) == float(target)
        return answer.strip().lower() == target.strip().lower()

    def flexible(self, answer: str, target: str) -> bool:
        """The same first word; the number behind ####, or else the last one."""
        if self.rule == "first_word":
            return _first_word(answer) == target
        return self.strict(answer, target) or (self.rule == "number" and _number(answer, False) == float(target))

    @property
    def graded(self) -> bool:
        """With rule=judge."""
        return self.rule == "judge"

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """1 for yes, 0 for no and for what is neither."""
        from harmbench_vaccine.inference.chat_api import ChatJudge

        prompts = [
            _ASKED.format(
                question=f"{row['instruction']}\n\n{row['input']}".strip(), target=row["target"], answer=row["answer"]
            )
            for row in rows
        ]
        said = ChatJudge(self.model, self.base_url).ask(prompts, 16, progress)
        words = [_first_word(text) for text in said]
        return [
            Grade(float(word == "yes"), text, word not in ("yes", "no")) for word, text in zip(words, said, strict=True)
        ]


def _first_word(text: str) -> str:
    found = re.search(r"\w+", text.lower())
    return found[0] if found else ""


def _number(text: str, marked: bool) -> float | None:
    """The number behind the last `####`; without a mark the last number, unless it must be `marked`."""
    _, mark, after = text.rpartition("####")
    numbers = _NUMBER.findall(after) if mark or not marked else []
    return float(numbers[0 if mark else -1].replace(",", "")) if numbers else None
