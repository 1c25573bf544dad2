"""A worker of a sweep: run everything that no other worker runs, until nothing is left.

The stages of a run are requested by the pipeline itself, so the graph of stages exists nowhere else. A run whose next
stage another worker creates is left for later; the worker goes on with the following run. As the runs of a suite are
sorted by what they share, a worker mostly stays with the model that it has in memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from harmbench_vaccine.core.disk_errors import DiskFull
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.evaluation.measure import answer_rows, measure_result
from harmbench_vaccine.evaluation.over_refusal import has_over_refusal
from harmbench_vaccine.evaluation.records import save_run_folder
from harmbench_vaccine.evaluation.run_overview import RESULT
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.pipeline import answer_all, judge_all, run, train_models

from .failures import ATTEMPTS, StageParked, failure_reason
from .shared_store import SharedStore, StageBusy, StageTooLong

_PAUSE = 2.0
"""Seconds between two looks at runs that other workers work on."""


@dataclass
class WorkSummary:
    """The outcome of a worker."""

    finished: list[str] = field(default_factory=list)
    """Ids of the runs whose results this worker stored."""
    parked: dict[str, str] = field(default_factory=dict)
    """Run id -> the failure of the stage that it needs."""
    too_long: list[str] = field(default_factory=list)
    """Ids of runs with a stage that does not fit into the remaining time."""


def work(
    experiments: Sequence[Experiment],
    store: SharedStore,
    runs: Path,
    *,
    models: ModelPool | None = None,
    save_share: float = 0.1,
    progress: Progress = SILENT,
    pause: Callable[[], None] = lambda: time.sleep(_PAUSE),
) -> WorkSummary:
    """Work on experiments until each has a result, is parked, or does not fit into the remaining time.

    Args:
        experiments: The experiments of the sweep, the same for all workers.
        store: The store that the workers share.
        runs: The folder of the run folders.
        models: Models in memory.
        save_share: Share of a training stage's steps between two checkpoints.
        progress: Where progress is reported.
        pause: Waits for other workers.

    Raises:
        DiskFull: The disk is full.
    """
    with closing(models or ModelPool(progress)) as pool:
        context = RunContext(store, pool, progress, save_share)
        worker = _Worker(experiments, context, runs, pause)
        if pool.one_at_a_time():  # so that a GPU loads each engine and each judge once
            worker.advance(_train)
            worker.advance(_answer)
            worker.advance(_judge)
        worker.advance(worker.finish)
        return worker.summary


def is_finished(run: str, experiment: Experiment, runs: Path) -> bool:
    """Return whether a run has a result with every over-refusal set that the experiment requests.

    Args:
        run: Its id.
        experiment: The experiment.
        runs: The folder of the run folders.
    """
    return (runs / run / RESULT).is_file() and has_over_refusal(runs / run, experiment)


class _Worker:
    def __init__(
        self, experiments: Sequence[Experiment], context: RunContext, runs: Path, pause: Callable[[], None]
    ) -> None:
        self._experiments = {keys.run_id(experiment): experiment for experiment in experiments}
        self._context, self._runs, self._pause = context, runs, pause
        self._attempts: Counter[str] = Counter()
        self.summary = WorkSummary()

    def advance(self, step: Callable[[Experiment, RunContext], None]) -> None:
        """Take every run through a step, in turn, and come back to those that other workers work on."""
        remaining = list(self._experiments)
        while remaining:
            waiting = [name for name in remaining if not self._try(step, name)]
            if len(waiting) == len(remaining):
                self._pause()
            remaining = waiting

    def finish(self, experiment: Experiment, context: RunContext) -> None:
        """Run an experiment, of which most stages may be stored, and store its result."""
        measurements = run(experiment, context)
        result = measure_result(experiment, measurements, context.models)
        save_run_folder(result, answer_rows(measurements), self._runs)
        self.summary.finished.append(result.run)

    def _try(self, step: Callable[[Experiment, RunContext], None], name: str) -> bool:
        """Take a run through a step; return False if it has to be tried again."""
        if self._is_left_out(name):
            return True
        try:
            step(self._experiments[name], self._context)
        except StageBusy:
            return False
        except StageParked as error:
            self.summary.parked[name] = str(error)
        except StageTooLong:
            self.summary.too_long.append(name)
        except DiskFull:  # every run would fail
            raise
        except Exception as error:
            return self._count_failure(name, failure_reason(error))
        return True

    def _count_failure(self, name: str, reason: str) -> bool:
        """Count a failed attempt of a run; return whether it was the last one."""
        self._attempts[name] += 1
        if self._attempts[name] < ATTEMPTS:
            self._context.progress.note(f"{name} failed and is tried again: {reason}")
            return False
        self._context.progress.note(f"{name} failed {ATTEMPTS} times: {reason}")
        self.summary.parked[name] = reason
        return True

    def _is_left_out(self, name: str) -> bool:
        is_stopped = name in self.summary.parked or name in self.summary.too_long
        return is_stopped or is_finished(name, self._experiments[name], self._runs)


def _train(experiment: Experiment, context: RunContext) -> None:
    train_models(experiment, context)


def _answer(experiment: Experiment, context: RunContext) -> None:
    answer_all(experiment, context, *train_models(experiment, context))


def _judge(experiment: Experiment, context: RunContext) -> None:
    judge_all(experiment, context, answer_all(experiment, context, *train_models(experiment, context)))
