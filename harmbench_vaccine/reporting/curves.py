"""Plot the training log of a run: the loss, the gradient norm and the learning rate of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import check_writable

from .figures.style import ACCURACY, MUTED, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
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


@styled
def plot_curves(log: DataFrame, title: str) -> Figure:
    """Draw one column for each stage.

    Thin lines are the values of single steps, thick lines the average of the last 20 steps. The loss is the mean over
    micro-batches, the gradient norm is the one before clipping.

    Args:
        log: The rows of `evaluation.training_log.read_training_log`.
        title: The title of the picture.
    """
    stages = list(dict.fromkeys(log["stage"]))
    details = f"thin lines: single steps; thick lines: average of the last {_WINDOW} steps"
    figure = new_figure(1 + 4.2 * len(stages), 7, title, details)
    axes = figure.subplots(len(_PANELS), len(stages), squeeze=False, sharex="col")
    for column, stage in enumerate(stages):
        rows = log[log["stage"] == stage]
        for row, (name, label) in enumerate(_PANELS.items()):
            panel = axes[row][column]
            panel.plot(rows["step"], rows[name], color=ACCURACY, linewidth=0.7, alpha=0.55)
            if name != "learning_rate":
                averages = rows[name].rolling(_WINDOW, min_periods=1).mean()
                panel.plot(rows["step"], averages, color=ACCURACY, linewidth=1.8)
            if column == 0:
                panel.set_ylabel(label)
        axes[0][column].set_title(f"{stage}: {len(rows)} steps", loc="left")
    figure.supxlabel("optimizer step", fontsize=9, color=MUTED)
    return figure
