"""Read the docstrings of plug-ins: prose, equations with notes, and commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from textwrap import dedent
from typing import Literal

_COMMAND = re.compile(r"(?:\w+=\S+ )*hbv ")


@dataclass(frozen=True)
class DocBlock:
    """A paragraph of a docstring, or a part of one."""

    kind: Literal["prose", "equations", "commands"]
    lines: list[str]
    """The lines without their common indent."""


def docstring_blocks(text: str) -> Iterator[DocBlock]:
    """Divide a docstring into its blocks; lines that are indented by four spaces are equations or commands."""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        for indented, group in groupby(paragraph.splitlines(), lambda line: line.startswith("    ")):
            lines = dedent("\n".join(group)).splitlines()
            if not indented:
                yield DocBlock("prose", lines)
            elif any(map(_COMMAND.match, lines)):
                yield DocBlock("commands", lines)
            else:
                yield DocBlock("equations", lines)


def split_note(line: str) -> tuple[str, str]:
    """Divide a line of equations into its formula and the note after several spaces.

    Spaces that align relations, or that follow a label, do not begin a note.
    """
    line = re.sub(r"^([\w-]+:)\s+", r"\1   ", re.sub(r"\s{2,}(?=<-|=)", " ", line.rstrip()))
    formula, *notes = re.split(r"\s{4,}", line)
    return formula, " ".join(notes)
