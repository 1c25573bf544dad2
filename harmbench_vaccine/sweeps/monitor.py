"""Observe a sweep: what is stored, which workers run which stage, what failed, and the time left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from harmbench_vaccine.core.stage_clock import StageClock
from harmbench_vaccine.core.store import META

from .failures import Failure, Failures
from .leases import Lease, Leases
from .sweep import PlannedStage, Sweep
from .worker import is_finished


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep at one moment."""

    name: str
    runs: int
    finished: int
    """Number of runs with a result."""
    stages: Counter[str]
    """Kind of stage -> its number."""
    done: Counter[str]
    """Kind of stage -> number of stored ones."""
    running: dict[str, Lease]
    """Stage as `kind-key` -> the lease of its worker."""
    failures: list[Failure]
    """Failures of stages of this sweep."""
    labels: Mapping[str, str]
    """Stage as `kind-key` -> the stage with a run that needs it, for people."""
    seconds_left: float
    """Estimated time to the end; infinite while it is unknown."""

    @property
    def parked(self) -> list[Failure]:
        """The stages that no worker tries again."""
        return [failure for failure in self.failures if failure.is_parked]

    def count_kinds(self) -> dict[str, dict[str, int]]:
        """Return kind of stage -> number of stages that are done, running, failed, and in total."""
        running, failed = (
            Counter(name.rpartition("-")[0] for name in names)
            for names in (self.running, [failure.name for failure in self.parked])
        )
        return {
            kind: {"done": self.done[kind], "running": running[kind], "failed": failed[kind], "total": total}
            for kind, total in self.stages.items()
        }

    @property
    def time_left(self) -> float | None:
        """Seconds to the end; None if no worker runs a stage, or if they are unknown."""
        return self.seconds_left if self.running and math.isfinite(self.seconds_left) else None


class SweepMonitor:
    """Observes a sweep: the stages are planned once, and only those that are not finished are looked at again."""

    def __init__(self, sweep: Sweep) -> None:
        """Plan the stages of a sweep."""
        self._sweep = sweep
        self._stages = {stage.name: stage for stage in sweep.planned_stages}
        self._labels = {name: stage.label for name, stage in self._stages.items()}
        self._missing = {name: stage for name, stage in self._stages.items() if not stage.artifact.cached}
        self._unfinished = set(sweep.by_run)
        self._clock = StageClock(sweep.stages())

    def status(self) -> SweepStatus:
        """Look at the store."""
        sweep = self._sweep
        for name in [name for name, stage in self._missing.items() if (stage.artifact.path / META).is_file()]:
            self._finish(self._missing.pop(name))
        self._unfinished = {run for run in self._unfinished if not is_finished(run, sweep.by_run[run], sweep.runs)}
        leases = Leases(sweep.store).all()
        running = {name: lease for name, lease in leases.items() if name in self._missing and lease.is_valid()}
        workers = {lease.holder for lease in running.values()}
        return SweepStatus(
            name=sweep.name,
            runs=len(sweep.experiments),
            finished=len(sweep.experiments) - len(self._unfinished),
            stages=Counter(stage.artifact.stage for stage in self._stages.values()),
            done=Counter(stage.artifact.stage for name, stage in self._stages.items() if name not in self._missing),
            running=running,
            failures=[failure for failure in Failures(sweep.store).all() if failure.name in self._stages],
            labels=self._labels,
            seconds_left=self._clock.estimate()[1] / max(1, len(workers)),
        )

    def _finish(self, stage: PlannedStage) -> None:
        artifact = stage.artifact
        self._clock.finish(replace(artifact, seconds=float(artifact.json(META)["seconds"])))
