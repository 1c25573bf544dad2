"""The training log of a stored run: the loss, the gradient norm and the learning rate of every optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.jsonl import parse_json
from harmbench_vaccine.experiment.artifacts import LOG

from .records import require_keys
from .result import Result

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("stage", "step", "loss", "grad_norm", "learning_rate")


def read_training_log(result: Result) -> DataFrame:
    """Return the log of a run's training stages, in their order.

    Args:
        result: The result of the run; the logs are read from the artifacts that it names.

    Returns:
        One row for each optimizer step: `stage` ("align" or "finetune"), `step` (from 1), `loss` (mean over
        micro-batches), `grad_norm` (before clipping) and `learning_rate`. Without a training stage it is empty.

    Raises:
        BadInput: An earlier version stored the run, without the keys of its artifacts.
        HbvError: An artifact was deleted from the store, or is damaged.
    """
    from pandas import DataFrame

    require_keys(result)
    rows = []
    for stage, record in result.stages.items():
        artifact = record.artifacts.get(stage)
        if artifact is None or record.steps in (None, 0):
            continue
        path = Path(artifact.path) / LOG
        try:
            rows += [{"stage": stage, **step} for step in parse_json(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            raise HbvError(
                f"The log of the {stage} stage of {result.run} cannot be read ({error}). Repeat the run's command."
            ) from error
    return DataFrame(rows, columns=list(COLUMNS))
