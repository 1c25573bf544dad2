"""GPUs of the machine with their memory, and the processes that use it, as `nvidia-smi` reports them."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

_GPU_FIELDS = "uuid,index,name,memory.total,memory.used,driver_version"
_PROCESS_FIELDS = "gpu_uuid,pid,used_memory"
_TIMEOUT = 20
"""Seconds for one query; a GPU that fell off the bus can block it."""
_WIDTH = 60
"""Characters of a command that are printed."""


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses memory of a GPU."""

    pid: int
    memory: int | None
    """MiB; None where the driver does not report it, as in some containers."""
    user: str = ""
    command: str = ""
    """Empty for a process that this user or container cannot see."""

    def __str__(self) -> str:
        command = self.command if len(self.command) <= _WIDTH else f"{self.command[:_WIDTH]}..."
        owner = f"{self.user}: {command}" if command else "of another user or container"
        return f"pid {self.pid} has {gibibytes(self.memory)} ({owner})"


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    index: int
    name: str
    memory: int | None
    """MiB in total."""
    used: int | None
    """MiB in use."""
    driver: str
    processes: tuple[GpuProcess, ...] = ()
    uuid: str = field(default="", compare=False)

    @property
    def free(self) -> int | None:
        """MiB that no process uses; None where the driver does not report it."""
        return None if self.memory is None or self.used is None else self.memory - self.used


def gibibytes(mebibytes: int | None) -> str:
    """Format a number of MiB in GiB."""
    return "unknown" if mebibytes is None else f"{mebibytes / 1024:.1f} GiB"


def list_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs of the machine, whether or not `CUDA_VISIBLE_DEVICES` shows them.

    The list is empty without `nvidia-smi`, or where it fails.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        return parse_gpus(
            _query(f"--query-gpu={_GPU_FIELDS}"), _query(f"--query-compute-apps={_PROCESS_FIELDS}"), describe=True
        )
    return []


def parse_gpus(gpus: str, processes: str, *, describe: bool = False) -> list[Gpu]:
    """Parse the output of two queries of `nvidia-smi` in CSV without header and units.

    Args:
        gpus: One line per GPU: UUID, index, name, memory in MiB, used memory in MiB, driver.
        processes: One line per process: UUID of its GPU, process id, used memory in MiB.
        describe: Look up the users and commands of the processes on this machine.

    Raises:
        ValueError: A line has another form.
    """
    users: dict[str, list[GpuProcess]] = {}
    for uuid, pid, memory in _lines(processes):
        process = GpuProcess(int(pid), _mebibytes(memory))
        users.setdefault(uuid, []).append(_described(process) if describe else process)
    return [
        Gpu(int(index), name, _mebibytes(total), _mebibytes(used), driver, tuple(users.get(uuid, ())), uuid)
        for uuid, index, name, total, used, driver in _lines(gpus)
    ]


def _query(fields: str) -> str:
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT).stdout


def _lines(text: str) -> Iterator[list[str]]:
    return (row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row)


def _mebibytes(text: str) -> int | None:
    return int(text) if text.isdecimal() else None  # "[N/A]", "[Not Supported]"


def _described(process: GpuProcess) -> GpuProcess:
    import psutil

    user, command = "", ""
    with suppress(psutil.Error, OSError):
        system_process = psutil.Process(process.pid)
        user = system_process.username()
        command = " ".join(system_process.cmdline()) or system_process.name()
    return GpuProcess(process.pid, process.memory, user, command)
