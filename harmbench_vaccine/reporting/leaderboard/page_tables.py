"""The sections of the page of a leaderboard that are tables of texts: the same tables as in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harmbench_vaccine.reporting.published.comparison import comparison_sheet
from harmbench_vaccine.reporting.render import Column, number_column

from .claims import LEDGER_COLUMNS, claims_ledger, ledger_cells, ledger_notes
from .costs import COST_COLUMNS, CostTable, cost_cells
from .page_sections import defense_costs
from .ranking import Ranking
from .tuned import TUNED_COLUMNS, tuned_cells, tuned_pairs
from .worst_case import GRID_COLUMNS, settings_grids, worst_case_cells


@dataclass(frozen=True)
class TextTable:
    """A table of texts, with a title above it and notes below it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TableSection:
    """A section of the page."""

    key: str
    """A word for its address in the page."""
    title: str
    lead: str
    tables: Sequence[TextTable]

    @property
    def legend(self) -> list[str]:
        """The explanations of the columns of its tables, each once."""
        columns = [column for table in self.tables for column in table.columns if column.legend]
        return list(dict.fromkeys(f"{column.title}: {column.legend}." for column in columns))


def table_sections(
    rankings: Sequence[Ranking], facts: Mapping[str, Mapping[str, Any]], costs: Sequence[CostTable] = ()
) -> list[TableSection]:
    """Return the sections that have a table.

    Args:
        rankings: The rankings, with their published comparisons.
        facts: Defense -> its declared `passes`, `memory` and `extra_rows`.
        costs: The measured costs of the defenses.
    """
    sections = (
        tuned_section(rankings),
        worst_case_section(rankings),
        claims_section(rankings),
        published_section(rankings),
        cost_section(rankings, facts, costs),
    )
    return [section for section in sections if section.tables]


def tuned_section(rankings: Sequence[Ranking]) -> TableSection:
    """Return the scores with default and with tuned parameters, and the budget of the tuning."""
    return TableSection(
        "tuned",
        "Default and tuned parameters",
        "hbv tune chose one parameter of each defense, on other seeds and on prompts that no result uses. The runs and "
        "the time are what this choice took.",
        [TextTable(pair.title, TUNED_COLUMNS, list(map(tuned_cells, pair.rows))) for pair in tuned_pairs(rankings)],
    )


def worst_case_section(rankings: Sequence[Ranking]) -> TableSection:
    """Return the worst harmful score of each defense over the settings of the user."""
    return TableSection(
        "worst",
        "Worst case over the settings of the user",
        "A user who wants a harmful model may try several learning rates and numbers of epochs. A defense is as good "
        "as its worst harmful score over these settings.",
        [
            TextTable(grid.title, GRID_COLUMNS, list(map(worst_case_cells, grid.worst)), grid.notes)
            for grid in settings_grids(rankings)
        ],
    )


def claims_section(rankings: Sequence[Ranking]) -> TableSection:
    """Return the claims of papers that these runs measure."""
    ledger = claims_ledger(rankings)
    measured = [row for row in ledger if row.badge != "not measured"]
    title = f"{len(measured)} of the {len(ledger)} claims of the ledger"
    return TableSection(
        "claims",
        "Claims of papers",
        "Each row is a figure that a paper prints, and what these runs measure for it. The difference is measured "
        "minus published, in points, with the 95% interval of the measurement.",
        [TextTable(title, LEDGER_COLUMNS, list(map(ledger_cells, measured)), ledger_notes(measured))] * bool(measured),
    )


def published_section(rankings: Sequence[Ranking]) -> TableSection:
    """Return all figures that papers print for the experiments of the rankings."""
    sheets = [comparison_sheet(ranking.published) for ranking in rankings]
    return TableSection(
        "published",
        "Published and measured",
        "All figures that a paper prints for the same experiment, and how these runs deviate from its setup.",
        [
            TextTable(sheet.title, [Column(title) for title in sheet.head], sheet.rows, sheet.notes)
            for sheet in sheets
            if sheet.rows
        ],
    )


_DECLARED_COLUMNS = (
    Column("defense"),
    Column("passes", legend="forward (F) and backward (B) passes of each batch"),
    Column("extra memory"),
    Column("extra rows", legend="rows that it uses in addition to those of the baseline"),
    number_column("time", legend="of all stages of a run as measured, mean over all runs; it includes answers"),
    number_column("of baseline", legend="time divided by that of the baseline"),
)


def cost_section(
    rankings: Sequence[Ranking], facts: Mapping[str, Mapping[str, Any]], costs: Sequence[CostTable]
) -> TableSection:
    """Return the measured cost of the stages of each defense, and what each defense declares."""
    declared = TextTable(
        "What each defense declares, and the time of a run",
        _DECLARED_COLUMNS,
        [cost.cells for cost in defense_costs(rankings, facts)],
        ["Time depends on the machine and on its other work."],
    )
    measured = [TextTable(table.title, COST_COLUMNS, list(map(cost_cells, table.rows)), table.notes) for table in costs]
    return TableSection(
        "cost",
        "Cost",
        "What a defense costs the provider: passes of the model, time, memory and rows.",
        [*measured, declared],
    )
