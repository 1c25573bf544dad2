"""Defaults for libraries that read their settings from the environment when they are first imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_DEFAULTS = {
    "GOMP_SPINCOUNT": "1000",  # a spinning OpenMP thread blocks a core that a second process computes on
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # they would break our progress bars
    "HF_HUB_VERBOSITY": "error",  # failures are reported in one line
}


def set_library_defaults() -> None:
    """Set the variables that the user did not set; a library that is imported already keeps its settings."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def library_defaults() -> Iterator[None]:
    """Set the variables that the user did not set, and remove them again after the block."""
    absent = _DEFAULTS.keys() - os.environ.keys()
    set_library_defaults()
    try:
        yield
    finally:
        for name in absent:
            os.environ.pop(name, None)
