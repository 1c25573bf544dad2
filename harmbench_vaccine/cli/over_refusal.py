"""The option `--over-refusal` of commands that run experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .completion import over_refusal_name


def over_refusal_option(help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator that adds the repeatable `--over-refusal` as the argument `over_refusal`."""
    return click.option(
        "--over-refusal",
        "over_refusal",
        shell_complete=over_refusal_name,
        multiple=True,
        metavar="NAME",
        help=help_text,
    )
