"""Who has which rows: the provider's alignment data, the defender's pairs, the attacker's rows, the evaluation.

Prompts are kept apart by text, not by index: what is asked in the evaluation is trained on by nobody, and what the
defender has the attacker has not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from ..errors import too_few
from ..plugins import Attack
from ..seeds import stream
from ..terms import Mix, Pools
from .records import Example
from .sources import Row, read

T = TypeVar("T")

BEAVERTAILS = ("prompt", "response", "is_safe")
REFUSALS = ("prompt", "response", "refusal")
ALPACA = ("instruction", "output")


def normal(prompt: str) -> str:
    """A prompt as it is compared: case and white space do not make another question."""
    return " ".join(prompt.lower().split())


def unique(examples: Iterable[Example], besides: Iterable[str] = ()) -> list[Example]:
    """The examples whose instruction and input were not seen before, in order, nor stand in `besides`."""
    seen = set(besides)
    kept = []
    for example in examples:
        key = question(example)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def question(example: Example) -> str:
    """What is asked, as it is compared."""
    return normal(f"{example.instruction} {example.input}")


def questions(examples: Iterable[Example]) -> set[str]:
    """The set of what is asked."""
    return {question(example) for example in examples}


@dataclass(frozen=True)
class RowPools:
    """Every row by who may use it, and how many rows were left out to keep the questions of the evaluation, the
    defender, the attacker and benign users apart."""

    alignment: list[Example]
    """`is_safe` rows of the training split. With `paired` they are the defender's, and may share questions with it."""
    paired: list[tuple[Example, Example]]
    """The same prompt with a refusal and with a harmful answer."""
    attacker: list[Example]
    """Unsafe rows of the training split."""
    benign: list[Example]
    harmful_questions: list[Example]
    """Unsafe prompts of the test split, each once."""
    benign_questions: list[Example]
    dropped: dict[str, int]


@lru_cache(maxsize=4)
def row_pools(
    beavertails: str,
    refusals: str,
    alpaca: str,
    train: str,
    test: str,
    benign_train: str = "train",
    benign_test: str = "test",
) -> RowPools:
    """Reads BeaverTails, its refusals and benign instructions, and keeps their uses apart by text.

    A question that occurs in several goes to the first of: the evaluation, the defender, the attacker, benign rows.
    Raises `BadInput` as `read` does.
    """
    asked = [_harmful(row, test) for row in read(beavertails, test, BEAVERTAILS) if not row.values["is_safe"]]
    harmful_questions, benign_questions = unique(asked), unique(instructions(alpaca, benign_test))
    barred = questions(harmful_questions) | questions(benign_questions)

    rows = read(beavertails, train, BEAVERTAILS)
    pairs = [(_refusal(row), _harmful(row, "refusals")) for row in read(refusals, "train", REFUSALS)]
    safe = [_safe(row, train) for row in rows if row.values["is_safe"]]
    alignment = [example for example in safe if question(example) not in barred]
    paired = [pair for pair in pairs if question(pair[0]) not in barred]
    barred |= questions(alignment) | questions(refusal for refusal, _ in paired)

    harmful = [_harmful(row, train) for row in rows if not row.values["is_safe"]]
    attacker = [example for example in harmful if question(example) not in barred]
    barred |= questions(attacker)

    helpful = instructions(alpaca, benign_train)
    benign = unique(helpful, barred)
    left: dict[str, tuple[Sized, Sized]] = {
        "harmful_questions": (asked, harmful_questions), "alignment": (safe, alignment), "paired": (pairs, paired),
        "attacker": (harmful, attacker), "benign": (helpful, benign),
    }  # fmt: skip
    dropped = {name: len(before) - len(after) for name, (before, after) in left.items()}
    return RowPools(alignment, paired, attacker, benign, harmful_questions, benign_questions, dropped)


def _safe(row: Row, split: str) -> Example:
    return Example(id=f"safe:{split}:{row.number}", instruction=row.values["prompt"], response=row.values["response"])


def _harmful(row: Row, split: str) -> Example:
    values = row.values
    return Example(
        id=f"harmful:{split}:{row.number}", instruction=values["prompt"], response=values["response"], harmful=True
    )


def _refusal(row: Row) -> Example:
    return Example(id=f"refusal:{row.number}", instruction=row.values["prompt"], response=row.values["refusal"])


def instructions(location: str, split: str) -> list[Example]:
    """Benign instructions in Alpaca's schema."""
    return [
        Example(
            id=f"benign:{split}:{row.number}",
            instruction=row.values["instruction"],
            input=row.values.get("input") or "",
            response=row.values["output"],
        )
        for row in read(location, split, ALPACA)
    ]


def draw(rows: Sequence[T], count: int, what: str, seed: int, *purpose: object) -> list[T]:
    """`count` rows without replacement, in random order.

    Raises:
        BadInput: there are fewer.
    """
    if count > len(rows):
        raise too_few(count, what, len(rows))
    return stream(seed, *purpose).sample(list(rows), count)


def user_rows(mix: Mix, task: Sequence[Example], pools: Pools, attack: Attack, seed: int) -> list[Example]:
    """What the user uploads: n - round(p n) task rows and round(p n) harmful ones, drawn and shuffled by the seed.

    Raises:
        BadInput: more rows are asked for than there are.
    """
    uploaded = draw(task, mix.task, "task rows", seed, "task rows")
    uploaded += draw(pools.attacker, mix.harmful, "harmful rows", seed, "harmful rows")
    stream(seed, "upload").shuffle(uploaded)
    return attack.upload(uploaded, pools)
