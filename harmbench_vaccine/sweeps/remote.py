"""A worker of a sweep that another machine starts: everything that it needs, and how it ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harmbench_vaccine.core.device import select_device
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.library_settings import set_library_defaults
from harmbench_vaccine.core.progress import Lines, Progress, format_duration
from harmbench_vaccine.core.signals import handled_signals

from .remaining_time import RemainingTime, StageSeconds, job_end
from .shared_store import SharedStore
from .suite import Suite
from .sweep import Sweep
from .worker import WorkSummary, work


class TimeTooShort(HbvError):
    """Some stages take longer than the time that a worker has left: it has to be started again."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: the command may succeed if it is repeated."""


def run_worker(
    sweep: Sweep, progress: Progress, *, time_limit: float | None = None, environment: Mapping[str, str] = os.environ
) -> WorkSummary:
    """Work on a sweep in this process until nothing is left, or until its job is about to end.

    Args:
        sweep: The sweep, prepared.
        progress: Where progress is reported.
        time_limit: Seconds after which the job of this worker ends; that of a SLURM job is known.
        environment: The variables of the process.

    Raises:
        TimeTooShort: A stage does not fit into the remaining time.
        HbvError: A stage does not fit into the time limit of any job.
    """
    end = job_end(time_limit, environment, time.time())
    remaining = RemainingTime(end, StageSeconds(sweep)) if end is not None else None
    store = SharedStore(sweep.store, progress, fits=remaining.fits) if remaining else SharedStore(sweep.store, progress)
    summary = work(sweep.experiments, store, sweep.runs, progress=progress)
    if sweep.is_complete:
        sweep.write_outputs()
    if remaining and remaining.impossible:
        kind, seconds = max(remaining.impossible.items(), key=lambda item: item[1])
        raise HbvError(
            f"A stage of kind {kind!r} takes about {format_duration(seconds)}, longer than the time limit of a worker, "
            "and it has no checkpoints: start workers with a longer limit."
        )
    if remaining and summary.too_long:
        raise TimeTooShort(
            f"{len(summary.too_long)} of {len(sweep.experiments)} runs have a stage that does not fit into the "
            f"remaining {format_duration(max(0.0, remaining.left()))} of this worker: start it again."
        )
    return summary


@dataclass(frozen=True)
class RemoteWorker:
    """A worker that a scheduler starts in a process of its own, with number 0, 1, ...

    It can be pickled, and settles the runs of its suite again on its own machine.
    """

    suite: Suite
    home: Path
    """`HBV_HOME`, on a file system that all machines share."""
    out: Path
    """The folder of the table and of the logs of the workers."""
    folder: Path
    """The working directory, for relative paths in the suite."""
    device: str = ""
    """`HBV_DEVICE`; empty: a GPU if one is available."""
    time_limit: float | None = None
    """Seconds after which its job ends."""

    def __call__(self, number: int) -> WorkSummary:
        """Run the worker, and append its progress to `worker-HOST-N.log`.

        Raises:
            TimeTooShort: A stage does not fit into the remaining time.
            Interrupted: A signal ended it.
        """
        set_library_defaults()
        os.environ["HBV_HOME"] = str(self.home)
        os.chdir(self.folder)
        if self.device:
            select_device(self.device)
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"worker-{socket.gethostname()}-{number}.log"
        with path.open("a", encoding="utf-8", buffering=1) as log, handled_signals():
            progress = Lines(partial(print, file=log))
            return run_worker(Sweep.open(self.suite, self.home, self.out), progress, time_limit=self.time_limit)
