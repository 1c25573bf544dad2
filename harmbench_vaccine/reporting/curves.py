"""Plot the training log of a run: the loss, the gradient norm and the learning rate of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import check_writable, ensure_writable

if TYPE_CHECKING:
    from pandas import DataFrame

FORMATS = (".svg", ".png", ".pdf")
_PANELS = {"loss": "loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
_WINDOW = 20
"""Steps of the moving average that is drawn over the values of single steps."""


def check_plot_path(path: Path) -> None:
    """Check that a plot can be written.

    Raises:
        BadInput: The ending is not that of a picture, or the folder is not writable.
    """
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"Unknown format of a plot {path.suffix or path.name!r}; allowed: {', '.join(FORMATS)}.")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name a file, such as {path / 'curves.svg'}.")
    check_writable(path.resolve().parent, "The folder of the plot")


def plot_curves(log: DataFrame, title: str, path: Path) -> None:
    """Write a picture with one column for each stage.

    Thin lines are the values of single steps, thick lines the average of the last 20 steps. The loss is the mean over
    micro-batches, the gradient norm is the one before clipping.

    Args:
        log: The rows of `evaluation.training_log.read_training_log`.
        title: The title of the picture.
        path: The file; its ending is the format.
    """
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(log["stage"]))
    figure = Figure(figsize=(1 + 4.2 * len(stages), 7), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(_PANELS), len(stages), squeeze=False, sharex="col")
    for column, stage in enumerate(stages):
        rows = log[log["stage"] == stage]
        for row, (name, label) in enumerate(_PANELS.items()):
            panel = axes[row][column]
            panel.plot(rows["step"], rows[name], color="#56b4e9", linewidth=0.8)
            if name != "learning_rate":
                averages = rows[name].rolling(_WINDOW, min_periods=1).mean()
                panel.plot(rows["step"], averages, color="#0072b2", linewidth=1.8)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            if column == 0:
                panel.set_ylabel(label, fontsize=9)
        axes[0][column].set_title(f"{stage}: {len(rows)} steps", fontsize=10)
    figure.supxlabel(f"optimizer step; thick lines: average of the last {_WINDOW} steps", fontsize=9)
    ensure_writable(path.resolve().parent, "The folder of the plot")
    figure.savefig(path)
