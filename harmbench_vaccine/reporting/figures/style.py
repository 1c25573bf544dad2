"""The style of all figures: fonts, colors that survive gray print and color blindness, labels at the ends of lines.

The same data give the same SVG, byte for byte: it has no date, and its ids have a fixed salt. Texts are drawn as
outlines, so that a figure looks the same without the fonts. No text is parsed as a formula: a name may contain `$`.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from harmbench_vaccine.core.errors import shortened
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.visible import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.lines import Line2D

P = ParamSpec("P")

INK, MUTED, GRAY, GRID = "#222222", "#555555", "#8a8a8a", "#e4e4e4"
"""Colors of titles, of labels, of the baseline, and of grid lines."""
HARM, ACCURACY = "#c44e00", "#0067a5"
"""Colors of the harmful score and of the finetune accuracy."""
PALE = {HARM: "#efbf9f", ACCURACY: "#a3c8e2"}
"""Colors of the same scores with default parameters, in a figure of tuned ones."""
LINE_STYLES = (
    ("#0067a5", "s"),
    ("#c44e00", "^"),
    ("#00805c", "D"),
    ("#a3478f", "v"),
    ("#8a6100", "h"),
    ("#2f93c8", "p"),
    ("#6b4fa0", "<"),
    ("#7d2a1e", ">"),
)
"""Color and marker of each line of a figure, after the palette of Okabe and Ito, darkened for text on white."""
BASELINE_STYLE = ("#3d3d3d", "o")

_PARAMETERS: Any = {  # Any: matplotlib lists every key in its type
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "svg.hashsalt": "harmbench-vaccine",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "axes.axisbelow": True,
    "axes.edgecolor": "#b0b0b0",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.dpi": 200,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}
_CHARACTERS = 13.0
"""Characters of the title in an inch."""
FORMATS = (".svg", ".png")
_NO_METADATA = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a function draw its figure in the common style."""

    @wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        from matplotlib import rc_context

        with rc_context(_PARAMETERS):
            return draw(*args, **kwargs)

    return draw_in_style


def save_figure(figure: Figure, *paths: Path) -> None:
    """Write a figure to files, each in the format of its ending, and create their folders if necessary.

    Raises:
        BadInput: The folder is not writable.
    """
    from matplotlib import rc_context

    for folder in {path.resolve().parent for path in paths}:
        ensure_writable(folder, "The folder of the figure")
    with rc_context(_PARAMETERS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name; it is drawn as a box
        for path in paths:
            figure.savefig(path, metadata=_NO_METADATA.get(path.suffix.lower()))
            figure.set_layout_engine("none")  # the next format has the same layout, which takes most of the time


def new_figure(width: float, height: float, title: str, *details: str) -> Figure:
    """Return an empty figure with a title of two or three lines.

    Args:
        width: In inches.
        height: In inches.
        title: The first line: the content of the figure.
        details: The parts of the other lines: the setting, the number of runs, the marks; empty ones are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    setting = "; ".join(visible(detail) for detail in details if detail)
    lines = [title, *textwrap.wrap(setting, int(_CHARACTERS * width), max_lines=2, placeholder=" ...")]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5)
    return figure


def panel_grid(figure: FigureBase, count: int, columns: int, **options: Any) -> list[Axes]:
    """Return panels in rows; the lowest one of each column has the numbers of the horizontal axis.

    Args:
        figure: The figure, or a part of it.
        count: Number of panels.
        columns: Panels in a row.
        options: Options of `subplots`.
    """
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False, **options)
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return panels[:count]


def write_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Write a legend under the panels, in as few rows as its names allow.

    Args:
        figure: The figure, with its final width.
        handles: Lines or marks with their names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for ncols in range(len(handles), 0, -1):
        legend = figure.legend(handles=list(handles), loc="outside lower left", ncols=ncols, fontsize=8)
        if ncols == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def short_name(name: str, length: int = 26) -> str:
    """Return the name of a plug-in for a label, shortened to a number of characters."""
    return shortened(visible(name).replace("\n", " "), length)


# ---------------------------------------------------------------------------------------------------------------------
# Labels at the ends of lines


class Label(NamedTuple):
    """A name to be written at the right of a panel, with the point that it names."""

    x: float
    y: float
    text: str
    color: str


def spread_labels(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move labels so that no two are closer than a gap, with the least sum of squared moves.

    With the heights in ascending order, y_i - i gap must not decrease: this is an isotonic regression.

    Args:
        heights: The wished heights, in any order.
        gap: The least distance of two labels.
        top: The greatest height; the least one is 0. Too many labels extend below 0.

    Returns:
        The heights in the order of `heights`.
    """
    import numpy as np
    from scipy.optimize import isotonic_regression

    if not heights:
        return []
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    ascending = isotonic_regression(np.asarray(heights, float)[order] - steps).x
    highest = top - steps[-1]
    positions = np.empty(len(heights))
    positions[order] = np.clip(ascending, min(0.0, highest), highest) + steps
    return [float(position) for position in positions]


def label_gap(fontsize: float) -> float:
    """Return the least distance of two labels in inches, for a font size in points."""
    return 1.25 * fontsize / 72


def write_labels(axes: Axes, labels: Sequence[Label], height: float, fontsize: float = 8) -> None:
    """Write names at the right of a panel, each with a thin line to its point.

    Args:
        axes: The panel; its limits are final.
        labels: The names.
        height: Approximate height of the panel, in inches.
        fontsize: In points.
    """
    shares = [_share(axes, label.y) for label in labels]
    for label, share in zip(labels, spread_labels(shares, label_gap(fontsize) / height, top=1.0), strict=True):
        axes.annotate(
            label.text,
            (label.x, label.y),
            (1.05, share),
            textcoords="axes fraction",
            color=label.color,
            fontsize=fontsize,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.color,
                "linewidth": 0.6,
                "alpha": 0.5,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def _share(axes: Axes, y: float) -> float:
    """Return the height of a value in a panel, from 0 to 1, also on a logarithmic axis."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        low, high, y = math.log(low), math.log(high), math.log(y)
    return min(1.0, max(0.0, (y - low) / (high - low)))
