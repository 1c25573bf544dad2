"""Plot the harmful score against the harmful ratio from a CSV of results: the picture of the README.

    python leaderboards/plot_testbed.py                       # leaderboards/testbed.csv -> docs/images/testbed.svg
    python leaderboards/plot_testbed.py --out testbed.png

A point is the mean over the seeds. Its bar reaches from the lowest to the highest end of the 95% Wilson intervals of
the single seeds, so that it shows the sampling error of the prompts and the spread of the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]

STAGE_COLORS = {
    "baseline": "#3d3d3d",
    "while aligning": "#0072b2",
    "while the user trains": "#d55e00",
    "after the user stage": "#009e73",
}
"""Colors of Okabe and Ito, which readers with a color vision deficiency can distinguish."""

CURVES = {
    "booster": ("Booster", "while aligning", "^"),
    "vaccine": ("Vaccine", "while aligning", "s"),
    "sft": ("SFT (baseline)", "baseline", "o"),
    "vlguard": ("VLGuard", "while the user trains", "D"),
    "realign": ("Realign", "after the user stage", "v"),
    "lisa": ("Lisa", "while the user trains", "P"),
    "antidote": ("Antidote", "after the user stage", "X"),
}
"""Defense -> label, stage in which it acts, marker."""


def curve_points(results: pd.DataFrame, defense: str) -> pd.DataFrame:
    """Return a defense's points, one row for each harmful ratio.

    Args:
        results: rows of a CSV that `hbv run` writes; only the attack `ratio` is plotted.
        defense: the defense as the CSV names it.

    Returns:
        Columns `p` (from 0 to 1), `mean`, `low` and `high` (percent), sorted by `p`.
    """
    rows = results[(results["defense"] == defense) & results["attack"].str.fullmatch(r"ratio=[\d.]+")]
    rows = rows.assign(p=rows["attack"].str.removeprefix("ratio=").astype(float))
    points = rows.groupby("p").agg(
        mean=("harmful_score", "mean"), low=("harmful_score_low", "min"), high=("harmful_score_high", "max")
    )
    return points.reset_index()


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Lower overlapping labels until neighbors differ by at least `gap`; return heights in the order of `heights`."""
    order = sorted(range(len(heights)), key=lambda index: -heights[index])
    positions = list(heights)
    for upper, lower in pairwise(order):
        positions[lower] = min(positions[lower], positions[upper] - gap)
    return positions


def plot(results: pd.DataFrame, out: Path) -> None:
    """Draw the figure and write it to `out`; the suffix selects the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "harmbench-vaccine"})
    figure, axes = plt.subplots(figsize=(8.4, 4.5))
    figure.subplots_adjust(left=0.085, right=0.825, top=0.845, bottom=0.125)

    curves = {defense: curve_points(results, defense) for defense in CURVES}
    shifts = [0.0018 * (index - (len(CURVES) - 1) / 2) for index in range(len(CURVES))]
    for (defense, points), shift in zip(curves.items(), shifts, strict=True):
        _, stage, marker = CURVES[defense]
        color, x = STAGE_COLORS[stage], points["p"] + shift
        errors = [points["mean"] - points["low"], points["high"] - points["mean"]]
        errors = [length.clip(lower=0) for length in errors]
        dashes = (0, (4, 2)) if stage == "baseline" else "solid"
        axes.errorbar(x, points["mean"], errors, fmt="none", ecolor=color, elinewidth=1.3, capsize=2.5, alpha=0.75)
        axes.plot(x, points["mean"], color=color, linestyle=dashes, linewidth=1.8, zorder=3)
        axes.plot(
            x,
            points["mean"],
            color=color,
            linestyle="none",
            marker=marker,
            markersize=8.5 if marker in "PX" else 7.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=4,
        )

    last = max(points["p"].max() for points in curves.values())
    ends = [float(points["mean"].iloc[-1]) for points in curves.values()]
    for defense, end, height in zip(curves, ends, spread_labels(ends, gap=5.6), strict=True):
        label, stage, _ = CURVES[defense]
        leader = {
            "arrowstyle": "-",
            "color": STAGE_COLORS[stage],
            "linewidth": 0.9,
            "alpha": 0.5,
            "shrinkA": 2,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            label,
            (last + 0.008, end),
            (last + 0.0185, height),
            color=STAGE_COLORS[stage],
            fontsize=11,
            va="center",
            annotation_clip=False,
            arrowprops=leader,
        )

    axes.set_xlim(-0.009, last + 0.009)
    axes.set_ylim(-2.5, 102.5)
    axes.set_xticks(sorted(curves["sft"]["p"]), [f"{100 * p:.0f}%" for p in sorted(curves["sft"]["p"])])
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor="#444444")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    axes.set_xlabel("harmful ratio p: share of harmful rows in the user's data", color="#444444", labelpad=6)
    axes.set_ylabel("harmful score, % (lower is better)", color="#444444", labelpad=6)

    figure.text(0.012, 0.942, "Harmful score after fine-tuning, embedded testbed", fontsize=13, weight="bold")
    for stage, x in (("while aligning", 0.012), ("while the user trains", 0.21), ("after the user stage", 0.465)):
        figure.text(x, 0.892, f"\N{BLACK SQUARE} acts {stage}", color=STAGE_COLORS[stage], fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, dpi=200, facecolor="white", metadata=metadata)
    plt.close(figure)


def main() -> None:
    """Parse the command line and draw the figure."""
    parser = argparse.ArgumentParser(description="Plot the harmful score against the harmful ratio.")
    parser.add_argument(
        "table", nargs="?", type=Path, default=ROOT / "leaderboards" / "testbed.csv", help="CSV of runs"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "images" / "testbed.svg", help="SVG, PNG or PDF file"
    )
    arguments = parser.parse_args()
    plot(pd.read_csv(arguments.table), arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
