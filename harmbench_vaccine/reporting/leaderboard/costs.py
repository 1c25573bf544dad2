"""The cost of each defense next to that of the baseline: medians over the runs of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.core.progress import format_duration
from harmbench_vaccine.core.types import STAGES
from harmbench_vaccine.evaluation.results_csv import cell_of_value, run_table_text
from harmbench_vaccine.reporting.markdown import markdown_row, markdown_text
from harmbench_vaccine.reporting.render import (
    Column,
    TableGroup,
    VisibleText,
    dim_notes,
    number_column,
    render_table,
    score_column,
)
from harmbench_vaccine.reporting.store_views import readable_size

from .ranking import Ranking
from .stage_costs import StageCost

_PLACE = ("protocol", "protocol_hash", "model")
_COUNTS = ("steps", "peak_memory", "harmful_rows", "guide_rows")
_MEASURES = ("seconds_per_step", "seconds", "training_seconds", "peak_memory")
COLUMNS = {
    "protocol": "name of the protocol",
    "protocol_hash": "hash of everything that the protocol fixes",
    "model": "base model",
    "device": "device on which the runs ended",
    "defense": "defense as in the ranking",
    "baseline": "defense that ratios are computed against; empty if it was not run on the device",
    "stage": "training stage: one in which the defense acts, or any stage of the baseline",
    "runs": "number of runs, over which all values are medians",
    "steps": "optimizer steps of the stage",
    "passes": "forward and backward passes of each batch",
    "seconds_per_step": "seconds of an optimizer step; empty for a stage without steps",
    "seconds_per_step_ratio": "relative to the same stage of the baseline",
    "seconds": "seconds of the stage",
    "seconds_ratio": "relative to the same stage of the baseline",
    "training_seconds": "seconds of all training stages of a run",
    "training_seconds_ratio": "relative to the baseline",
    "peak_memory": "peak memory of the stage in bytes",
    "peak_memory_ratio": "relative to the same stage of the baseline",
    "harmful_rows": "harmful rows that the defense may draw from in addition to the rows of the stage",
    "guide_rows": "rows without harmful answers that it may draw from in addition",
}
"""The columns of `cost-table.csv`: one row for each protocol, model, device, defense and stage; empty: not measured."""


@dataclass(frozen=True)
class CostTable:
    """The costs of the defenses of one protocol and model on one device."""

    setting: dict[str, str]
    """The columns `protocol`, `protocol_hash`, `model` and `device`."""
    baseline: str | None
    """The defense that ratios are computed against; None if it was not run on the device."""
    rows: list[dict[str, Any]]
    """The columns `COLUMNS`; None marks a value that was not measured."""

    @property
    def title(self) -> str:
        """The setting that the rows share."""
        setting = self.setting
        return (
            f"Cost of training, {setting['model']} on {setting['device']} "
            f"(protocol {setting['protocol']} {setting['protocol_hash']})"
        )

    @property
    def notes(self) -> list[str]:
        """Notes that a reader of the rows needs."""
        runs = sorted({row["runs"] for row in self.rows})
        count = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
        ratios = f"Relative to {self.baseline} in brackets. " if self.baseline else "No ratios: without the baseline. "
        return [
            f"Medians over {count} {'run' if runs == [1] else 'runs'} of a defense. {ratios}Times depend on the load "
            "of the machine."
        ]


def cost_tables(rankings: Sequence[Ranking], costs: Iterable[StageCost]) -> list[CostTable]:
    """Summarize the measured costs of the runs of rankings, one table for each protocol, model and device.

    The rows are in the order of the runs. A defense has a row for each training stage in which it acts; the baseline,
    and a defense whose own stage is skipped, for each stage that it trains.

    Args:
        rankings: The rankings.
        costs: The costs of their runs; those of other runs are left out.
    """
    by_run: dict[str, list[StageCost]] = {}
    for cost in costs:
        if cost.stage in STAGES:
            by_run.setdefault(cost.run, []).append(cost)
    groups: dict[tuple[str, ...], dict[str, list[list[StageCost]]]] = {}
    baselines = {row["baseline"] for ranking in rankings for row in ranking.rows}
    for ranking in rankings:
        for run in ranking.runs:
            if stages := by_run.pop(run["run"], []):
                place = (*(ranking.setting[column] for column in _PLACE), stages[0].device or "an unknown device")
                groups.setdefault(place, {}).setdefault(run["defense"], []).append(stages)
    return [
        _table(place, runs, next((name for name in runs if name in baselines), None)) for place, runs in groups.items()
    ]


def _table(place: Sequence[str], runs: Mapping[str, list[list[StageCost]]], baseline: str | None) -> CostTable:
    """Summarize the runs of each defense; a run is the list of its training stages."""
    setting = dict(zip((*_PLACE, "device"), place, strict=True))
    summaries = {defense: _summaries(stages) for defense, stages in runs.items()}
    reference = summaries[baseline] if baseline else {}
    rows = []
    for defense, summary in summaries.items():
        acting = [stage for stage, row in summary.items() if row["acts"] is not False]
        for stage in acting if acting and defense != baseline else summary:
            row = summary[stage]
            ratios = {f"{name}_ratio": _ratio(row[name], reference.get(stage, {}).get(name)) for name in _MEASURES}
            total = next(iter(reference.values()))["training_seconds"] if reference else None
            ratios["training_seconds_ratio"] = _ratio(row["training_seconds"], total)
            values = {**setting, **row, **ratios, "defense": defense, "baseline": baseline, "stage": stage}
            rows.append({column: values[column] for column in COLUMNS})
    return CostTable(setting, baseline, rows)


def _summaries(runs: Sequence[list[StageCost]]) -> dict[str, dict[str, Any]]:
    """Return the medians over the runs of a defense: training stage -> column -> value."""
    summaries: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        costs = [cost for run in runs for cost in run if cost.stage == stage]
        if costs:
            summaries[stage] = {
                "acts": costs[-1].acts,
                "runs": len(costs),
                "passes": costs[-1].passes,
                **{name: _median(getattr(cost, name) for cost in costs) for name in ("seconds_per_step", "seconds")},
                **{name: _whole(_median(getattr(cost, name) for cost in costs)) for name in _COUNTS},
                "training_seconds": _median(math.fsum(cost.seconds for cost in run) for run in runs),
            }
    return summaries


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values; None if one of them was not measured."""
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return median(known) if len(known) == len(numbers) else None


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


# ---------------------------------------------------------------------------------------------------------------------
# Views


def cost_rows(tables: Sequence[CostTable]) -> list[dict[str, Any]]:
    """Return the rows of all tables, with the columns `COLUMNS`."""
    return [row for table in tables for row in table.rows]


def cost_table_text(tables: Sequence[CostTable]) -> str:
    """Return the rows of all tables as CSV."""
    cells = [{column: cell_of_value(value) for column, value in row.items()} for row in cost_rows(tables)]
    return run_table_text(cells, list(COLUMNS))


COST_COLUMNS = (
    Column("defense"),
    Column("stage", legend="training stage in which the defense acts; every stage of the baseline"),
    number_column("steps", drop=2),
    Column("passes", drop=4, legend="forward (F) and backward (B) passes of each batch"),
    score_column("s/step", legend="seconds of an optimizer step"),
    number_column("stage time", drop=1, legend="time of the stage"),
    score_column("training time", legend="time of all training stages of a run"),
    score_column("memory", legend="peak memory of the stage"),
    number_column("harmful", legend="harmful rows that the defense may draw from in addition to the rows of the stage"),
    number_column("guides", legend="rows without harmful answers that it may draw from in addition"),
)


def cost_tables_view(tables: Sequence[CostTable]) -> RenderableType:
    """Show the costs of the defenses in the terminal."""
    parts: list[RenderableType] = []
    for table in tables:
        cells = render_table(COST_COLUMNS, map(cost_cells, table.rows))
        parts += [VisibleText(table.title, style="bold"), cells, *dim_notes(table.notes), VisibleText()]
    return TableGroup(*parts)


def cost_tables_markdown(tables: Sequence[CostTable]) -> str:
    """Return the tables of `cost_tables_view` as Markdown."""
    if not tables:
        return ""
    lines = ["", "## Costs", "", *(f"- {column.title}: {column.legend}." for column in COST_COLUMNS if column.legend)]
    for table in tables:
        lines += ["", f"### {markdown_text(table.title)}", "", markdown_row([column.title for column in COST_COLUMNS])]
        lines += [markdown_row(["---:" if column.right else "---" for column in COST_COLUMNS])]
        lines += [*(markdown_row(cost_cells(row)) for row in table.rows), ""]
        lines += [f"- {markdown_text(note)}" for note in table.notes]
    return "".join(f"{line}\n" for line in lines)


def cost_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row, one for each of `COST_COLUMNS`; ratios of the baseline, which are 1, are left out."""
    steps, step_seconds, memory = row["steps"], row["seconds_per_step"], row["peak_memory"]

    def with_ratio(text: str, measure: str) -> str:
        ratio = row[f"{measure}_ratio"]
        return text if ratio is None or row["defense"] == row["baseline"] else f"{text} ({ratio:.2f}x)"

    return [
        row["defense"],
        row["stage"],
        str(steps or "-"),
        row["passes"] or "-",
        with_ratio("-" if step_seconds is None else f"{step_seconds:.3g}", "seconds_per_step"),
        *(with_ratio(format_duration(row[measure]), measure) for measure in ("seconds", "training_seconds")),
        with_ratio("-" if memory is None else readable_size(memory), "peak_memory"),
        *("-" if row[column] is None else str(row[column]) for column in ("harmful_rows", "guide_rows")),
    ]
