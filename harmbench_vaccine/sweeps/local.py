"""Run a sweep on this machine: worker processes, one for each GPU, or with a share of the cores each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.progress import Progress

from .sweep import Sweep, SweepMonitor, SweepStatus

_LOOK = 1.0
"""Seconds between two looks at the store."""
_RESTARTS = 3
"""Restarts of a worker that the system killed, for example because memory ran out."""


def run_local(sweep: Sweep, suite: str, workers: int | None, progress: Progress) -> list[int]:
    """Run a sweep by worker processes on this machine, and wait for them.

    Args:
        sweep: The sweep, prepared.
        suite: The suite as the command line names it.
        workers: Number of workers; None: one for each visible GPU, or one.
        progress: Shows a bar over the stages.

    Returns:
        The exit code of each worker.
    """
    gpus = visible_gpus()
    count = workers or len(gpus) or 1
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "harmbench_vaccine", "sweep", suite, "--worker"]
    environments = [worker_environment(number, count, gpus, cores) for number in range(count)]
    return run_workers(command, environments, sweep.folder, SweepMonitor(sweep), progress)


def visible_gpus() -> list[str]:
    """Return the visible GPUs, as `CUDA_VISIBLE_DEVICES` names them; none if models run on the CPU."""
    if device() == "cpu":
        return []
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(number) for number in range(torch.cuda.device_count())]


def worker_environment(number: int, workers: int, gpus: Sequence[str], cores: int) -> dict[str, str]:
    """Return the variables of one of several workers.

    Args:
        number: The number of the worker, from 0.
        workers: Number of workers.
        gpus: The visible GPUs; worker i gets GPU i modulo their number.
        cores: Cores of this machine, which the workers divide; each gets at least one thread.
    """
    threads = str(max(1, cores // workers))
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    return variables | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})


def run_workers(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    logs: Path,
    monitor: SweepMonitor,
    progress: Progress,
) -> list[int]:
    """Start workers, show how far they are, and wait for them. An interruption stops them first.

    Args:
        command: The command of a worker.
        environments: The variables of each worker, in addition to those of this process.
        logs: Folder of their logs, `worker-N.log`.
        monitor: Observes the sweep.
        progress: Shows a bar over the stages.

    Returns:
        The exit code of each worker.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:

        def start(number: int) -> subprocess.Popen[bytes]:
            log = files.enter_context((logs / f"worker-{number}.log").open("ab"))
            environment = {**os.environ, **environments[number]}
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

        workers = [start(number) for number in range(len(environments))]
        try:
            _watch(workers, start, monitor, progress)
        finally:
            _stop(workers)
        return [worker.returncode for worker in workers]


def _watch(
    workers: list[subprocess.Popen[bytes]],
    start: Callable[[int], subprocess.Popen[bytes]],
    monitor: SweepMonitor,
    progress: Progress,
) -> None:
    """Advance a bar until all workers have ended, and replace those that the system kills."""
    restarts = 0
    status = monitor.status()
    done = status.done.total()
    with progress.bar(f"{status.runs} runs", status.stages.total() - done) as advance:
        while any(worker.poll() is None for worker in workers):
            time.sleep(_LOOK)
            for number, worker in enumerate(workers):
                if worker.poll() == -signal.SIGKILL and restarts < _RESTARTS:
                    restarts += 1
                    progress.note(f"Worker {number} was killed, possibly because memory ran out; it is started again.")
                    workers[number] = start(number)
            status = monitor.status()
            advance(status.done.total() - done, _summary(status), monitor.seconds_left(status))
            done = status.done.total()


def _summary(status: SweepStatus) -> str:
    parts = [f"{status.finished} of {status.runs} runs", f"{len(status.running)} running"]
    return ", ".join([*parts, *([f"{len(status.parked)} failed"] if status.parked else [])])


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the workers that still run as SIGTERM ends a command: each writes a checkpoint."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        worker.wait()
