"""Draw the picture of the README: HS and FA of a few defenses against the harmful ratio, from a CSV of results.

python docs/plot_testbed.py                   # leaderboards/testbed.csv -> docs/images/testbed.svg
python docs/plot_testbed.py --out testbed.png
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from harmbench_vaccine.reporting.figures.ratio_curves import plot_scores
from harmbench_vaccine.reporting.figures.style import save_figure
from harmbench_vaccine.reporting.leaderboard.grids import ratio_grids
from harmbench_vaccine.reporting.leaderboard.ranking import rank_results

ROOT = Path(__file__).parents[1]
DEFENSES = ("sft", "booster", "vaccine", "vlguard", "realign", "lisa", "antidote")
"""Defenses that show the range of outcomes."""


def plot_readme(table: Path, out: Path) -> None:
    """Draw the figure and write it; the ending of the file selects the format.

    The intervals are those of the table with all of its defenses.
    """
    (grid,) = ratio_grids(rank_results([table]))
    save_figure(plot_scores(replace(grid, selection=DEFENSES)), out)


def main() -> None:
    """Parse the command line and draw the figure."""
    parser = argparse.ArgumentParser(description="Draw HS and FA against the harmful ratio.")
    parser.add_argument(
        "table", nargs="?", type=Path, default=ROOT / "leaderboards" / "testbed.csv", help="CSV of runs"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "images" / "testbed.svg", help="SVG, PNG or PDF file"
    )
    arguments = parser.parse_args()
    plot_readme(arguments.table, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
