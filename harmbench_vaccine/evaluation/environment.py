"""The machine, the code and the versions that a result was computed with."""

from __future__ import annotations

import platform
import socket
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import harmbench_vaccine
from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.torch_build import cuda_version
from harmbench_vaccine.inference.engine import installed_vllm

from .result_fields import Environment

PACKAGES = (
    *("harmbench-vaccine", "torch", "transformers", "peft", "accelerate", "numpy", "datasets", "tokenizers"),
    *("safetensors", "pandas", "scipy"),
)
"""Packages whose version can change a result."""


def current_environment(*, vllm: bool = False) -> Environment:
    """Describe this machine; with `vllm`, include the version of vLLM."""
    commit, is_dirty = _git_state()
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        cpu=_cpu(),
        device=device(),
        gpu=_gpu(),
        git_commit=commit,
        git_dirty=is_dirty,
        versions={**_versions(), **(installed_vllm() if vllm else {})},
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "cuda": cuda_version() or "none"}


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    if device() == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name(0)


@cache  # the code of a process does not change
def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that this code is in, and whether it has changes; None outside a checkout."""
    folder = Path(harmbench_vaccine.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel")) == folder.parent:  # not the checkout of another project
            return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    return None, None
