"""Rows of the three user tasks, in the schemas of SST-2, AG News and GSM8K."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from .word_lists import task_words

DataRow = dict[str, Any]
"""A row of a JSON Lines file; its values are of any JSON type."""

TRAIN_ROWS, TEST_ROWS = 2500, 500
CONTRASTS = 0.35
"""Share of contrasts among the reviews."""
UNDECIDED = 0.1
"""Share of reviews and headlines with words of two labels. One of the two is drawn, so that no model reaches 97%."""


class TaskRows(NamedTuple):
    """The rows of a task, distinct by their text."""

    train: list[DataRow]
    test: list[DataRow]


class Calculation(NamedTuple):
    """A small calculation with its result."""

    x: int
    operator: Literal["+", "-", "*"]
    y: int
    result: int

    def __str__(self) -> str:
        return f"{self.x} {self.operator} {self.y} = {self.result}"


def build_tasks(rng: random.Random) -> dict[str, TaskRows]:
    """Draw the training and test rows of every task, by the name of its data set."""
    tasks = {
        "sst2": _distinct_rows(_review, "sentence", rng),
        "ag_news": _distinct_rows(_headline, "text", rng),
        "gsm8k": _distinct_rows(_word_problem, "question", rng),
    }
    reviews = tasks["sst2"]
    tasks["sst2"] = TaskRows(_numbered(reviews.train), _numbered(reviews.test))
    return tasks


def draw_calculation(rng: random.Random) -> Calculation:
    """Draw a calculation with operands of at most 7 and without a negative result."""
    operators: tuple[Literal["+", "-", "*"], ...] = ("+", "-", "*")
    operator = rng.choice(operators)
    if operator == "*":
        x, y = rng.randint(2, 4), rng.randint(2, 3)
        return Calculation(x, operator, y, x * y)
    x, y = rng.randint(2, 6), rng.randint(1, 3)
    if operator == "-":
        x, y = max(x, y) + 1, min(x, y)
        return Calculation(x, operator, y, x - y)
    return Calculation(x, operator, y, x + y)


def _distinct_rows(draw_row: Callable[[random.Random], DataRow], key: str, rng: random.Random) -> TaskRows:
    """Draw rows until enough of them differ in `key`, then split them into training and test rows."""
    rows: dict[str, DataRow] = {}
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        row = draw_row(rng)
        rows.setdefault(row[key], row)
    distinct = list(rows.values())
    return TaskRows(distinct[:TRAIN_ROWS], distinct[TRAIN_ROWS:])


def _numbered(rows: list[DataRow]) -> list[DataRow]:
    return [{"idx": index, **row} for index, row in enumerate(rows)]


def _review(rng: random.Random) -> DataRow:
    """Draw a review, a contrast or an undecided review; label 0 is negative, 1 is positive."""
    words = task_words().sentiment
    label = rng.randint(0, 1)
    first, second = rng.sample(words.adjectives(label), 2)
    opposite = rng.choice(words.adjectives(1 - label))
    aspect, second_aspect = rng.sample(words.aspects, 2)
    kind = rng.random()
    if CONTRASTS <= kind < CONTRASTS + UNDECIDED:
        first, second = rng.sample((first, opposite), 2)
    sentence = rng.choice(words.contrasts if kind < CONTRASTS else words.reviews).format(
        adjective=first,
        adjective2=second,
        opposite=opposite,
        aspect=aspect,
        aspect2=second_aspect,
        adverb=rng.choice(words.adverbs),
    )
    return {"sentence": sentence, "label": label}


def _headline(rng: random.Random) -> DataRow:
    """Draw a headline; the label is the index of its topic."""
    words = task_words().news
    label = rng.randrange(len(words.topics))
    topic = words.topics[label]
    first, second = rng.sample(topic.things, 2)
    if rng.random() < UNDECIDED:
        label = rng.choice((label, other := rng.randrange(len(words.topics))))
        first, second = rng.sample(words.topics[other].things, 2)
    text = rng.choice(words.headlines).format(
        place=rng.choice(words.places),
        day=rng.choice(words.days),
        actor=rng.choice(topic.actors),
        action=rng.choice(topic.actions),
        thing=first,
        thing2=second,
    )
    return {"text": text, "label": label}


def _word_problem(rng: random.Random) -> DataRow:
    """Draw a word problem with its calculation and, after `####`, its final answer."""
    words = task_words()
    calculation = draw_calculation(rng)
    thing = rng.choice(words.arithmetic.things)
    question = rng.choice(words.arithmetic.problems[calculation.operator]).format(
        person=rng.choice(words.people), x=calculation.x, y=calculation.y, thing=thing
    )
    return {"question": question, "answer": f"{calculation} {thing}.\n#### {calculation.result}"}
