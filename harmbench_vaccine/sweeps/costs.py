"""The measured costs of the runs of a sweep, as CSV. Times are not reproducible, so they are not in its results."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.types import STAGES
from harmbench_vaccine.core.visible import cell_of_text
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.reporting.dry_run.estimate import passes_per_step

COLUMNS = {
    "run": "id of the run",
    "defense": "the defense",
    "attack": "the attack",
    "task": "the task",
    "seed": "the seed",
    "stage": "align, finetune, repair, answer, score, drift",
    "seconds": "time that its artifacts took to create; runs share stages, so that the sum over runs is larger",
    "steps": "optimizer steps; empty for a stage without training",
    "passes": "forward and backward passes of each batch, as the defenses declare them and `hbv check` counts them",
    "seconds_per_step": "seconds divided by steps",
    "peak_memory": "peak memory in bytes: of the GPU where one was used, else of the process",
    "device": "cpu, or the name of the GPU, on which the run ended",
}


def write_costs(path: Path, runs: Iterable[tuple[Experiment, Result]]) -> None:
    """Write one row for each stage of each run, atomically.

    Args:
        path: The CSV.
        runs: Experiments with their results.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for experiment, result in runs:
        writer.writerows(_rows(experiment, result))
    write_atomically(path, file.getvalue())


def _rows(experiment: Experiment, result: Result) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run; a value that was not measured is an empty cell."""
    defenses: dict[str, list[Defense]] = {
        stage: [resolved.plugin for resolved in experiment.acting(stage)] for stage in STAGES
    }
    names = {axis: cell_of_text(getattr(result, axis)) for axis in ("run", "defense", "attack", "task")}
    device = result.environment.gpu or result.environment.device
    for stage, record in result.stages.items():
        forward, backward = passes_per_step(defenses.get(stage, []))
        yield {
            **names,
            "seed": result.seed,
            "stage": stage,
            "seconds": round(record.seconds, 3),
            "steps": record.steps,
            "passes": f"{forward}F {backward}B" if record.steps else None,
            "seconds_per_step": round(record.seconds / record.steps, 5) if record.steps else None,
            "peak_memory": record.peak_memory,
            "device": device,
        }
