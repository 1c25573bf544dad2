"""Checks of the arguments of the Python interface, which report a wrong value in one sentence."""

from __future__ import annotations

from pathlib import Path

from .errors import BadInput, shortened
from .paths import user_path


def checked_share(name: str, value: float, least: float) -> float:
    """Return a share.

    Raises:
        BadInput: It is not a number from `least` to 1.
    """
    if isinstance(value, bool) or not (isinstance(value, int | float) and least <= value <= 1):
        raise BadInput(f"Argument {name} is {shortened(repr(value))}; allowed: a number from {least} to 1.")
    return value


def checked_count(name: str, value: int) -> int:
    """Return a number of things.

    Raises:
        BadInput: It is not a whole number from 1.
    """
    if isinstance(value, bool) or not (isinstance(value, int) and value > 0):
        raise BadInput(f"Argument {name} is {shortened(repr(value))}; allowed: a whole number from 1, or None.")
    return value


def checked_path(name: str, path: str | Path | None) -> Path | None:
    """Return a path with the home folder for `~`, or None.

    Raises:
        BadInput: It is neither a path nor None.
    """
    if not isinstance(path, str | Path | None):
        raise BadInput(f"Argument {name} is {shortened(repr(path))}; allowed: a path.")
    return None if path is None else user_path(path)


def checked_flag(name: str, value: bool) -> bool:
    """Return a truth value.

    Raises:
        BadInput: It is something else.
    """
    if not isinstance(value, bool):
        raise BadInput(f"Argument {name} is {shortened(repr(value))}; allowed: True, False.")
    return value
