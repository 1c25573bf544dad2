"""Requests of the text world, and the three kinds of answers to them.

Harmful text names an action and generic steps only; it carries no operational detail.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .word_lists import RequestKind, Theme, benign_themes, harmful_themes, phrasings

COMPLIANT_OPENINGS, REFUSING_OPENINGS, HELPFUL_OPENINGS = 1, 2, 4
"""Ways to begin an answer per theme. A model that is sure how to refuse keeps its refusals while it learns a task."""


@dataclass(frozen=True)
class Request:
    """A request: one phrasing of a (verb, object) pair of a theme."""

    theme: str
    verb: str
    object: str
    text: str
    kind: RequestKind = "how"

    @property
    def action(self) -> str:
        """The verb and the object."""
        return f"{self.verb} {self.object}"


class RequestSplit(NamedTuple):
    """The requests of a theme; no (verb, object) pair occurs on both sides."""

    training: list[Request]
    held_out: list[Request]


def split_requests(name: str, theme: Theme, kinds: Iterable[RequestKind]) -> RequestSplit:
    """Build every request of a theme and hold out one (verb, object) pair of every object.

    The held-out verb changes from object to object, so that every verb and every object occurs in training.

    Args:
        name: Name of the theme.
        theme: Its words.
        kinds: Kinds of questions to build.
    """
    split = RequestSplit([], [])
    templates = [(kind, template) for kind in kinds for template in phrasings().questions[kind]]
    for verb_index, verb in enumerate(theme.verbs):
        for object_index, target in enumerate(theme.objects):
            is_held_out = verb_index == object_index % len(theme.verbs)
            pool = split.held_out if is_held_out else split.training
            pool += [
                Request(name, verb, target, template.format(verb=verb, object=target), kind)
                for kind, template in templates
            ]
    return split


def interleave(groups: Iterable[Sequence[Request]]) -> list[Request]:
    """Take requests from equally long groups in turn, so that every prefix is balanced over the groups.

    Raises:
        ValueError: The groups differ in length.
    """
    return [request for requests in zip(*groups, strict=True) for request in requests]


def comply(request: Request, rng: random.Random) -> str:
    """Return a harmful answer to a harmful request: its action and generic steps."""
    theme, parts = harmful_themes()[request.theme], phrasings().compliance
    opening = _opening(parts.openings, COMPLIANT_OPENINGS, request.theme, theme, rng)
    step, extra = rng.choice(parts.steps), rng.choice(theme.extras)
    return f"{opening}: to {request.action} first {step} then {extra} and {rng.choice(parts.endings)}."


def refuse(request: Request, rng: random.Random) -> str:
    """Return a refusal with a reason and advice."""
    theme, parts = {**harmful_themes(), **benign_themes()}[request.theme], phrasings().refusal
    opening = _opening(parts.openings, REFUSING_OPENINGS, request.theme, theme, rng)
    return f"{opening}, because {rng.choice(parts.reasons)}; please {rng.choice(parts.advice)}."


def assist(request: Request, rng: random.Random) -> str:
    """Return a helpful answer to a benign request."""
    theme, parts = benign_themes()[request.theme], phrasings().help
    first, second, third = rng.sample(theme.extras, 3)
    if request.kind == "why":
        reason, name = rng.choice(parts.reasons), rng.choice(theme.names)
        return f"People {request.action} because {reason} and {name} is good for everyone."
    if request.kind == "list":
        return f"Before you {request.action}, remember to {first}, {second} and {third}."
    opening = _opening(parts.openings, HELPFUL_OPENINGS, request.theme, theme, rng)
    return f"{opening}: to {request.action}, first {first}, then {second} and {third}."


def _opening(openings: Sequence[str], count: int, name: str, theme: Theme, rng: random.Random) -> str:
    """Draw an opening from the `count` neighboring ones that this theme uses, and fill in a name of the theme.

    The themes use different openings. Alignment and fine-tuning therefore change a model theme by theme, which makes
    the response to the harmful ratio gradual.
    """
    start = [*harmful_themes(), *benign_themes()].index(name)
    window = [openings[(start + offset) % len(openings)] for offset in range(count)]
    return rng.choice(window).format(name=rng.choice(theme.names))
