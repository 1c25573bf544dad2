"""The sections of the page of a leaderboard that do not follow its filters: heat maps, cost, and what failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harmbench_vaccine.core.progress import format_duration

from .grids import Cell, Grid, cell_mark, task_grids
from .ranking import SETTING, Ranking


@dataclass(frozen=True)
class UnfinishedRuns:
    """The runs of suites that have no result yet."""

    runs: tuple[str, ...] = ()
    """Defense, attack, task and seed of each run."""
    failed_stages: tuple[str, ...] = ()
    """One sentence for each stage that failed too often, with its last error."""

    def __add__(self, other: UnfinishedRuns) -> UnfinishedRuns:
        """Return the runs and stages of both."""
        return UnfinishedRuns(self.runs + other.runs, self.failed_stages + other.failed_stages)


ALL_FINISHED = UnfinishedRuns()
SIGNS = {"": "", "collapsed": "†", "hollow": "‡", "self-destruct": "§"}
"""The sign of a marked cell in a heat map."""


@dataclass(frozen=True)
class HeatCell:
    """A harmful score in a heat map."""

    text: str
    shade: int
    """The score in tenths, from 0 to 10; -1 for a cell without a run."""


@dataclass(frozen=True)
class HeatMap:
    """The harmful scores of every defense under every attack, in one setting."""

    title: str
    attacks: list[str]
    rows: dict[str, list[HeatCell]]
    """Defense -> its cell under each attack; the lowest mean is first, and defenses with a marked cell are last."""


def heat_maps(rankings: Sequence[Ranking]) -> list[HeatMap]:
    """Return one heat map for each protocol, model, judge and task."""
    return [HeatMap(grid.title, list(grid.columns), _heat_rows(grid)) for grid in task_grids(rankings)]


def _heat_rows(grid: Grid) -> dict[str, list[HeatCell]]:
    cells = {defense: grid.cells(defense) for defense in grid.defenses}
    order = sorted(cells, key=lambda defense: _heat_key([cell for cell in cells[defense] if cell]))
    return {defense: [_heat_cell(cell) for cell in cells[defense]] for defense in order}


def _heat_cell(cell: Cell | None) -> HeatCell:
    if cell is None:
        return HeatCell("–", -1)
    return HeatCell(f"{cell['harmful_score']:.1f}{SIGNS[cell_mark(cell)]}", round(cell["harmful_score"] / 10))


def _heat_key(cells: Sequence[Cell]) -> tuple[bool, float]:
    """Return a sort key of the cells of a defense: one of them is marked, their mean."""
    return any(map(cell_mark, cells)), sum(cell["harmful_score"] for cell in cells) / len(cells)


# ---------------------------------------------------------------------------------------------------------------------
# Cost


@dataclass(frozen=True)
class DefenseCost:
    """The declared and the measured cost of a defense."""

    defense: str
    passes: str
    memory: str
    extra_rows: str
    seconds: float | None
    """Time of all stages of a run, mean over the runs; None if a run lacks it."""
    ratio: float | None
    """`seconds` divided by those of the baseline."""

    @property
    def cells(self) -> list[str]:
        """The fields as texts, in their order."""
        seconds = "–" if self.seconds is None else format_duration(self.seconds)
        ratio = "–" if self.ratio is None else f"× {self.ratio:.2f}"
        return [self.defense, self.passes, self.memory, self.extra_rows, seconds, ratio]


def defense_costs(rankings: Sequence[Ranking], facts: Mapping[str, Mapping[str, Any]]) -> list[DefenseCost]:
    """Return the cost of every defense.

    Args:
        rankings: The rankings.
        facts: Defense -> its declared `passes`, `memory` and `extra_rows`.
    """
    means = {name: _mean_seconds(rankings, name) for name in facts}
    baseline = next((row["baseline"] for ranking in rankings for row in ranking.rows if row["baseline"]), "")
    return [
        DefenseCost(
            name,
            **{key: declared[key] for key in ("passes", "memory", "extra_rows")},
            seconds=means[name],
            ratio=_ratio(means[name], means.get(baseline)),
        )
        for name, declared in facts.items()
    ]


def _ratio(seconds: float | None, baseline: float | None) -> float | None:
    return seconds / baseline if seconds and baseline else None


def _mean_seconds(rankings: Sequence[Ranking], defense: str) -> float | None:
    seconds = [run["seconds"] for ranking in rankings for run in ranking.runs if run["defense"] == defense]
    if any(value is None or math.isnan(value) for value in seconds):
        return None
    return sum(seconds) / len(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Combinations without a run


def missing_combinations(rankings: Sequence[Ranking]) -> tuple[list[str], int]:
    """Compare the runs with all combinations of defenses, attacks and seeds of each protocol, model, judge and task.

    Returns:
        One sentence for each cell that lacks runs, and the number of combinations.
    """
    sentences, total = [], 0
    places: dict[tuple[str, ...], list[Ranking]] = {}
    for ranking in rankings:
        places.setdefault(tuple(ranking.setting[key] for key in SETTING if key != "attack"), []).append(ranking)
    for group in places.values():
        defenses = dict.fromkeys(run["defense"] for ranking in group for run in ranking.runs)
        seeds = sorted({int(run["seed"]) for ranking in group for run in ranking.runs})
        total += len(group) * len(defenses) * len(seeds)
        for ranking in group:
            for defense in defenses:
                present = {int(run["seed"]) for run in ranking.runs if run["defense"] == defense}
                if lacking := [str(seed) for seed in seeds if seed not in present]:
                    label = "seed" if len(lacking) == 1 else "seeds"
                    setting = ranking.setting
                    sentences.append(
                        f"{defense} under {setting['attack']} on {setting['task']}: {label} {', '.join(lacking)}"
                    )
    return sentences, total
