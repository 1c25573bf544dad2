"""The option `--scorer` of commands that judge answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .completion import plugin_names


def scorer_option(help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator that adds the repeatable `--scorer` as the argument `scorers`."""
    return click.option(
        "--scorer",
        "scorers",
        shell_complete=plugin_names("scorers"),
        multiple=True,
        metavar="SPEC",
        help=help_text,
    )
