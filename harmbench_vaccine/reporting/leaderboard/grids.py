"""Arrange rankings as grids for tables and figures: a row is a defense, a column an attack, a task or a ratio."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harmbench_vaccine.core.hashing import canonical_json, digest

from .ranking import Ranking

Cell = dict[str, Any]
"""A row of a ranking, with its columns `COLUMNS`."""
PLACE = ("protocol", "protocol_hash", "model", "scorer")
"""The columns of a setting without which no two scores are comparable."""


@dataclass(frozen=True)
class Grid:
    """Rankings that share everything but one axis."""

    setting: dict[str, str]
    """The columns `PLACE`, and what else the rankings share: `task`, `attack`."""
    columns: dict[str, Ranking]
    """Title of a column -> the ranking with its cells."""
    ratios: tuple[float, ...] = ()
    """The harmful ratio p of each column, ascending; empty if the columns are not ratios."""
    selection: tuple[str, ...] = ()
    """The defenses to show, in their order; empty: all."""

    @property
    def defenses(self) -> list[str]:
        """The selected defenses, or all in the order in which they were run."""
        names = (item["defense"] for ranking in self.columns.values() for item in ranking.runs or ranking.rows)
        return list(self.selection or dict.fromkeys(names))

    @property
    def baseline(self) -> str | None:
        """The name of the baseline among the defenses."""
        names = (row["baseline"] for ranking in self.columns.values() for row in ranking.rows)
        return next((name for name in names if name), None)

    @property
    def title(self) -> str:
        """The shared setting, as text."""
        shared = " under ".join(self.setting[axis] for axis in ("task", "attack") if axis in self.setting)
        model = f"{self.setting['model']}, protocol {self.setting['protocol']}, judge {self.setting['scorer']}"
        return f"{shared}, {model}" if shared else model

    def cell(self, defense: str, column: str) -> Cell | None:
        """Return the cell of a defense in a column; None if it has no run there."""
        return next((row for row in self.columns[column].rows if row["defense"] == defense), None)

    def cells(self, defense: str) -> list[Cell | None]:
        """Return the cells of a defense in the order of the columns."""
        return [self.cell(defense, column) for column in self.columns]

    def average(self, defense: str, score: str) -> float:
        """Return the mean of a score over all columns; NaN if a cell is absent."""
        values = [cell[score] if cell else math.nan for cell in self.cells(defense)]
        return sum(values) / len(values)

    def runs_of(self, defense: str, column: str) -> list[dict[str, Any]]:
        """Return the runs of a defense in a column, one per seed."""
        return [run for run in self.columns[column].runs if run["defense"] == defense]


def cell_mark(cell: Cell) -> Literal["", "self-destruct", "collapsed", "hollow"]:
    """Return the reason why a cell has no rank, or an empty text."""
    if cell["collapsed_cells"]:
        return "self-destruct" if cell["self_destruct_cells"] == cell["collapsed_cells"] else "collapsed"
    return "hollow" if cell["hollow_cells"] else ""


def place_grids(rankings: Sequence[Ranking]) -> list[Grid]:
    """Return one grid per place, with one column for each combination of task and attack.

    A task or attack that all columns share is in the setting instead, except the attack of a single column.
    """
    grids = []
    for setting, group in _grouped(rankings, PLACE):
        values = {axis: {ranking.setting[axis] for ranking in group} for axis in ("task", "attack")}
        axes = [axis for axis in values if len(values[axis]) > 1] or ["attack"]
        columns = {", ".join(ranking.setting[axis] for axis in axes): ranking for ranking in group}
        shared = {axis: group[0].setting[axis] for axis in values if axis not in axes}
        grids.append(Grid(setting | shared, columns))
    return grids


def task_grids(rankings: Sequence[Ranking]) -> list[Grid]:
    """Return one grid per place and task, with a column for each attack."""
    return _grids(rankings, "task", "attack")


def paper_grids(rankings: Sequence[Ranking]) -> list[Grid]:
    """Return the grids of tables as papers print them.

    The columns are the tasks where a place has one attack and several tasks; otherwise there is one grid per task,
    with its attacks as columns.
    """
    grids = []
    for _, group in _grouped(rankings, PLACE):
        one_attack = len({ranking.setting["attack"] for ranking in group}) == 1
        axes = ("attack", "task") if one_attack and len(group) > 1 else ("task", "attack")
        grids += _grids(group, *axes)
    return grids


def ratio_grids(rankings: Sequence[Ranking]) -> list[Grid]:
    """Return one grid per place, task and attack, with a column for each ratio p.

    Attacks without a harmful ratio, and those with only one, are left out.
    """
    grids = []
    for grid in task_grids(rankings):
        by_rest: dict[str, dict[float, Ranking]] = {}
        for ranking in grid.columns.values():
            p, rest = harmful_ratio(ranking)
            if p is not None:
                by_rest.setdefault(rest, {})[p] = ranking
        for rest, by_ratio in by_rest.items():
            if len(by_ratio) > 1:
                ratios = tuple(sorted(by_ratio))
                columns = {f"p = {100 * p:g}%": by_ratio[p] for p in ratios}
                grids.append(Grid(grid.setting | ({"attack": rest} if rest else {}), columns, ratios))
    return grids


def harmful_ratio(ranking: Ranking) -> tuple[float | None, str]:
    """Return the harmful ratio of the attack of a ranking, and its other parameters as text."""
    params: dict[str, Any] = json.loads(ranking.rows[0]["attack_params"])
    ratio = params.get("ratio")
    p = ratio.pop("p", None) if isinstance(ratio, dict) else None
    rest = {name: values for name, values in params.items() if name != "ratio" or values}
    return p if isinstance(p, int | float) else None, canonical_json(rest) if rest else ""


def _grids(rankings: Sequence[Ranking], shared: str, axis: str) -> list[Grid]:
    return [
        Grid(setting, {ranking.setting[axis]: ranking for ranking in group})
        for setting, group in _grouped(rankings, (*PLACE, shared))
    ]


def _grouped(rankings: Iterable[Ranking], keys: Sequence[str]) -> list[tuple[dict[str, str], list[Ranking]]]:
    groups: dict[tuple[str, ...], list[Ranking]] = {}
    for ranking in rankings:
        groups.setdefault(tuple(ranking.setting[key] for key in keys), []).append(ranking)
    return [(dict(zip(keys, values, strict=True)), group) for values, group in groups.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Names of files


def file_names(grids: Sequence[Grid]) -> list[str]:
    """Return a part of a file name for each grid: the values of the setting in which the grids differ.

    A single grid has an empty name. The same settings always give the same names. Grids that differ in the hash of
    their protocol only have a digest in their names.
    """
    keys = ("protocol", "model", "scorer", "task", "attack")  # without the hash: the digest below replaces it
    varied = [key for key in keys if len({grid.setting.get(key) for grid in grids}) > 1]
    names = ["-".join(_slug(grid.setting[key]) for key in varied if key in grid.setting) for grid in grids]
    return [
        f"{name}-{digest(grid.setting, 6)}" if names.count(name) > 1 else name
        for grid, name in zip(grids, names, strict=True)
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:40]
