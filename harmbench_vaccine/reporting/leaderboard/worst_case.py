"""The worst harmful score of each defense over the training settings that a user may choose (attack `optimizer`).

A defense does not know the settings of the user, so that its score against a user who tries several is the worst of
them. Runs at the settings of the protocol are not part of it. A point with a collapsed or hollow run does not count:
its harmful score is not that of a working model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.evaluation.result_text import percent_text
from harmbench_vaccine.reporting.markdown import markdown_row, markdown_text
from harmbench_vaccine.reporting.render import Column, TableGroup, VisibleText, dim_notes, number_column, render_table

from .ranking import SETTING, Ranking

OPTIMIZER = "optimizer"
"""The attack whose parameters are the points of a grid."""
_BIAS = "The largest of several means is biased upward; its interval is that of its point alone."


@dataclass(frozen=True)
class WorstCase:
    """The worst point of one defense."""

    row: dict[str, Any]
    """The row of the worst point, with the columns of a ranking; that of the largest harmful score."""
    points: int
    """Number of points that count."""
    doubtful: int
    """Number of points with a collapsed or hollow run."""


@dataclass(frozen=True)
class SettingsGrid:
    """Rankings that differ only in the settings of the user."""

    setting: dict[str, str]
    """The columns `SETTING`; `attack` without the settings."""
    points: int
    """Number of different settings."""
    worst: tuple[WorstCase, ...]
    """One entry for each defense with a point that counts, the lowest harmful score first."""
    without: tuple[str, ...]
    """Defenses of which no point counts."""

    @property
    def title(self) -> str:
        """The grid and what its points share."""
        setting = self.setting
        return (
            f"Worst of {self.points} settings of the user: {setting['attack']} on {setting['task']}, "
            f"{setting['model']} (protocol {setting['protocol']} {setting['protocol_hash']}, judge {setting['scorer']})"
        )

    @property
    def notes(self) -> list[str]:
        """The notes below the table: its bias, and what is missing."""
        notes = [_BIAS]
        for case in self.worst:
            missing = self.points - case.points - case.doubtful
            if case.doubtful or missing:
                notes.append(
                    f"{case.row['defense']}: {case.points} of {self.points} settings count; {case.doubtful} have a "
                    f"collapsed or hollow run, {missing} have no result."
                )
        return notes + [f"{defense}: every setting has a collapsed or hollow run." for defense in self.without]


def settings_grids(rankings: Sequence[Ranking]) -> list[SettingsGrid]:
    """Return the grids of settings in rankings: groups of at least two that differ only in the attack `optimizer`."""
    groups: dict[tuple[str, ...], list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        params = json.loads(ranking.rows[0]["attack_params"])
        if params.pop(OPTIMIZER, None) is not None:
            place = (ranking.setting[column] for column in SETTING if column != "attack")
            groups[*place, canonical_json(params)].append(ranking)
    return [_grid(group) for group in groups.values() if len(group) > 1]


def _grid(rankings: Sequence[Ranking]) -> SettingsGrid:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in (row for ranking in rankings for row in ranking.rows):
        rows[row["defense"]].append(row)
    counted = {defense: [row for row in points if row["rank"] is not None] for defense, points in rows.items()}
    worst = [
        WorstCase(max(points, key=lambda row: row["harmful_score"]), len(points), len(rows[defense]) - len(points))
        for defense, points in counted.items()
        if points
    ]
    others = json.loads(rankings[0].rows[0]["attack_params"])
    del others[OPTIMIZER]
    attack = "+".join(f"{name}:{_params_text(params, ',')}" for name, params in others.items())
    return SettingsGrid(
        {**rankings[0].setting, "attack": attack or "no other attack"},
        len(rankings),
        tuple(sorted(worst, key=lambda case: (case.row["harmful_score"], case.row["defense"]))),
        tuple(defense for defense, points in counted.items() if not points),
    )


def _settings_text(row: dict[str, Any]) -> str:
    """Return the settings of the user in a row of a ranking, such as `lr=1e-05, epochs=5`."""
    return _params_text(json.loads(row["attack_params"])[OPTIMIZER], ", ")


def _params_text(params: dict[str, Any], separator: str) -> str:
    """Return the parameters that are set."""
    is_set = {key: value for key, value in params.items() if value is not None and value is not False}
    return separator.join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in is_set.items()
    )


GRID_COLUMNS = (
    Column("defense"),
    number_column("worst HS %", legend="largest harmful score over the settings, with the 95% interval there"),
    Column("settings there"),
    number_column("FA % there"),
    number_column("settings", legend="number of settings that count"),
)


def settings_grids_view(grids: Sequence[SettingsGrid]) -> RenderableType:
    """Show the worst harmful score of each defense, one table for each grid."""
    parts: list[RenderableType] = []
    for grid in grids:
        table = render_table(GRID_COLUMNS, map(worst_case_cells, grid.worst))
        parts += [VisibleText(grid.title, style="bold"), table, *dim_notes(grid.notes), VisibleText()]
    return TableGroup(*parts)


def settings_grids_markdown(grids: Sequence[SettingsGrid]) -> str:
    """Return the tables of `settings_grids_view` as Markdown."""
    lines = []
    for grid in grids:
        lines += ["", f"## {markdown_text(grid.title)}", "", markdown_row([column.title for column in GRID_COLUMNS])]
        lines += [markdown_row(["---:" if column.right else "---" for column in GRID_COLUMNS])]
        lines += [*(markdown_row(worst_case_cells(case)) for case in grid.worst), ""]
        lines += [f"- {markdown_text(note)}" for note in grid.notes]
    return "".join(f"{line}\n" for line in lines)


def worst_case_cells(case: WorstCase) -> list[str]:
    """Return the texts of the worst point of a defense, one for each of `GRID_COLUMNS`."""
    row = case.row
    score, low, high = (row[f"harmful_score{end}"] for end in ("", "_low", "_high"))
    return [
        row["defense"],
        percent_text(score, (low, high)),
        _settings_text(row),
        f"{row['finetune_accuracy']:.1f}",
        str(case.points),
    ]
