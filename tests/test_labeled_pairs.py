"""Labeled questions and answers: read strictly, held out by question, drawn evenly."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.beavertails import CATEGORIES
from harmbench_vaccine.data.labeled_pairs import (
    LabeledPair,
    draw_pairs,
    hold_out,
    read_labeled_pairs,
    without_questions,
)


def row(question: str, *categories: str, **changes: Any) -> dict[str, Any]:
    flags = {name: name in categories for name in CATEGORIES}
    return {"prompt": question, "response": "Yes.", "category": flags, "is_safe": not categories, **changes}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows), encoding="utf-8")
    return str(path)


def pairs(safe: int, unsafe: int, answers: int = 1) -> list[LabeledPair]:
    """Return pairs with `answers` answers to each question."""
    kinds = [frozenset[str]()] * safe + [frozenset({CATEGORIES[0]})] * unsafe
    return [
        LabeledPair(f"{'unsafe' if kind else 'safe'} {number}", f"answer {answer}", kind)
        for number, kind in enumerate(kinds)
        for answer in range(answers)
    ]


def counts(drawn: list[LabeledPair]) -> tuple[int, int]:
    """Return the numbers of safe and of unsafe pairs."""
    kinds = Counter(pair.unsafe for pair in drawn)
    return kinds[False], kinds[True]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_categories_are_those_that_the_row_flags(tmp_path: Path) -> None:
    some = row("c", category={CATEGORIES[2]: True, CATEGORIES[5]: None}, is_safe=False)
    location = write(tmp_path, row("a"), row("b", CATEGORIES[0], CATEGORIES[13]), some, row("d", category={}))
    rows = read_labeled_pairs(location, "30k_train")
    flagged = [set(pair.categories) for pair in rows.pairs]
    assert flagged == [set(), {CATEGORIES[0], CATEGORIES[13]}, {CATEGORIES[2]}, set()]
    assert [pair.unsafe for pair in rows.pairs] == [False, True, True, False]
    assert rows.contradictory == 0


def test_contradictory_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    location = write(tmp_path, row("a", is_safe=False), row("b", CATEGORIES[0], is_safe=True), row("c"))
    rows = read_labeled_pairs(location, "x")
    assert ([pair.question for pair in rows.pairs], rows.contradictory) == (["c"], 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category": None}, "line 1: field 'category' has no value"),
        ({"category": [CATEGORIES[0]]}, "field 'category' holds ['animal_abuse']; allowed: an object"),
        ({"category": {"animal_abus": True}}, "Unknown category 'animal_abus'"),
        ({"category": {CATEGORIES[0]: "yes"}}, "category 'animal_abuse' holds 'yes'; allowed: true, false"),
        ({"is_safe": "maybe"}, "field 'is_safe' holds 'maybe'"),
        ({"response": 3}, "field 'response' holds 3"),
    ],
)
def test_bad_rows_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refusal:
        read_labeled_pairs(write(tmp_path, row("a", **changes)), "x")
    assert message in str(refusal.value)


def test_the_nearest_category_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Did you mean 'animal_abuse'"):
        read_labeled_pairs(write(tmp_path, row("a", category={"animal_abus": True})), "x")


# ---------------------------------------------------------------------------------------------------------------------
# Selection


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_question_is_on_both_sides(share: float, seed: int) -> None:
    rows = pairs(40, 10, answers=3)
    mixed = [LabeledPair(f"  {rows[0].question.upper()}", "another spelling", frozenset({CATEGORIES[0]}))]
    training, held_out = hold_out([*rows, *mixed], share, seed)
    assert len(training) + len(held_out) == len(rows) + 1
    sides = [{" ".join(pair.question.lower().split()) for pair in side} for side in (training, held_out)]
    assert not sides[0] & sides[1]
    assert min(*counts(training), *counts(held_out)) >= 1
    assert len(sides[1]) == sum(max(1, round(share * kind)) for kind in (39, 11))  # one question has both answers


def test_the_seed_decides_what_is_held_out() -> None:
    rows = pairs(40, 10)
    assert hold_out(rows, 0.2, 0) == hold_out(rows, 0.2, 0) != hold_out(rows, 0.2, 1)


def test_questions_of_another_split_are_removed() -> None:
    rows = pairs(3, 0)
    others = [LabeledPair("SAFE   1", "another answer", frozenset())]
    assert without_questions(rows, others) == [rows[0], rows[2]]


@pytest.mark.parametrize(
    ("safe", "unsafe", "balance", "count", "expected"),
    [
        (30, 10, 1.0, None, (10, 10)),
        (30, 10, 2.0, None, (20, 10)),
        (30, 10, 4.0, None, (30, 10)),
        (30, 10, math.inf, None, (30, 10)),
        (10, 30, 1.0, None, (10, 10)),
        (10, 30, 1.5, None, (10, 15)),
        (30, 10, 1.0, 8, (4, 4)),
        (30, 10, 2.0, 9, (6, 3)),
        (30, 10, math.inf, 4, (3, 1)),
        (1000, 1, math.inf, 10, (9, 1)),
        (1, 1000, math.inf, 10, (1, 9)),
    ],
)
def test_rows_are_drawn_evenly(
    safe: int, unsafe: int, balance: float, count: int | None, expected: tuple[int, int]
) -> None:
    rows = pairs(safe, unsafe)
    drawn = draw_pairs(rows, balance, count, seed=3)
    assert counts(drawn) == expected
    assert drawn == [pair for pair in rows if pair in drawn]  # in order, and none twice
    assert draw_pairs(rows, balance, count, seed=3) == drawn


def test_the_seed_decides_what_is_drawn() -> None:
    rows = pairs(30, 10)
    assert draw_pairs(rows, 1.0, None, 0) != draw_pairs(rows, 1.0, None, 1)


@pytest.mark.parametrize(("safe", "unsafe", "kind"), [(3, 0, "unsafe"), (0, 3, "safe")])
def test_both_kinds_are_needed(safe: int, unsafe: int, kind: str) -> None:
    with pytest.raises(BadInput, match=f"have no {kind} answer"):
        draw_pairs(pairs(safe, unsafe), 1.0, None, 0)


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="Requested 21 training rows, but only 20 are available"):
        draw_pairs(pairs(30, 10), 1.0, 21, 0)
