"""The GPUs that the installed torch was built for, read from its file of versions, without importing torch."""

from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def cuda_version() -> str | None:
    """Return the version of CUDA that torch was built with; None for a build for CPUs or for GPUs of AMD."""
    version: str | None = _versions()["cuda"]
    return version


def is_cpu_build() -> bool:
    """Return True if torch is a build for CPUs, which finds no GPU on any machine."""
    versions = _versions()
    return versions["cuda"] is None and versions["hip"] is None


def _versions() -> dict[str, Any]:
    """Return the values of `torch.version`."""
    return vars(sys.modules["torch"].version) if "torch" in sys.modules else _file_values()


@cache  # a process does not change its libraries
def _file_values() -> dict[str, Any]:
    spec = find_spec("torch")
    with suppress(OSError):
        values = runpy.run_path(str(Path(spec.origin).with_name("version.py"))) if spec and spec.origin else {}
        if {"cuda", "hip"} <= values.keys():
            return values
    import torch

    return vars(torch.version)
