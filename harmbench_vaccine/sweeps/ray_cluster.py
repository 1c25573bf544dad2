"""Run a sweep by workers on a Ray cluster: an existing one, or one on this machine for the time of the command.

Ray only starts the workers and gives each its GPUs. The store is the queue, as on one machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import Progress
from harmbench_vaccine.core.signals import deferred_interruption, handled_signals, stop_if_interrupted

from .live import shown_progress
from .monitor import SweepMonitor
from .remaining_time import SIGNAL_SECONDS
from .remote import RemoteWorker
from .sweep import Sweep

_LOOK = 1.0
"""Seconds between two looks at the store."""
_RESTARTS = 3
"""Restarts of a worker whose process or node fails."""


@dataclass(frozen=True)
class RayTasks:
    """The workers as Ray tasks."""

    count: int
    gpus: int
    """GPUs of each task."""
    cpus: int
    """Cores of each task."""

    @classmethod
    def fit(
        cls, nodes: Sequence[Mapping[str, float]], workers: int | None, gpus: int | None, cpus: int | None
    ) -> RayTasks:
        """Choose the resources of the workers, as far as the user did not.

        Args:
            nodes: The resources of each node of the cluster.
            workers: Number of workers; None: as many as the GPUs allow, or one without GPUs.
            gpus: GPUs of each worker; None: one if the cluster has GPUs.
            cpus: Cores of each worker; None: one for a worker with a GPU, else an equal share of the cluster.

        Raises:
            BadInput: No node has so many GPUs or cores.
        """
        gpus_of, cpus_of = ([int(node.get(kind, 0)) for node in nodes] for kind in ("GPU", "CPU"))
        gpus = min(1, max(gpus_of)) if gpus is None else gpus
        count = workers or (sum(number // gpus for number in gpus_of) if gpus else 1)
        if cpus is None:
            cpus = 1 if gpus else max(1, min(max(cpus_of), sum(cpus_of) // count))
        for number, most, name in ((gpus, max(gpus_of), "GPUs"), (cpus, max(cpus_of), "cores")):
            if number > most:
                raise BadInput(f"No node of the Ray cluster has {number} {name} for a worker; the largest has {most}.")
        return cls(count, gpus, cpus)


def run_on_ray(
    sweep: Sweep,
    worker: RemoteWorker,
    progress: Progress,
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus: int | None = None,
    cpus: int | None = None,
    retry_failed: bool = False,
) -> None:
    """Run a sweep by Ray tasks, and wait for them. An interruption stops them first.

    Args:
        sweep: The sweep.
        worker: The worker of each task.
        progress: Shows a bar over the stages and, on a terminal, the state of the sweep.
        address: The address of a cluster; None: that of `RAY_ADDRESS`, or else a cluster on this machine.
        workers: As in `RayTasks.fit`.
        gpus: As in `RayTasks.fit`.
        cpus: As in `RayTasks.fit`.
        retry_failed: Whether stages are tried again that failed too often.

    Raises:
        BadInput: Ray is not installed, the cluster does not answer, or it has too few resources.
    """
    if sweep.is_complete:
        return
    with _connected(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        tasks = RayTasks.fit(nodes, workers, gpus, cpus)
        sweep.prepare(progress)
        if retry_failed:
            sweep.retry_failed()
        task = ray.remote(
            num_gpus=tasks.gpus,
            num_cpus=tasks.cpus,
            max_calls=1,  # so that the process ends with the task, and the memory of its GPU is free
            max_retries=_RESTARTS,
            runtime_env={"env_vars": dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(tasks.cpus))},
        )(_run_worker)
        _wait(ray, [task.remote(worker, number) for number in range(tasks.count)], SweepMonitor(sweep), progress)


def _run_worker(worker: RemoteWorker, number: int) -> list[str]:
    """Run a worker in a Ray task; return the ids of the runs that it finished."""
    return worker(number).finished


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Connect to a cluster inside the block, or start one; the block receives the module ray.

    Raises:
        BadInput: Ray is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to other servers
    try:
        import ray
    except ImportError as error:
        raise BadInput("--executor ray needs Ray: pip install 'harmbench-vaccine[ray]'.") from error
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    dashboard = False if place == "local" else None
    try:
        ray.init(place, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"The Ray cluster {place!r} cannot be used: {' '.join(str(error).split())}") from error
    try:
        with handled_signals():  # Ray replaced the handler of SIGTERM
            yield ray
    finally:
        ray.shutdown()


def _wait(ray: Any, pending: Sequence[Any], monitor: SweepMonitor, progress: Progress) -> None:
    """Show the progress until all tasks have ended; cancel them if this process is interrupted."""
    try:
        with shown_progress(monitor, progress) as look, deferred_interruption():  # Ray would replace the exception
            while pending:
                ended, pending = ray.wait(pending, num_returns=len(pending), timeout=_LOOK)
                stop_if_interrupted()
                look()
                for each in ended:
                    _note_failure(ray, each, progress)
    except BaseException:
        for each in pending:
            ray.cancel(each)  # raises KeyboardInterrupt in the task, which then writes a checkpoint
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=SIGNAL_SECONDS)
        raise


def _note_failure(ray: Any, task: Any, progress: Progress) -> None:
    try:
        ray.get(task)
    except HbvError as error:  # Ray raises the exception of the task
        progress.note(f"A worker ended: {error}")
    except ray.exceptions.RayError as error:
        progress.note(f"A worker failed: {' '.join(str(error).split())}")
