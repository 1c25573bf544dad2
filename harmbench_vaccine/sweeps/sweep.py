"""A sweep: the experiments of a suite, their state in the store, and their table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.progress import Progress
from harmbench_vaccine.core.stage_clock import StageClock
from harmbench_vaccine.core.store import META, Artifact
from harmbench_vaccine.evaluation.records import load_result
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import write_results
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.pipeline import run
from harmbench_vaccine.reporting.dry_run.plan import DryRunStore
from harmbench_vaccine.runner import prepare

from .failures import Failure, Failures
from .leases import Lease, Leases
from .suite import Suite
from .worker import is_finished

TABLE = "results.csv"


@dataclass(frozen=True)
class Sweep:
    """The experiments of a suite, and the folders that its workers share."""

    name: str
    experiments: Sequence[Experiment]
    home: Path

    @classmethod
    def open(cls, suite: Suite, home: Path) -> Self:
        """Settle the runs of a suite.

        Args:
            suite: The suite.
            home: The folder of the store and of the runs, which the workers share.

        Raises:
            BadInput: A run of the suite is not possible.
        """
        return cls(suite.name, [Experiment.settle(spec) for spec in suite.specs()], home)

    @property
    def store(self) -> Path:
        """The folder of the store."""
        return self.home / "store"

    @property
    def runs(self) -> Path:
        """The folder of the run folders."""
        return self.home / "runs"

    @property
    def folder(self) -> Path:
        """The folder of the table and of the logs of the workers."""
        return self.home / "sweeps" / self.name

    def prepare(self, progress: Progress) -> None:
        """Check every run before the first one starts, and build the testbed if one uses it.

        Raises:
            BadInput: Something that a run needs is not available, or the folders are not writable.
        """
        for folder in (self.home, self.store, self.runs, self.folder):
            ensure_writable(folder, "The folder of the sweep")
        prepare(self.experiments, ModelPool(progress), progress=progress)

    def retry_failed(self) -> None:
        """Forget the failures of this sweep, so that its workers try the stages again."""
        failures = Failures(self.store)
        for stage in self.stages():
            failures.forget(f"{stage.stage}-{stage.key}")

    def stages(self) -> list[Artifact]:
        """Return the artifacts of all runs, each once, stored or not."""
        store = DryRunStore(self.store)
        for experiment in self.experiments:
            with suppress(HbvError):  # the worker reports it
                run(experiment, RunContext(store, ModelPool()))
        return list(store.requested.values())

    def results(self) -> list[Result]:
        """Return the results of the finished runs, in the order of the suite."""
        finished = (experiment for experiment in self.experiments if is_finished(experiment, self.runs))
        return [load_result(self.runs / keys.run_id(experiment)) for experiment in finished]

    def write_table(self) -> Path:
        """Write the results of the finished runs as CSV; the same results give the same bytes."""
        path = self.folder / TABLE
        write_results(path, self.results())
        return path


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep at one moment."""

    runs: int
    finished: int
    stages: Counter[str]
    """Kind of stage -> its number."""
    done: Counter[str]
    """Kind of stage -> number of stored ones."""
    running: dict[str, Lease]
    """Stage as `kind-key` -> the lease of its worker."""
    failures: list[Failure] = field(default_factory=list)
    """Failures of stages of this sweep."""

    def running_of(self, kind: str) -> int:
        """Return the number of running stages of a kind."""
        return sum(name.startswith(f"{kind}-") for name in self.running)

    @property
    def parked(self) -> list[Failure]:
        """The stages that no worker tries again."""
        return [failure for failure in self.failures if failure.is_parked]


class SweepMonitor:
    """Observes a sweep: the stages are planned once, and only their folders are looked at afterwards."""

    def __init__(self, sweep: Sweep) -> None:
        """Plan the stages of a sweep."""
        self._sweep = sweep
        self._stages = {artifact.key: artifact for artifact in sweep.stages()}
        self._clock = StageClock(self._stages.values())

    def status(self) -> SweepStatus:
        """Look at the store."""
        sweep, names = self._sweep, {f"{stage.stage}-{key}" for key, stage in self._stages.items()}
        leases = Leases(sweep.store).all() if sweep.store.is_dir() else {}
        running = {name: lease for name, lease in leases.items() if name in names and lease.is_valid()}
        done = [stage for stage in self._stages.values() if (stage.path / META).is_file()]
        return SweepStatus(
            len(sweep.experiments),
            sum(is_finished(experiment, sweep.runs) for experiment in sweep.experiments),
            Counter(stage.stage for stage in self._stages.values()),
            Counter(stage.stage for stage in done),
            running,
            [failure for failure in Failures(sweep.store).all() if failure.name in names],
        )

    def seconds_left(self, status: SweepStatus) -> float:
        """Estimate the remaining time: that of the remaining stages, divided among the workers that run stages."""
        for artifact in self._stages.values():
            if not artifact.cached and (artifact.path / META).is_file():
                self._clock.finish(replace(artifact, seconds=_stored_seconds(artifact)))
        return self._clock.estimate()[1] / max(1, len(status.running))


def _stored_seconds(artifact: Artifact) -> float:
    return float(artifact.json(META)["seconds"])
