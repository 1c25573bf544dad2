"""Default and tuned parameters side by side: two rankings whose protocols differ in parameters of defenses only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.core.progress import format_duration
from harmbench_vaccine.reporting.markdown import markdown_row, markdown_text
from harmbench_vaccine.reporting.render import Column, TableGroup, VisibleText, dim_notes, number_column, render_table

from .grids import Grid
from .ranking import SETTING, Ranking

_PLACE = tuple(column for column in SETTING if column not in ("protocol", "protocol_hash"))
"""The columns that both rankings share."""
SCORES = ("harmful_score", "finetune_accuracy", "refusal_rate")
COLUMNS = {
    "default_protocol": "protocol before the tuning",
    "tuned_protocol": "protocol with the tuned parameters",
    **dict.fromkeys(_PLACE, "as in the ranking"),
    "defense": "defense as on the command line",
    "tuned_params": "parameters that the tuning changed, JSON; empty if it kept the defaults",
    **{
        f"{score}{end}": f"{score} of the {kind}"
        for score in SCORES
        for end, kind in (("", "default"), ("_tuned", "tuned parameters"))
    },
    "rank": "rank among the default parameters; empty if a run collapsed or is hollow",
    "rank_tuned": "rank among the tuned parameters",
    "tuning_runs": "number of runs that chose its parameters",
    "tuning_seconds": "time of these runs; a stage of several runs counts once",
}
"""The columns of `TunedPair.rows`."""


@dataclass(frozen=True)
class TunedPair:
    """The rankings of one setting with default and with tuned parameters."""

    default: Ranking
    tuned: Ranking

    @property
    def title(self) -> str:
        """The setting and both protocols."""
        setting, tuned = self.default.setting, self.tuned.setting
        return (
            f"Default and tuned parameters: {setting['attack']} on {setting['task']}, {setting['model']} "
            f"(protocols {setting['protocol']} and {tuned['protocol']}, judge {setting['scorer']})"
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row with the columns `COLUMNS` for each defense of both rankings, in the order of the tuned one."""
        defaults = {row["defense"]: row for row in self.default.rows}
        return [self._row(defaults[row["defense"]], row) for row in self.tuned.rows if row["defense"] in defaults]

    def _row(self, default: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
        run = next(run for run in self.tuned.runs if run["defense"] == tuned["defense"])
        return {
            "default_protocol": self.default.setting["protocol"],
            "tuned_protocol": self.tuned.setting["protocol"],
            **{column: self.tuned.setting[column] for column in _PLACE},
            "defense": tuned["defense"],
            "tuned_params": tuned_changes(default, tuned),
            **{f"{score}{end}": row[score] for score in SCORES for end, row in (("", default), ("_tuned", tuned))},
            "rank": default["rank"],
            "rank_tuned": tuned["rank"],
            "tuning_runs": int(run["tuning_runs"]),
            "tuning_seconds": float(run["tuning_seconds"]),
        }


def tuned_pairs(rankings: Sequence[Ranking]) -> list[TunedPair]:
    """Return the rankings with tuned parameters, each with the one before the tuning, where both are present."""
    by_place = {_place(ranking, ranking.setting["protocol_hash"]): ranking for ranking in rankings}
    pairs = []
    for ranking in rankings:
        untuned_hash = ranking.runs[0]["untuned_hash"]
        if untuned_hash and (default := by_place.get(_place(ranking, untuned_hash))):
            pairs.append(TunedPair(default, ranking))
    return pairs


def tuned_grids(grids: Sequence[Grid]) -> list[tuple[Grid, Grid]]:
    """Return the grid before the tuning and the grid with tuned parameters, where both are present."""

    def place(grid: Grid, protocol_hash: str) -> str:
        return canonical_json({**grid.setting, "protocol": "", "protocol_hash": protocol_hash})

    by_place = {place(grid, grid.setting["protocol_hash"]): grid for grid in grids}
    pairs = []
    for grid in grids:
        untuned_hash = next(iter(grid.columns.values())).runs[0]["untuned_hash"]
        if untuned_hash and (default := by_place.get(place(grid, untuned_hash))):
            pairs.append((default, grid))
    return pairs


def _place(ranking: Ranking, protocol_hash: str) -> tuple[str, ...]:
    return (protocol_hash, *(ranking.setting[column] for column in _PLACE))


def tuned_changes(default: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Return `parameter` -> tuned value, for the parameters that differ; of several defenses `defense.parameter`.

    Args:
        default: The row of a defense in the ranking before the tuning.
        tuned: Its row in the ranking with tuned parameters.
    """
    before, after = json.loads(default["defense_params"]), json.loads(tuned["defense_params"])
    return {
        key if len(after) == 1 else f"{name}.{key}": value
        for name, params in after.items()
        for key, value in params.items()
        if value != before.get(name, {}).get(key)
    }


TUNED_COLUMNS = (
    Column("defense"),
    Column("tuned"),
    number_column("HS %", legend="with the default parameters, mean over seeds"),
    number_column("tuned HS %", legend="with the tuned parameters; hollow and collapsed cells are marked"),
    number_column("FA %", drop=2),
    number_column("tuned FA %", drop=2),
    number_column("refused %", drop=1),
    number_column("tuned refused %", drop=1),
    number_column("runs", legend="number of tuning runs"),
    number_column("time", drop=3, legend="time of the tuning runs"),
)
_NOTE = (
    "The parameters were chosen on other seeds and on prompts that no result uses. Scores of one row may be compared: "
    "the protocols differ in parameters of defenses only."
)


def tuned_view(pairs: Sequence[TunedPair]) -> RenderableType:
    """Show default and tuned parameters side by side, one table for each setting."""
    parts: list[RenderableType] = []
    for pair in pairs:
        table = render_table(TUNED_COLUMNS, [tuned_cells(row) for row in pair.rows])
        parts += [VisibleText(pair.title, style="bold"), table, *dim_notes([_NOTE]), VisibleText()]
    return TableGroup(*parts)


def tuned_markdown(pairs: Sequence[TunedPair]) -> str:
    """Return the tables of `tuned_view` as Markdown."""
    lines = []
    for pair in pairs:
        lines += ["", f"## {markdown_text(pair.title)}", "", markdown_row([column.title for column in TUNED_COLUMNS])]
        lines += [markdown_row(["---:" if column.right else "---" for column in TUNED_COLUMNS])]
        lines += [*(markdown_row(tuned_cells(row)) for row in pair.rows), "", markdown_text(_NOTE)]
    return "".join(f"{line}\n" for line in lines)


def tuned_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row of a pair, one for each of `TUNED_COLUMNS`."""
    return [
        row["defense"],
        ", ".join(f"{key}={value}" for key, value in row["tuned_params"].items()),
        *(_score(row, score, end) for score in SCORES for end in ("", "_tuned")),
        str(row["tuning_runs"]),
        format_duration(row["tuning_seconds"]),
    ]


def _score(row: Mapping[str, Any], score: str, end: str) -> str:
    value = row[f"{score}{end}"]
    if value is None or math.isnan(value):
        return ""
    is_unranked = score == "harmful_score" and row[f"rank{end}"] is None
    return f"{value:.1f}{' unranked' if is_unranked else ''}"
