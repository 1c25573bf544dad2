"""The option `--device` of commands that load models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from harmbench_vaccine.core.device import select_device


def device_option(default: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator that adds `--device`, which takes effect when the command line is parsed.

    Args:
        default: The device without the option; None: `HBV_DEVICE`, or else a GPU if one is available.
    """
    return click.option(
        "--device",
        metavar="NAME",
        default=default,
        expose_value=False,
        callback=lambda context, parameter, name: select_device(name) if name is not None else None,
        help=f"Where models run: cpu, cuda, cuda:1. [default: {default or '$HBV_DEVICE, or a GPU if available'}]",
    )
