"""Run a sweep on this machine: worker processes, one for each GPU, or with a share of the cores each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.progress import Progress

from .live import shown_progress
from .monitor import SweepMonitor
from .sweep import Sweep

_LOOK = 1.0
"""Seconds between two looks at the store, and of a worker at its coordinator."""
_RESTARTS = 3
"""Restarts of workers that the system killed, for example because memory ran out, without a finished stage between."""
_COORDINATOR = "HBV_COORDINATOR"
"""Variable with the process id of the command that started a worker."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_local(sweep: Sweep, suite: str, workers: int | None, progress: Progress) -> None:
    """Run a sweep by worker processes on this machine, and wait for them.

    Args:
        sweep: The sweep, prepared.
        suite: The suite as the command line names it.
        workers: Number of workers; None: one for each visible GPU, or one.
        progress: Shows a bar over the stages and, on a terminal, the state of the sweep.
    """
    if sweep.is_complete:
        return
    gpus = visible_gpus()
    count = workers or len(gpus) or 1
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "harmbench_vaccine", "sweep", suite, "--worker"]
    environments = [worker_environment(number, count, gpus, cores) for number in range(count)]
    LocalWorkers(command, environments, sweep.folder, progress).run(SweepMonitor(sweep))


def visible_gpus() -> list[str]:
    """Return the visible GPUs, as `CUDA_VISIBLE_DEVICES` names them; none if models run on the CPU."""
    if device() == "cpu":
        return []
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(number) for number in range(torch.cuda.device_count())]


def worker_environment(
    number: int, workers: int, gpus: Sequence[str], cores: int, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the variables of one of several workers.

    Args:
        number: The number of the worker, from 0.
        workers: Number of workers.
        gpus: The visible GPUs; worker i gets GPU i modulo their number.
        cores: Cores of this machine, which the workers divide. Where models run on the CPU, each worker gets one or two
            threads, which compute the same bits.
        environment: The variables of this process. A smaller number of threads in it is kept.
    """
    share = max(1, cores // workers) if gpus else 1 + (cores >= 2 * workers)
    limits = [int(text) for name in _THREADS if (text := environment.get(name, "")).isdecimal() and int(text)]
    variables = dict.fromkeys(_THREADS, str(min([share, *limits])))
    return variables | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})


class LocalWorkers:
    """Worker processes of a sweep. They end with this process, as SIGTERM ends a command."""

    def __init__(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], logs: Path, progress: Progress
    ) -> None:
        """Prepare the workers.

        Args:
            command: The command of a worker.
            environments: The variables of each worker, in addition to those of this process.
            logs: Folder of their logs, `worker-HOST-N.log`.
            progress: Shows a bar over the stages and, on a terminal, the state of the sweep.
        """
        self._command, self._environments, self._logs, self._progress = command, environments, logs, progress
        self._processes: list[subprocess.Popen[bytes]] = []
        self._restarts = 0

    def run(self, monitor: SweepMonitor) -> None:
        """Start the workers and wait for them, while their progress is shown. An interruption stops them first."""
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            for number in range(len(self._environments)):
                self._processes.append(self._start(number))
            self._watch(monitor)
        finally:
            self._stop()

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self._environments[number], _COORDINATOR: str(os.getpid())}
        environment.pop("HBV_LOG_FILE", None)  # of the command: a worker has its own log
        with self._log(number).open("ab") as log:
            return subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the workers
            )

    def _watch(self, monitor: SweepMonitor) -> None:
        """Report the progress until all workers have ended, and replace those that the system kills."""
        with shown_progress(monitor, self._progress) as look:
            while self._is_running():
                time.sleep(_LOOK)
                if look():
                    self._restarts = 0
        for number, process in enumerate(self._processes):
            if process.returncode:
                reason = _last_line(self._log(number))
                self._progress.note(f"Worker {number} ended with exit code {process.returncode}. {reason}")

    def _is_running(self) -> bool:
        """Start workers again that the system killed, and return whether any worker runs."""
        for number, process in enumerate(self._processes):
            code = process.poll()
            if code is None or code >= 0 or self._restarts == _RESTARTS:
                continue
            self._restarts += 1
            hint = ", possibly because memory ran out" if -code == signal.SIGKILL else ""
            name = signal.Signals(-code).name
            self._progress.note(f"Worker {number} was killed by {name}{hint}; it is started again.")
            self._processes[number] = self._start(number)
        return any(process.poll() is None for process in self._processes)

    def _log(self, number: int) -> Path:
        return self._logs / f"worker-{socket.gethostname()}-{number}.log"  # several machines may share the folder

    def _stop(self) -> None:
        """End the workers that still run as SIGTERM ends a command: each writes a checkpoint."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            process.wait()


def end_with_coordinator(environment: Mapping[str, str] = os.environ) -> None:
    """End this process as SIGTERM does once the command that started it as a worker has ended; others go on."""
    if not (coordinator := environment.get(_COORDINATOR)):
        return

    def watch() -> None:
        while os.getppid() == int(coordinator):
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="coordinator", daemon=True).start()


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else ""
    return ""
