"""A sweep: the experiments of a suite, their state in the store, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.progress import Progress
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.evaluation.records import load_result
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import write_results
from harmbench_vaccine.evaluation.sweep_registry import forget_sweep, register_sweep
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.pipeline import run
from harmbench_vaccine.reporting.dry_run.plan import DryRunStore
from harmbench_vaccine.reporting.leaderboard.stage_costs import COSTS, StageCost, costs_text, stage_costs
from harmbench_vaccine.runner import prepare

from .failures import Failures
from .suite import Suite
from .worker import is_finished

TABLE = "results.csv"


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a sweep, which several runs may share."""

    artifact: Artifact
    """Its artifact, stored or not when the sweep was planned."""
    experiment: Experiment
    """The first run that needs it."""

    @property
    def name(self) -> str:
        """The artifact as `stage-key`, the name of its lease."""
        return f"{self.artifact.stage}-{self.artifact.key}"

    @property
    def label(self) -> str:
        """The stage with the run that needs it, for people."""
        run = self.experiment
        model = [run.defense, f"seed {run.spec.seed}"]
        parts = model if self.artifact.stage == "align" else [run.defense, run.attack, run.task_name, model[1]]
        return f"{self.artifact.stage} {', '.join(parts)}"


@dataclass(frozen=True)
class Sweep:
    """The experiments of a suite, and the folders that its workers share."""

    name: str
    experiments: Sequence[Experiment]
    home: Path
    """The folder of the store and of the runs."""
    folder: Path
    """The folder of the table, the costs and the logs of local workers."""

    @classmethod
    def open(cls, suite: Suite, home: Path, out: Path | None = None) -> Self:
        """Settle the runs of a suite.

        Args:
            suite: The suite.
            home: The folder of the store and of the runs, which the workers share.
            out: The folder of the table, the costs and the logs; None: `sweeps/NAME` in the home.

        Raises:
            BadInput: A run of the suite is not possible.
        """
        experiments = suite.settle()
        return cls(suite.name, experiments, home, out or home / "sweeps" / suite.name)

    @property
    def store(self) -> Path:
        """The folder of the store."""
        return self.home / "store"

    @property
    def runs(self) -> Path:
        """The folder of the run folders."""
        return self.home / "runs"

    @property
    def is_complete(self) -> bool:
        """Return whether every run has a result."""
        return all(is_finished(run, experiment, self.runs) for run, experiment in self.by_run.items())

    @cached_property
    def by_run(self) -> dict[str, Experiment]:
        """Run id -> experiment, in the order of the suite."""
        return {keys.run_id(experiment): experiment for experiment in self.experiments}

    def prepare(self, progress: Progress) -> None:
        """Check every run before the first one starts, build the testbed if one uses it, and record the sweep.

        Raises:
            BadInput: Something that a run needs is not available, or a folder is not writable.
        """
        for folder in (self.home, self.store, self.runs, self.folder):
            ensure_writable(folder, "The folder of the sweep")
        prepare(self.experiments, ModelPool(progress), progress=progress)
        artifacts = [f"{artifact.stage}/{artifact.key}" for artifact in self.stages()]
        register_sweep(self.store, self.name, self.runs, list(self.by_run), artifacts)

    def stages(self) -> list[Artifact]:
        """Return the artifacts of all runs, each once, stored or not."""
        return [stage.artifact for stage in self.planned_stages]

    @cached_property
    def planned_stages(self) -> list[PlannedStage]:
        """The stages of all runs, each once, as they were stored when this was first read."""
        store = DryRunStore(self.store)
        planned: dict[str, PlannedStage] = {}
        for experiment in self.experiments:
            with suppress(HbvError):  # the worker reports it
                run(experiment, RunContext(store, ModelPool()))
            for key in store.requested.keys() - planned.keys():
                planned[key] = PlannedStage(store.requested[key], experiment)
        return [planned[key] for key in store.requested]

    def retry_failed(self) -> None:
        """Forget the failures of this sweep, so that its workers try the stages again."""
        failures = Failures(self.store)
        for stage in self.planned_stages:
            failures.forget(stage.name)

    def results(self) -> list[Result]:
        """Return the results of the finished runs, in the order of the suite."""
        return [result for _, result in self._finished_runs()]

    def costs(self) -> list[StageCost]:
        """Return the cost of each stage of the finished runs, in the order of the suite."""
        return [cost for experiment, result in self._finished_runs() for cost in stage_costs(experiment, result)]

    def unfinished_runs(self) -> list[str]:
        """Return the plug-ins and the seed of every run without a result, in the order of the suite."""
        return [
            f"{experiment.defense} under {experiment.attack} on {experiment.task_name}, seed {experiment.spec.seed}"
            for run, experiment in self.by_run.items()
            if not is_finished(run, experiment, self.runs)
        ]

    def failed_stages(self) -> list[str]:
        """Return one sentence for each parked stage, with its last error."""
        labels = {stage.name: stage.label for stage in self.planned_stages}
        return [
            f"{labels[failure.name]} failed {failure.attempts} times: {failure.reason.rstrip('.')}."
            for failure in Failures(self.store).all()
            if failure.is_parked and failure.name in labels
        ]

    def write_outputs(self) -> Path:
        """Write the results of the finished runs as CSV, and their costs as another one.

        Returns:
            The table of results: the same results give the same bytes, while costs differ between executions.
        """
        results = self.results()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_results(self.folder / TABLE, results)
        write_atomically(self.folder / COSTS, costs_text(self.costs()))
        if len(results) == len(self.experiments):
            forget_sweep(self.store, self.name)
        return self.folder / TABLE

    def _finished_runs(self) -> list[tuple[Experiment, Result]]:
        return [
            (experiment, load_result(self.runs / run))
            for run, experiment in self.by_run.items()
            if is_finished(run, experiment, self.runs)
        ]

    def check_complete(self) -> None:
        """Check that every run has a result.

        Raises:
            HbvError: Some runs have none; the message has the reason of the first failed stage.
        """
        missing = len(self.unfinished_runs())
        if not missing:
            return
        message = f"{missing} of {len(self.experiments)} runs of {self.name} have no result."
        logs = f"The logs are in {self.folder}."
        if failed := self.failed_stages():
            advice = "--status lists the failed stages, and --retry-failed tries them again."
            raise HbvError(f"{message} {failed[0]} {logs} {advice}")
        raise HbvError(f"{message} {logs} Repeat the command to resume.")
