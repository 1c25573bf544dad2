"""Errors that the command line prints on one line, with their exit codes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MOST_NAMES, NEAREST_NAMES = 60, 12
"""The largest number of names that an error lists in full, and the number of names that it lists otherwise."""


class HbvError(Exception):
    """A failure while running (disk, engine, network), described on one line. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # it may quote a name or a library with several lines


class BadInput(HbvError):
    """Invalid user input, described on one line with the allowed values. Exit code 2."""

    exit_code = 2


def shortened(text: object, length: int = 60) -> str:
    """Return a text for a message, with `...` for what follows after `length` characters."""
    text = str(text)
    return text if len(text) <= length else f"{text[:length]}..."


_HASH = re.compile(r"-[0-9a-f]{8}$")


def unknown_name(kind: str, name: str, allowed: Iterable[str], of: str = "", other_kind: str = "") -> BadInput:
    """Return the error for an unknown name, with the nearest valid name and all valid names.

    Args:
        kind: The kind of thing that the name should refer to.
        name: The unknown name.
        allowed: All valid names.
        of: The object that has the names, such as "defense 'vaccine'".
        other_kind: The kind of thing that has this name, if another kind has it, such as "attack".
    """
    names = sorted(allowed)
    name = shortened(name)
    known = {_HASH.sub("", full): full for full in names} | {full: full for full in names}  # also runs without a hash
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if other_kind else 0.5)
    guess = f" Did you mean {known[close[0]]!r}?" if close else ""
    problem = f"Unknown {kind} {name!r}{of and f' of {of}'}."
    if other_kind:
        problem = f"{name!r} is {_with_article(other_kind)}, not {_with_article(kind)}."
    return BadInput(f"{problem}{guess} Allowed: {allowed_names(name, names)}.")


def allowed_names(name: str, names: list[str]) -> str:
    """Return the names for an error message: all, or of many only the nearest to `name` and the number of others."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names) or "none"
    nearest = difflib.get_close_matches(name, names, n=NEAREST_NAMES, cutoff=0)
    return f"{', '.join(sorted(nearest))}, and {len(names) - len(nearest)} more"


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def too_few_rows(count: int, what: str, available: int, by: str = "", fix: str = "") -> BadInput:
    """Return the error for a request of more rows than are available.

    Args:
        count: The requested number of rows.
        what: Description of the rows, such as "task rows".
        available: The available number of rows.
        by: The plug-in that requests the rows.
        fix: What the user can change, such as "lower align.rows".
    """
    request = f"{by!r} requested" if by else "Requested"
    return BadInput(f"{request} {count} {what}, but only {available} are available{f': {fix}' if fix else ''}.")
