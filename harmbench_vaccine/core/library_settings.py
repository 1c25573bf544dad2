"""Defaults for libraries that read their settings from the environment when they are first used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_DEFAULTS = {
    "GOMP_SPINCOUNT": "1000",  # a waiting thread blocks a core; with 10000, two processes at a time take 3 x as long
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # they would break our progress bars
    "HF_HUB_VERBOSITY": "error",  # failures are reported in one line
}
_SAME_BITS = "MKL_CBWR"
"""With a branch of MKL that is named, and "STRICT", matrix products have the same bits for any number of threads."""


def set_library_defaults() -> None:
    """Set the variables that the user did not set; a library that is in use already keeps its settings."""
    for name, value in _defaults().items():
        os.environ.setdefault(name, value)


@contextmanager
def library_defaults() -> Iterator[None]:
    """Set the variables that the user did not set, and remove them again after the block."""
    absent = _defaults().keys() - os.environ.keys()
    set_library_defaults()
    try:
        yield
    finally:
        for name in absent:
            os.environ.pop(name, None)


def _defaults() -> dict[str, str]:
    return {**_DEFAULTS, _SAME_BITS: f"{'AVX512' if _has_avx512() else 'AVX2'},STRICT"}


def _has_avx512() -> bool:
    """Return whether the CPU has AVX-512; False where the kernel does not list its features."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return any("avx512f" in line for line in file if line.startswith("flags"))
    return False
