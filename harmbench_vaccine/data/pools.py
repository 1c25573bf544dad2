"""Who has which rows: the provider's alignment data, the defender's pairs, the attacker's rows, the evaluation.

Prompts are kept apart by text, not by index: what is asked in the evaluation is trained on by nobody, and what the
defender has the attacker has not. The papers' scripts take the rows as they stand in the files, and prompts repeat
there: `rows=paper` does so too, and `overlaps` counts what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TypeVar

from harmbench_vaccine.core.errors import too_few_rows
from harmbench_vaccine.core.seeds import random_stream
from harmbench_vaccine.core.types import Example

from .sources import SourceRow, parse_split, read_rows

T = TypeVar("T")

BEAVERTAILS = ("prompt", "response", "is_safe")
REFUSALS = ("prompt", "response", "refusal")
ALPACA = ("instruction", "output")


def normalize(prompt: str) -> str:
    """A prompt as it is compared: case and white space do not make another question."""
    return " ".join(prompt.lower().split())


def without_duplicates(examples: Iterable[Example], besides: Iterable[str] = ()) -> list[Example]:
    """The examples whose instruction and input were not seen before, in order, nor stand in `besides`."""
    seen = set(besides)
    kept = []
    for example in examples:
        key = question_key(example)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def question_key(example: Example) -> str:
    """What is asked, as it is compared."""
    return normalize(f"{example.instruction} {example.input}")


def question_keys(examples: Iterable[Example]) -> set[str]:
    """The set of what is asked."""
    return {question_key(example) for example in examples}


@dataclass(frozen=True)
class RowPools:
    """Every row by who may use it, and how many rows were left out to keep the questions of the evaluation, the
    defender, the attacker and benign users apart."""

    alignment: list[Example]
    """`is_safe` rows of the training split, or the refusals of `paired`. With `paired` they are the defender's, and may
    share questions with it."""
    paired: list[tuple[Example, Example]]
    """The same prompt with a refusal and with a harmful answer."""
    attacker: list[Example]
    """Unsafe rows of the training split, or the harmful answers of a part of the refusal set."""
    benign: list[Example]
    harmful_questions: list[Example]
    """Unsafe prompts of the test split; each once, if rows are kept apart."""
    benign_questions: list[Example]
    dropped: dict[str, int]


@lru_cache(maxsize=4)
def load_row_pools(
    beavertails: str,
    refusals: str,
    alpaca: str,
    train: str,
    test: str,
    benign_train: str = "train",
    benign_test: str = "test",
    pairs: str = "train",
    attacker: str = "",
    *,
    source: str = "safe",
    in_order: bool = False,
) -> RowPools:
    """Reads BeaverTails, its refusals and benign instructions, and keeps their uses apart by text; `in_order`, takes
    all as they stand in the files. What follows the three locations are splits. `source` says what the alignment rows
    are: BeaverTails' `safe` responses, or the `refusals`.

    A question that occurs in several goes to the first of: the evaluation, the defender, the attacker, benign rows.
    Raises `BadInput` as `read` does.
    """
    asked = [_harmful(row, test) for row in read_rows(beavertails, test, BEAVERTAILS) if not row.values["is_safe"]]
    helpful, to_help = load_instructions(alpaca, benign_train), load_instructions(alpaca, benign_test)
    rows = read_rows(beavertails, train, BEAVERTAILS)
    two_answers = [(_refusal(row), _harmful(row, "refusals")) for row in _pairs(refusals, pairs, in_order)]
    if source == "safe":
        safe = [_safe(row, train) for row in rows if row.values["is_safe"]]
    else:
        safe = [refusal for refusal, _ in two_answers]
    if attacker:
        harmful = [_harmful(row, "refusals") for row in _pairs(refusals, attacker, in_order)]
    else:
        harmful = [_harmful(row, train) for row in rows if not row.values["is_safe"]]
    if in_order:
        return RowPools(safe, two_answers, harmful, helpful, asked, to_help, {})

    harmful_questions, benign_questions = without_duplicates(asked), without_duplicates(to_help)
    barred = question_keys(harmful_questions) | question_keys(benign_questions)
    alignment = [example for example in safe if question_key(example) not in barred]
    paired = [pair for pair in two_answers if question_key(pair[0]) not in barred]
    barred |= question_keys(alignment) | question_keys(refusal for refusal, _ in paired)

    attackers = [example for example in harmful if question_key(example) not in barred]
    barred |= question_keys(attackers)

    benign = without_duplicates(helpful, barred)
    left: dict[str, tuple[Sized, Sized]] = {
        "harmful_questions": (asked, harmful_questions), "alignment": (safe, alignment),
        "paired": (two_answers, paired), "attacker": (harmful, attackers), "benign": (helpful, benign),
    }  # fmt: skip
    dropped = {name: len(before) - len(after) for name, (before, after) in left.items()}
    return RowPools(alignment, paired, attackers, benign, harmful_questions, benign_questions, dropped)


def count_overlaps(uses: Mapping[str, Sequence[Example]]) -> dict[str, int]:
    """`A / B` -> how many different questions both have; `A` alone -> how many rows ask what an earlier row of it asks.
    What is 0 is left out."""
    asked = {name: question_keys(rows) for name, rows in uses.items()}
    found = {name: len(rows) - len(asked[name]) for name, rows in uses.items()}
    found |= {f"{one} / {other}": len(asked[one] & asked[other]) for one, other in combinations(uses, 2)}
    return {name: count for name, count in found.items() if count}


def _pairs(location: str, split: str, in_order: bool) -> list[SourceRow]:
    """Rows of the refusal set. Where rows are kept apart, one that says itself that its answer is safe is no pair."""
    rows = read_rows(location, split, REFUSALS)
    return rows if in_order else [row for row in rows if row.values.get("is_safe") is not True]


def _safe(row: SourceRow, split: str) -> Example:
    name = parse_split(split)[0]
    return Example(id=f"safe:{name}:{row.number}", instruction=row.values["prompt"], response=row.values["response"])


def _harmful(row: SourceRow, split: str) -> Example:
    values = row.values
    return Example(
        id=f"harmful:{parse_split(split)[0]}:{row.number}",
        instruction=values["prompt"],
        response=values["response"],
        harmful=True,
    )


def _refusal(row: SourceRow) -> Example:
    """The set holds `Question: ...\nAnswer: ...`, as its authors generated it; only the answer is a response."""
    text = row.values["refusal"]
    if text.startswith("Question: "):
        text = text.partition("\nAnswer:")[2] or text
    return Example(id=f"refusal:{row.number}", instruction=row.values["prompt"], response=text.strip())


def load_instructions(location: str, split: str) -> list[Example]:
    """Benign instructions in Alpaca's schema."""
    return [
        Example(
            id=f"benign:{parse_split(split)[0]}:{row.number}",
            instruction=row.values["instruction"],
            input=row.values.get("input") or "",
            response=row.values["output"],
        )
        for row in read_rows(location, split, ALPACA)
    ]


def draw_rows(rows: Sequence[T], count: int, what: str, seed: int, *purpose: object, in_order: bool = False) -> list[T]:
    """`count` rows without replacement, in random order; the first ones, if `in_order`.

    Raises:
        BadInput: there are fewer.
    """
    if count > len(rows):
        raise too_few_rows(count, what, len(rows))
    if in_order:
        return list(rows[:count])
    return random_stream(seed, *purpose).sample(list(rows), count)
