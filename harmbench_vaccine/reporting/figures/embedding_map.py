"""Map of the embeddings of alignment rows before and after the user stage, by PCA and, with scikit-learn, by t-SNE."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from .style import ACCURACY, GRAY, HARM, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_PERPLEXITY = 30.0
"""Of t-SNE; smaller for few rows."""


def has_tsne() -> bool:
    """Return whether scikit-learn, which computes t-SNE, is installed."""
    return find_spec("sklearn") is not None


@styled
def plot_embeddings(before: NDArray, after: NDArray, subtitle: str) -> Figure:
    """Draw each row twice, before and after the user stage, with a line between the two.

    Args:
        before: Embeddings by the aligned model, rows x width.
        after: The same rows by the final model.
        subtitle: The run.
    """
    import numpy as np

    title = f"Embeddings of {len(before)} alignment rows, in the last attention block"
    figure = new_figure(9.0 if has_tsne() else 5.6, 5.0, title, subtitle)
    panels = figure.subplots(1, 2 if has_tsne() else 1, squeeze=False)[0]
    both = np.concatenate([before, after]).astype(float)
    points, shares = principal_components(both)
    _draw_points(panels[0], points)
    for axis, share, number in zip((panels[0].xaxis, panels[0].yaxis), shares, (1, 2), strict=True):
        axis.set_label_text(f"principal component {number} ({100 * share:.0f}% of the variance)")
    if has_tsne():
        _draw_points(panels[1], _tsne(both))
        panels[1].set(xlabel="t-SNE 1", ylabel="t-SNE 2")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=2)
    return figure


def principal_components(rows: NDArray) -> tuple[NDArray, NDArray]:
    """Project rows on their first two principal components.

    The sign of a component is the one that makes its largest coordinate positive, so that a figure can be repeated.

    Args:
        rows: Rows x width.

    Returns:
        Rows x 2, and the share of the variance of both components.
    """
    import numpy as np

    centered = rows - rows.mean(0)
    left, scales, _ = np.linalg.svd(centered, full_matrices=False)
    points = left[:, :2] * scales[:2]
    points *= np.sign(points[np.abs(points).argmax(0), [0, 1]])
    return points, scales[:2] ** 2 / max((scales**2).sum(), np.finfo(float).tiny)


def _tsne(rows: NDArray) -> NDArray:
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    points: NDArray = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)
    return points


def _draw_points(axes: Axes, points: NDArray) -> None:
    """Draw the first half of the points as `before` and the second half as `after`."""
    before, after = points[: len(points) // 2], points[len(points) // 2 :]
    axes.plot(*zip(before.T, after.T, strict=True), color=GRAY, alpha=0.25, linewidth=0.7, zorder=1)
    for half, color, marker, label in ((before, ACCURACY, "o", "aligned model"), (after, HARM, "^", "final model")):
        axes.scatter(half[:, 0], half[:, 1], s=20, color=color, marker=marker, linewidths=0, label=label, zorder=2)
