"""Report the steps of training stages to TensorBoard, Weights & Biases or MLflow: one run of the tracker per stage.

The callbacks of transformers send the values. Their environment variables apply (`WANDB_MODE=offline`,
`MLFLOW_TRACKING_URI`, ...); without them, everything is stored in one folder on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal, get_args

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput, HbvError, shortened, unknown_name
from harmbench_vaccine.core.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import TrainerCallback

Tracker = Literal["tensorboard", "wandb", "mlflow"]
PROJECT = "harmbench-vaccine"
_INSTALL = "pip install 'harmbench-vaccine[trackers]'"


@dataclass(frozen=True)
class TrackedStage:
    """A training stage, as a tracker shows it."""

    title: str
    """Name of the tracker's run."""
    key: str
    """Key of the stage's artifact; a stage that resumes continues the run of TensorBoard and Weights & Biases."""
    config: dict[str, Any]
    """The experiment and the settings of the stage; a tracker never receives rows or answers."""
    folder: Path
    """Folder of the trackers' files."""


def checked_trackers(written: Tracker | Sequence[Tracker] | None) -> list[Tracker]:
    """Return the trackers of an argument `report_to`.

    Raises:
        BadInput: It is not a tracker or a list of trackers.
    """
    if not isinstance(written, str | Sequence | None):
        raise BadInput(f"Argument report_to is {shortened(repr(written))}; allowed: a tracker, or a list of trackers.")
    names = [written] if isinstance(written, str) else list(written or ())
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", str(name), TRACKERS)
    return names


def check_trackers(names: Sequence[Tracker]) -> None:
    """Check that trackers can be used, before any work.

    Raises:
        BadInput: A package is missing, or Weights & Biases has no API key.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"--report-to {name} needs the package {name}: {_INSTALL}.")
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI") and not importlib.util.find_spec("sqlalchemy"):
        raise BadInput(f"--report-to mlflow needs a database: set MLFLOW_TRACKING_URI, or {_INSTALL}.")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        _check_wandb_key()


def _check_wandb_key() -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        key = wandb.login(prompt=False)
    except wandb.Error as error:
        raise BadInput(
            f"--report-to wandb cannot log in: {error} Correct WANDB_API_KEY, or set WANDB_MODE=offline."
        ) from error
    if not key:
        raise BadInput("--report-to wandb needs an API key: run `wandb login`, or set WANDB_MODE=offline.")


@contextmanager
def open_trackers(
    names: Sequence[Tracker], stage: TrackedStage, progress: Progress = SILENT
) -> Iterator[list[TrainerCallback]]:
    """Open a run of each tracker for one stage; the block receives the callbacks of the trainer.

    Only the first rank reports. Each tracker's run is closed as failed if the stage does not end.

    Args:
        names: The trackers.
        stage: The stage.
        progress: Receives the place where the run is shown.

    Raises:
        HbvError: A tracker cannot be reached, or it cannot write.
    """
    if not names or distributed.rank():
        yield []
        return
    stage.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as runs:
        callbacks = []
        for name in names:
            try:
                callback, place = runs.enter_context(_OPEN[name](stage))
            except Exception as error:  # each tracker has its own kinds
                raise HbvError(
                    f"Tracker {name} cannot start: {error} Correct its settings, or leave out --report-to {name}."
                ) from error
            callbacks.append(callback)
            progress.note(f"{name}: {place}")
        yield callbacks


@contextmanager
def _tensorboard(stage: TrackedStage) -> Iterator[tuple[TrainerCallback, str]]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    root = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or stage.folder / "tensorboard").expanduser()
    with SummaryWriter(str(root / f"{re.sub('[^0-9A-Za-z=._+-]+', '-', stage.title)}-{stage.key[:8]}")) as writer:
        writer.add_text("experiment", f"```json\n{json.dumps(stage.config, indent=1)}\n```")
        yield TensorBoardCallback(writer), f"tensorboard --logdir {quote(str(root))}"


@contextmanager
def _wandb(stage: TrackedStage) -> Iterator[tuple[TrainerCallback, str]]:
    import wandb
    from transformers.integrations import WandbCallback

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=stage.title,
        id=stage.key,
        resume="allow",
        dir=os.environ.get("WANDB_DIR", str(stage.folder)),
        config={"experiment": stage.config},
        settings=wandb.Settings(silent=True, console="off"),
    )
    exit_code = 1
    try:
        yield WandbCallback(), run.url or f"wandb sync {quote(str(Path(run.dir).parent))}"
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


@contextmanager
def _mlflow(stage: TrackedStage) -> Iterator[tuple[TrainerCallback, str]]:
    import mlflow
    from transformers.integrations import MLflowCallback

    for name in ("alembic", "mlflow"):  # they print every step of creating a database
        logging.getLogger(name).setLevel(logging.ERROR)
    with ExitStack() as cleanup:
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{stage.folder / 'mlflow.db'}")
            cleanup.callback(mlflow.set_tracking_uri, "")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        mlflow.start_run(run_name=stage.title)
        status = "FAILED"
        try:
            mlflow.log_params({f"experiment.{name}": value for name, value in stage.config.items()})
            yield MLflowCallback(), f"mlflow ui --backend-store-uri {quote(mlflow.get_tracking_uri())}"
            status = "FINISHED"
        finally:
            mlflow.end_run(status)


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
