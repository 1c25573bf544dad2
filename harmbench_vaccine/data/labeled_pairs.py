"""Questions and answers with the harm categories of BeaverTails: rows that a judge learns from and is tested on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harmbench_vaccine.core.errors import BadInput, shortened, too_few_rows, unknown_name
from harmbench_vaccine.core.seeds import random_stream

from .beavertails import CATEGORIES
from .pools import normalize
from .sources import SourceRow, read_rows

FIELDS = ("prompt", "response", "category", "is_safe")
"""The fields of a row."""


@dataclass(frozen=True)
class LabeledPair:
    """A question and an answer with the harm categories of the answer."""

    question: str
    answer: str
    categories: frozenset[str]
    """The categories of `CATEGORIES` that apply; none for a safe answer."""

    @property
    def unsafe(self) -> bool:
        """True if any category applies."""
        return bool(self.categories)


@dataclass(frozen=True)
class LabeledRows:
    """The labeled pairs of a split."""

    pairs: list[LabeledPair]
    contradictory: int
    """Number of rows that were left out: `is_safe` and the categories contradict each other."""


def read_labeled_pairs(location: str, split: str) -> LabeledRows:
    """Read the pairs of a split with the fields of BeaverTails, in order.

    A category that a row does not name does not apply to it.

    Args:
        location: A folder, a file, a part of the testbed or a name of the Hub.
        split: A split, or a slice of it.

    Raises:
        BadInput: The split or a field does not exist, or a category is unknown or not true or false.
    """
    rows = [(_labeled_pair(row), row.values["is_safe"]) for row in read_rows(location, split, FIELDS)]
    pairs = [pair for pair, is_safe in rows if pair.unsafe != is_safe]
    return LabeledRows(pairs, len(rows) - len(pairs))


def _labeled_pair(row: SourceRow) -> LabeledPair:
    flags = row.values["category"]
    if not isinstance(flags, Mapping):
        raise BadInput(f"{row.place}: field 'category' holds {_shown(flags)}; allowed: an object of category -> true.")
    for name, flag in flags.items():
        if name not in CATEGORIES:
            raise unknown_name("category", str(name), CATEGORIES, of=row.place)
        if not isinstance(flag, bool | None):  # parquet has null for a field that a row lacks
            raise BadInput(f"{row.place}: category {name!r} holds {_shown(flag)}; allowed: true, false.")
    categories = frozenset(name for name, flag in flags.items() if flag)
    return LabeledPair(row.values["prompt"], row.values["response"], categories)


def _shown(value: Any) -> str:
    return shortened(repr(value))


# ---------------------------------------------------------------------------------------------------------------------
# Selection


def hold_out(pairs: Sequence[LabeledPair], share: float, seed: int) -> tuple[list[LabeledPair], list[LabeledPair]]:
    """Divide pairs by question: all pairs of a question are on one side.

    The share holds for the questions with an unsafe answer and for all others separately, so that both sides have
    both kinds.

    Args:
        pairs: The pairs.
        share: Share of the questions that are held out; at least one question of each kind.
        seed: Seed of the draw.

    Returns:
        The pairs for training, and those that are held out, both in their order.
    """
    unsafe = _questions(pair for pair in pairs if pair.unsafe)
    others = _questions(pairs) - unsafe
    held_out: set[str] = set()
    for purpose, questions in (("unsafe", unsafe), ("safe", others)):
        count = max(1, round(share * len(questions))) if questions else 0
        held_out |= {*random_stream(seed, "held out", purpose).sample(sorted(questions), count)}
    training = [pair for pair in pairs if normalize(pair.question) not in held_out]
    return training, [pair for pair in pairs if normalize(pair.question) in held_out]


def without_questions(pairs: Sequence[LabeledPair], others: Iterable[LabeledPair]) -> list[LabeledPair]:
    """Return the pairs whose question is not a question of `others`, in their order."""
    questions = _questions(others)
    return [pair for pair in pairs if normalize(pair.question) not in questions]


def draw_pairs(pairs: Sequence[LabeledPair], balance: float, count: int | None, seed: int) -> list[LabeledPair]:
    """Draw pairs without replacement, so that neither safe nor unsafe ones are far more numerous.

    Args:
        pairs: The pairs.
        balance: Largest ratio of the more frequent kind to the other one; pairs of it are drawn down to this ratio.
        count: Number of pairs to draw of those, with the shares of both kinds; None: all of them.
        seed: Seed of the draw.

    Returns:
        The pairs in their order.

    Raises:
        BadInput: There are no safe or no unsafe pairs, or fewer than `count` pairs.
    """
    kinds = {kind: [number for number, pair in enumerate(pairs) if pair.unsafe == kind] for kind in (False, True)}
    for kind, numbers in kinds.items():
        if not numbers:
            raise BadInput(
                f"The training rows have no {'unsafe' if kind else 'safe'} answer; a judge needs both kinds: choose "
                "another split or data set."
            )
    most = balance * min(map(len, kinds.values()))
    sizes = {kind: int(min(len(numbers), most)) for kind, numbers in kinds.items()}
    available = sum(sizes.values())
    if count is not None:
        if count > available:
            raise too_few_rows(count, "training rows", available, fix="lower --rows, or raise --balance")
        sizes[True] = min(max(1, round(count * sizes[True] / available)), count - 1)
        sizes[False] = count - sizes[True]
    drawn = [
        number
        for kind, numbers in kinds.items()
        for number in random_stream(seed, "training rows", kind).sample(numbers, sizes[kind])
    ]
    return [pairs[number] for number in sorted(drawn)]


def _questions(pairs: Iterable[LabeledPair]) -> set[str]:
    return {normalize(pair.question) for pair in pairs}
