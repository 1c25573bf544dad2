"""Divide rows among their users: alignment data, the defender's pairs, the attacker's rows, and the evaluation.

Prompts are compared as text, not by row number: evaluation prompts are never trained on, and the attacker has none of
the defender's prompts. The scripts of the papers use the rows in file order instead, where prompts repeat. `rows=paper`
does the same, and `count_overlaps` counts the repeated prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TypeVar

from harmbench_vaccine.core.errors import too_few_rows
from harmbench_vaccine.core.seeds import random_stream
from harmbench_vaccine.core.types import Example

from .sources import RowReader, SourceRow, parse_split

T = TypeVar("T")

BEAVERTAILS = ("prompt", "response", "is_safe")
"""The fields of a BeaverTails row. Its `category`, an object of harm category -> true or false, is optional."""
REFUSALS = ("prompt", "response", "refusal")
"""The fields of a row of the refusal set."""
ALPACA = ("instruction", "output")
"""The fields of an Alpaca row."""


def normalize(prompt: str) -> str:
    """Return a prompt in the form for comparisons: without differences in case and white space."""
    return " ".join(prompt.lower().split())


def without_duplicates(examples: Iterable[Example], excluded: Iterable[str] = ()) -> list[Example]:
    """Return the first example of every question, in order.

    Args:
        examples: The examples.
        excluded: Keys of questions to skip (see `question_key`).
    """
    keys = set(excluded)
    unique = []
    for example in examples:
        key = question_key(example)
        if key not in keys:
            keys.add(key)
            unique.append(example)
    return unique


def validation_rows(examples: Sequence[Example], reported: int) -> list[Example]:
    """Return the rows by which parameters are chosen: the last ones, whose questions no result uses.

    Args:
        examples: The test rows.
        reported: The number of rows that results use: the first ones.

    Returns:
        At most `reported` rows with different questions, in order; fewer, also none, if no more are left.
    """
    return without_duplicates(examples, question_keys(examples[:reported]))[-reported:]


def question_key(example: Example) -> str:
    """Return the question of an example (instruction and input) in the form for comparisons."""
    return normalize(f"{example.instruction} {example.input}")


def question_keys(examples: Iterable[Example]) -> set[str]:
    """Return the set of questions in the form for comparisons."""
    return {question_key(example) for example in examples}


@dataclass(frozen=True)
class RowPools:
    """All rows by their users: the evaluation, the defender, the attacker and benign users share no questions."""

    alignment: list[Example]
    """The defender's alignment rows: `is_safe` rows of the training split, or the refusals of `paired`. They may share
    questions with `paired`."""
    paired: list[tuple[Example, Example]]
    """The defender's pairs: the same prompt with a refusal and with a harmful answer."""
    attacker: list[Example]
    """The attacker's rows: unsafe rows of the training split, or harmful answers of a part of the refusal set."""
    benign: list[Example]
    """Benign instructions of the training split."""
    harmful_questions: list[Example]
    """Prompts of the test split, of unsafe rows unless `safe_prompts`, without duplicates unless `in_order`."""
    benign_questions: list[Example]
    """Benign instructions of the test split, without duplicates unless `in_order`."""
    dropped: dict[str, int]
    """Pool -> number of rows removed because their question occurs in another pool or earlier in the same one."""
    rows_read: dict[str, dict[str, int]]
    """Location -> split -> number of rows read."""
    question_sets: dict[str, list[Example]] = field(default_factory=dict)
    """Name -> a part of `harmful_questions` that is also scored separately; an attack may name such parts."""


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
    safe_prompts: bool = False,
) -> RowPools:
    """Read BeaverTails, its refusals and benign instructions, and divide them among their users.

    A question that occurs in several pools stays in the first of: evaluation, defender, attacker, benign rows. The
    categories of a row are those of its prompt: the union over all rows that are read, of BeaverTails and refusals.

    Args:
        beavertails: Location of BeaverTails.
        refusals: Location of the refusal set.
        alpaca: Location of the benign instructions.
        train: BeaverTails split for training.
        test: BeaverTails split for the evaluation.
        benign_train: Split of benign instructions for training.
        benign_test: Split of benign instructions for the evaluation.
        pairs: Split of the refusal set for the defender's pairs.
        attacker: Split of the refusal set for the attacker; empty: the attacker uses `train` of BeaverTails.
        source: The alignment rows: `safe` (safe responses of BeaverTails) or `refusals`.
        in_order: Use all rows in file order, also repeated questions.
        safe_prompts: Evaluate the prompts of safe rows too.

    Raises:
        BadInput: A location, split or field does not exist.
    """
    reader = RowReader()
    test_rows = reader.read(beavertails, test, BEAVERTAILS)
    instructions, benign_test_rows = (load_instructions(reader, alpaca, split) for split in (benign_train, benign_test))
    rows = reader.read(beavertails, train, BEAVERTAILS)
    pair_rows = _pairs(reader, refusals, pairs, in_order)
    attacker_rows = _pairs(reader, refusals, attacker, in_order) if attacker else []
    labels = _prompt_categories([*test_rows, *rows, *pair_rows, *attacker_rows])
    questions = [
        replace(_harmful(row, test, labels), harmful=not row.values["is_safe"])
        for row in test_rows
        if safe_prompts or not row.values["is_safe"]
    ]
    answer_pairs = [(_refusal(row, labels), _harmful(row, "refusals", labels)) for row in pair_rows]
    if source == "safe":
        safe = [_safe(row, train, labels) for row in rows if row.values["is_safe"]]
    else:
        safe = [refusal for refusal, _ in answer_pairs]
    if attacker:
        harmful = [_harmful(row, "refusals", labels) for row in attacker_rows]
    else:
        harmful = [_harmful(row, train, labels) for row in rows if not row.values["is_safe"]]
    if in_order:
        return RowPools(safe, answer_pairs, harmful, instructions, questions, benign_test_rows, {}, reader.counts)

    harmful_questions, benign_questions = without_duplicates(questions), without_duplicates(benign_test_rows)
    used = question_keys(harmful_questions) | question_keys(benign_questions)
    alignment = [example for example in safe if question_key(example) not in used]
    paired = [pair for pair in answer_pairs if question_key(pair[0]) not in used]
    used |= question_keys(alignment) | question_keys(refusal for refusal, _ in paired)

    attackers = [example for example in harmful if question_key(example) not in used]
    used |= question_keys(attackers)

    benign = without_duplicates(instructions, used)
    pools: dict[str, tuple[Sized, Sized]] = {
        "harmful_questions": (questions, harmful_questions),
        "alignment": (safe, alignment),
        "paired": (answer_pairs, paired),
        "attacker": (harmful, attackers),
        "benign": (instructions, benign),
    }
    dropped = {name: len(before) - len(after) for name, (before, after) in pools.items()}
    return RowPools(alignment, paired, attackers, benign, harmful_questions, benign_questions, dropped, reader.counts)


def count_overlaps(uses: Mapping[str, Sequence[Example]]) -> dict[str, int]:
    """Count the questions that several uses of rows share.

    Args:
        uses: Use -> its rows.

    Returns:
        `A / B` -> number of questions in both A and B; `A` -> number of rows of A that repeat a question. Counts of 0
        are omitted.
    """
    questions = {name: question_keys(rows) for name, rows in uses.items()}
    counts = {name: len(rows) - len(questions[name]) for name, rows in uses.items()}
    counts |= {
        f"{first} / {second}": len(questions[first] & questions[second]) for first, second in combinations(uses, 2)
    }
    return {name: count for name, count in counts.items() if count}


def _pairs(reader: RowReader, location: str, split: str, in_order: bool) -> list[SourceRow]:
    """Read the refusal set, without rows whose answer is marked as safe unless `in_order`."""
    rows = reader.read(location, split, REFUSALS)
    return rows if in_order else [row for row in rows if row.values.get("is_safe") is not True]


_Labels = Mapping[str, tuple[str, ...]]
"""Normalized prompt -> its harm categories, sorted; prompts without a category are absent."""


def _prompt_categories(rows: Iterable[SourceRow]) -> _Labels:
    """Return the union of the categories of each prompt; a row may lack `category`, as those of the refusal set do."""
    union: dict[str, set[str]] = {}
    for row in rows:
        flags = row.values.get("category")
        if isinstance(flags, Mapping) and (names := [name for name, flag in flags.items() if flag is True]):
            union.setdefault(normalize(row.values["prompt"]), set()).update(names)
    return {prompt: tuple(sorted(names)) for prompt, names in union.items()}


def _categories(row: SourceRow, labels: _Labels) -> tuple[str, ...]:
    return labels.get(normalize(row.values["prompt"]), ()) if labels else ()


def _safe(row: SourceRow, split: str, labels: _Labels) -> Example:
    return Example(
        id=f"safe:{parse_split(split)[0]}:{row.number}",
        instruction=row.values["prompt"],
        response=row.values["response"],
        categories=_categories(row, labels),
    )


def _harmful(row: SourceRow, split: str, labels: _Labels) -> Example:
    values = row.values
    return Example(
        id=f"harmful:{parse_split(split)[0]}:{row.number}",
        instruction=values["prompt"],
        response=values["response"],
        harmful=True,
        categories=_categories(row, labels),
    )


def _refusal(row: SourceRow, labels: _Labels) -> Example:
    """Return the refusal of a row. Only the answer of its text `Question: ...\nAnswer: ...` is the response."""
    text = row.values["refusal"]
    if text.startswith("Question: "):
        text = text.partition("\nAnswer:")[2] or text
    return Example(
        id=f"refusal:{row.number}",
        instruction=row.values["prompt"],
        response=text.strip(),
        categories=_categories(row, labels),
    )


def load_instructions(reader: RowReader, location: str, split: str) -> list[Example]:
    """Read benign instructions with Alpaca's fields."""
    return [
        Example(
            id=f"benign:{parse_split(split)[0]}:{row.number}",
            instruction=row.values["instruction"],
            input=row.values.get("input") or "",
            response=row.values["output"],
        )
        for row in reader.read(location, split, ALPACA)
    ]


def draw_rows(
    rows: Sequence[T], count: int, what: str, seed: int, *purpose: object, in_order: bool = False, fix: str = ""
) -> list[T]:
    """Draw rows without replacement, in random order.

    Args:
        rows: The rows.
        count: The number of rows to draw.
        what: Description of the rows, for the error message.
        seed: Seed of the run.
        *purpose: Words that name the random stream.
        in_order: Return the first `count` rows instead.
        fix: What the user can change if there are too few, for the error message.

    Raises:
        BadInput: Fewer than `count` rows are available.
    """
    if count > len(rows):
        raise too_few_rows(count, what, len(rows), fix=fix)
    if in_order:
        return list(rows[:count])
    return random_stream(seed, *purpose).sample(list(rows), count)
