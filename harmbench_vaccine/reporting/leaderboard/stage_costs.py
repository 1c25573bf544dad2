"""The measured cost of each stage of a run: time, memory, passes and extra rows, read from results or from a CSV.

Times and memory are not reproducible, so they are in a separate CSV, next to the CSV of results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.types import STAGES, Pools
from harmbench_vaccine.evaluation.records import load_result
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.result_fields import Count
from harmbench_vaccine.evaluation.results_csv import (
    Amount,
    Name,
    RunTableRow,
    Text,
    cell_of_value,
    read_run_table,
    run_table_text,
)
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.reporting.dry_run.estimate import passes_per_step

COSTS = "costs.csv"
"""The file next to a CSV of results."""
WITHOUT_COSTS = f"no {COSTS} is next to the results, and the folders of the runs are not in $HBV_HOME/runs"
"""The reason why runs of a CSV have no costs."""
COLUMNS = {
    "run": "id of the run",
    "defense": "the defense",
    "attack": "the attack",
    "task": "the task",
    "seed": "the seed",
    "stage": "align, finetune, repair, answer, score, drift",
    "acts": "True if the defense acts in the stage",
    "seconds": "time that its artifacts took to create; runs share stages, so that the sum over runs is larger",
    "steps": "optimizer steps; empty for a stage without training",
    "passes": "forward and backward passes of each batch, as the defenses declare them and `hbv check` counts them",
    "seconds_per_step": "seconds divided by steps; the time to load the model is included",
    "peak_memory": "peak memory in bytes: of the GPU where one was used, else of the process",
    "harmful_rows": "harmful rows that the defense may draw from in addition to the rows of the stage",
    "guide_rows": "rows without harmful answers that it may draw from in addition",
    "device": "cpu, or the name of the GPU, on which the run ended",
}


class StageCost(RunTableRow):
    """A stage of a run: the columns `COLUMNS`."""

    content: ClassVar[str] = "costs"
    command: ClassVar[str] = "hbv sweep"

    run: Name
    defense: Name
    attack: Name
    task: Name
    seed: Count
    stage: Name
    acts: bool | None = None
    seconds: Amount
    steps: Count | None = None
    passes: Text = ""
    seconds_per_step: Amount | None = None
    peak_memory: Count | None = None
    harmful_rows: Count | None = None
    guide_rows: Count | None = None
    device: Text = ""


def stage_costs(experiment: Experiment, result: Result) -> list[StageCost]:
    """Return the cost of each stage of a run.

    Args:
        experiment: The run before it was executed, which has its defenses.
        result: Its result.
    """
    acting: dict[str, list[Defense]] = {
        stage: [resolved.plugin for resolved in experiment.acting(stage)] for stage in STAGES
    }
    passes = {str(stage): passes_per_step(acting[stage], stage) for stage in STAGES}
    costs = []
    for stage, record in result.stages.items():
        defenses = acting.get(stage, [])
        forward, backward = passes.get(stage, (1, 1))
        harmful_rows, guide_rows = _extra_rows(experiment, defenses)
        costs.append(
            StageCost(
                run=result.run,
                defense=result.defense,
                attack=result.attack,
                task=result.task,
                seed=result.seed,
                stage=stage,
                acts=bool(defenses),
                seconds=round(record.seconds, 3),
                steps=record.steps,
                passes=f"{forward}F {backward}B" if record.steps else "",
                seconds_per_step=round(record.seconds / record.steps, 5) if record.steps else None,
                peak_memory=record.peak_memory,
                harmful_rows=harmful_rows,
                guide_rows=guide_rows,
                device=result.environment.gpu or result.environment.device or "",
            )
        )
    return costs


def stored_costs(runs: Iterable[str], folder: Path) -> list[StageCost]:
    """Return the costs of the runs that are stored and whose defenses are still installed.

    Args:
        runs: Ids of runs, which a CSV may have from anywhere: an id that is a path is skipped.
        folder: The folder of the run folders.
    """
    costs = []
    for run in runs:
        with suppress(HbvError, ValidationError):
            if Path(run).name == run and run != "..":
                result = load_result(folder / run)
                costs += stage_costs(Experiment.settle(RunSpec.model_validate(result.spec)), result)
    return costs


def read_costs(path: Path) -> list[StageCost]:
    """Read a CSV of costs; a missing file has none.

    Raises:
        BadInput: The file is not such a CSV, or a row is damaged; the message names the line.
    """
    return read_run_table(path, StageCost)


def costs_text(costs: Sequence[StageCost]) -> str:
    """Return costs as CSV with the columns `COLUMNS`."""
    rows = [{column: cell_of_value(getattr(cost, column)) for column in COLUMNS} for cost in costs]
    return run_table_text(rows, list(COLUMNS))


# ---------------------------------------------------------------------------------------------------------------------
# Extra rows

_HARMFUL, _GUIDE = "harmful", "guide"
_USES = {
    "alignment rows": ((_GUIDE, "alignment"),),
    "harmful rows": ((_HARMFUL, "paired"),),
    "refusals": ((_GUIDE, "paired"),),
    "paired safe and harmful rows": ((_GUIDE, "paired"), (_HARMFUL, "paired")),
    "benign rows": ((_GUIDE, "benign"),),
}
"""A text of `Defense.data` -> the columns that its rows count in, each with the pool of the rows."""


def _extra_rows(experiment: Experiment, defenses: Sequence[Defense]) -> tuple[int | None, int | None]:
    """Count the harmful rows and the guide rows that defenses may draw from; None if the data are not available.

    These are the pools that they declare. A defense with a parameter `rows` draws at most so many from each of them.
    """
    if not any(defense.data for defense in defenses):
        return 0, 0
    try:
        pools: Pools = plugin_pools(experiment)
    except HbvError:
        return None, None
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for defense in defenses:
        limit = getattr(defense, "rows", None)
        for use in (use for kind in defense.data for use in _USES.get(kind, ())):
            available = len(getattr(pools, use[1]))
            counts[use] = max(counts[use], min(available, limit) if isinstance(limit, int) else available)
    harmful, guides = (sum(count for use, count in counts.items() if use[0] == kind) for kind in (_HARMFUL, _GUIDE))
    return harmful, guides
