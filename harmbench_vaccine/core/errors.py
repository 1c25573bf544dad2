"""What the command line says when something is wrong, and the exit code that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HbvError(Exception):
    """A failure while running (disk, engine, network), told in one sentence. Exit code 1."""

    exit_code = 1


class BadInput(HbvError):
    """What the user wrote cannot be run, told in one sentence with what is allowed. Exit code 2."""

    exit_code = 2


def unknown_name(kind: str, name: str, allowed: Iterable[str], of: str = "") -> BadInput:
    """The refusal of a name: what it was (`of` what), the nearest valid one, and every valid one."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return BadInput(f"Unknown {kind} {name!r}{of and f' of {of}'}.{guess} Allowed: {', '.join(names) or 'none'}.")


def too_few_rows(count: int, what: str, there: int, by: str = "") -> BadInput:
    """The refusal to take more rows than there are; `by` is the plug-in that asks."""
    return BadInput(
        f"{count} {what} are asked for{by and f' by {by!r}'}; allowed: at most {there}, as many as there are."
    )
