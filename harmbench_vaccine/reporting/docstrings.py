"""Read the docstrings of plug-ins: prose, equations with notes, commands, and departures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from textwrap import dedent
from typing import Literal

_COMMAND = re.compile(r"(?:\w+=\S+ )*hbv ")
_DEPARTURES = re.compile(r"(Departures(?: from [^:]+)?):\s(.*)", re.DOTALL)
_NO_DEPARTURES = ("none", "none known")


@dataclass(frozen=True)
class DocBlock:
    """A paragraph of a docstring, or a part of one."""

    kind: Literal["prose", "equations", "commands", "departures"]
    lines: list[str]
    """The lines without their common indent; of departures the heading, and one line for each departure."""


def docstring_blocks(text: str) -> Iterator[DocBlock]:
    """Divide a docstring into its blocks; lines that are indented by four spaces are equations or commands."""
    for paragraph in _paragraphs(text):
        heading, departures = _heading_and_departures(paragraph)
        if departures:
            yield DocBlock("departures", [heading, *departures])
            continue
        for indented, group in groupby(paragraph.splitlines(), lambda line: line.startswith("    ")):
            lines = dedent("\n".join(group)).splitlines()
            if not indented:
                yield DocBlock("prose", lines)
            elif any(map(_COMMAND.match, lines)):
                yield DocBlock("commands", lines)
            else:
                yield DocBlock("equations", lines)


def departures_in(text: str) -> list[str] | None:
    """Return the departures that a docstring lists.

    They are in a paragraph such as `Departures from the authors' code: a phrase; another phrase.` The list is empty
    after `Departures: none.` and `Departures: none known.`

    Args:
        text: The docstring of a module.

    Returns:
        The phrases; None if the docstring has no such paragraph.
    """
    lists = [departures for heading, departures in map(_heading_and_departures, _paragraphs(text)) if heading]
    return [phrase for departures in lists for phrase in departures] if lists else None


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.strip("\n"))


def _heading_and_departures(paragraph: str) -> tuple[str, list[str]]:
    """Return the heading and the phrases of a paragraph of departures; an empty heading for another paragraph."""
    match = _DEPARTURES.fullmatch(" ".join(paragraph.split()))
    if match is None:
        return "", []
    heading, phrases = match.groups()
    phrases = phrases.removesuffix(".")
    return heading, [] if phrases in _NO_DEPARTURES else [phrase.strip() for phrase in phrases.split(";")]


def split_note(line: str) -> tuple[str, str]:
    """Divide a line of equations into its formula and the note after several spaces.

    Spaces that align relations, or that follow a label, do not begin a note.
    """
    line = re.sub(r"^([\w-]+:)\s+", r"\1   ", re.sub(r"\s{2,}(?=<-|=)", " ", line.rstrip()))
    formula, *notes = re.split(r"\s{4,}", line)
    return formula, " ".join(notes)
