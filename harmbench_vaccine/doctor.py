"""What this machine can run, and what is missing."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .paths import home, writable


def findings() -> list[dict[str, Any]]:
    """One entry a question: `what` was looked at, whether it is `ok`, and the `detail` in words."""
    found = [_package(name, why) for name, why in _PACKAGES.items()]
    found.append(_device())
    found.append(_cache())
    return found


_PACKAGES = {
    "torch": "training",
    "transformers": "models",
    "peft": "adapters",
    "accelerate": "devices",
    "datasets": "data sets of the hub; local files need none",
    "vllm": "faster generation on a GPU; transformers answers without it",
    "ray": "sweeps on a cluster",
}


def _package(name: str, why: str) -> dict[str, Any]:
    try:
        return {"what": name, "ok": True, "detail": version(name)}
    except PackageNotFoundError:
        return {"what": name, "ok": False, "detail": f"not installed ({why})"}


def _device() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"what": "device", "ok": False, "detail": f"torch cannot be imported: {error}"}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return {"what": "device", "ok": True, "detail": f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"what": "device", "ok": True, "detail": f"CPU, {cores} cores: the testbed runs, a 7B model does not"}


def _cache() -> dict[str, Any]:
    from .errors import BadInput, HbvError

    try:
        folder = writable(home(), "The cache folder")
    except (BadInput, HbvError) as error:
        return {"what": "cache", "ok": False, "detail": str(error)}
    free = shutil.disk_usage(folder).free / 2**30
    return {"what": "cache", "ok": free > 1, "detail": f"{folder}, {free:.0f} GiB free (HBV_HOME moves it)"}
