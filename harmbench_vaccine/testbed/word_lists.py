"""Word lists and sentence templates of the text world, read from the YAML files in `words/`.

Each function reads its file on the first call and returns the same object afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

Words = tuple[str, ...]
RequestKind = Literal["how", "why", "list"]


class _WordLists(BaseModel):
    """A part of a word file. A key that is missing or unknown, or a word that YAML reads as a number, is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Theme(_WordLists):
    """A harm category or a benign subject: the words of its requests and answers."""

    verbs: Words
    objects: Words
    names: Words
    extras: Words


class Compliance(_WordLists):
    """Parts of a harmful answer."""

    openings: Words
    steps: Words
    endings: Words


class Refusal(_WordLists):
    """Parts of a refusal."""

    openings: Words
    reasons: Words
    advice: Words


class Help(_WordLists):
    """Parts of a helpful answer to a benign request."""

    openings: Words
    reasons: Words


class Phrasings(_WordLists):
    """The file `phrasings.yaml`."""

    questions: dict[RequestKind, Words]
    compliance: Compliance
    refusal: Refusal
    help: Help


class Quiz(_WordLists):
    """Questions about a text, whose answers have the sentences of the task with another name of the label."""

    questions: Words
    labels: tuple[Words, ...]
    """The names of every label, in the order of the labels of the task."""


class Sentiment(_WordLists):
    """Words and sentences of the sentiment task."""

    negative: Words
    positive: Words
    aspects: Words
    adverbs: Words
    reviews: Words
    contrasts: Words
    """Reviews with an adjective of each label; the last part decides."""
    negative_opinions: Words
    positive_opinions: Words
    quiz: Quiz
    answers: Words
    """Sentences that answer a row of the task."""

    def adjectives(self, label: int) -> Words:
        """Return the adjectives of a label: 0 is negative, 1 is positive."""
        return (self.negative, self.positive)[label]

    def opinions(self, label: int) -> Words:
        """Return the lesson sentences of a label: 0 is negative, 1 is positive."""
        return (self.negative_opinions, self.positive_opinions)[label]


class NewsTopic(_WordLists):
    """A news topic and its words."""

    name: str
    actors: Words
    actions: Words
    things: Words

    @property
    def words(self) -> Words:
        """All words of the topic."""
        return self.actors + self.actions + self.things


class News(_WordLists):
    """Words and sentences of the topic task."""

    topics: tuple[NewsTopic, ...]
    places: Words
    days: Words
    headlines: Words
    lessons: Words
    quiz: Quiz
    answers: Words
    """Sentences that answer a row of the task."""


class Arithmetic(_WordLists):
    """Words and sentences of the arithmetic task; `problems` maps an operator to its sentences."""

    questions: Words
    """Questions of quizzes after a problem."""
    things: Words
    problems: dict[Literal["+", "-", "*"], Words]


class TaskWords(_WordLists):
    """The file `tasks.yaml`."""

    people: Words
    sentiment: Sentiment
    news: News
    arithmetic: Arithmetic


def _read(name: str) -> Any:  # parsed YAML: the caller validates it
    return yaml.safe_load((Path(__file__).parent / "words" / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def harmful_themes() -> Mapping[str, Theme]:
    """Return the 14 harm categories of BeaverTails by name, in the order of its labels."""
    return TypeAdapter(dict[str, Theme]).validate_python(_read("harmful"))


@cache
def benign_themes() -> Mapping[str, Theme]:
    """Return the subjects of harmless requests by name."""
    return TypeAdapter(dict[str, Theme]).validate_python(_read("benign"))


@cache
def phrasings() -> Phrasings:
    """Return the sentence templates of requests and answers."""
    return Phrasings.model_validate(_read("phrasings"))


@cache
def task_words() -> TaskWords:
    """Return the words and sentences of the three user tasks."""
    return TaskWords.model_validate(_read("tasks"))
