"""The claims ledger: published figures next to measured scores, with a badge by a stated rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter
from rich.console import Group, RenderableType

from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.evaluation.result_text import interval_text, percent_text
from harmbench_vaccine.reporting.markdown import markdown_row
from harmbench_vaccine.reporting.published.comparison import PublishedComparison
from harmbench_vaccine.reporting.published.figures import Figure, load_figures
from harmbench_vaccine.reporting.published.matching import load_names
from harmbench_vaccine.reporting.render import Column, dim_notes, number_column, render_table

from .ranking import Ranking

Badge = Literal["reproduced", "differs", "not comparable", "not measured"]
RULE = (
    "reproduced: the 95% interval of measured minus published contains 0. differs: it does not. not comparable: a run "
    "collapsed or is hollow, or its protocol deviates from the paper's in a way that matters. not measured: no result"
)
"""The rule of the badges."""


class Twin(BaseModel):
    """The run that replaces that of a claim until the paper's protocol is run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str
    defense: str
    attack: str
    task: str

    def matches(self, row: dict[str, Any]) -> bool:
        """Return whether a row of a ranking is this run."""
        return all(row[column] == value for column, value in self)


class Claim(BaseModel):
    """A published figure that this harness tries to reproduce."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    figure: dict[str, str]
    """Columns of the published figures that select exactly one."""
    twin: Twin | None = None
    accepted: list[str] = []
    """Deviations that do not matter."""


@dataclass(frozen=True)
class LedgerRow:
    """A claim with its measurement; scores in percent, differences in points."""

    figure: Figure
    published: float
    measured: float | None = None
    low: float | None = None
    """Lower end of the 95% interval of the measured score."""
    high: float | None = None
    run: str = ""
    """Protocol, defense, attack and task of the measurement."""
    deviations: tuple[str, ...] = ()
    badge: Badge = "not measured"

    @property
    def difference(self) -> tuple[float, float, float] | None:
        """Measured minus published, with its 95% interval; papers print no interval, so theirs is taken as exact."""
        if self.measured is None or self.low is None or self.high is None:
            return None
        return self.measured - self.published, self.low - self.published, self.high - self.published

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON."""
        return {**asdict(self), "difference": self.difference}


@cache
def load_claims() -> tuple[Claim, ...]:
    """Read the claims of the ledger."""
    text = (files("harmbench_vaccine.published") / "claims.yaml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[Claim, ...]).validate_python(read_yaml(text, "claims.yaml"))


def claimed_figure(claim: Claim) -> Figure:
    """Return the figure of a claim.

    Raises:
        ValueError: No figure or several figures match.
    """
    (figure,) = (row for row in load_figures() if claim.figure.items() <= row.items())
    return figure


def claims_ledger(rankings: Sequence[Ranking]) -> list[LedgerRow]:
    """Compare every claim with rankings, which have their published comparisons; the paper's protocol comes first."""
    return [_ledger_row(claim, rankings) for claim in load_claims()]


def _ledger_row(claim: Claim, rankings: Sequence[Ranking]) -> LedgerRow:
    figure = claimed_figure(claim)
    score = next(score for score, metric in load_names().metrics.items() if metric == figure["metric"])
    row, deviations = _measurement(claim, figure, score, rankings)
    published = float(figure["value"])
    if row is None:
        return LedgerRow(figure, published)
    low, high = row[f"{score}_low"], row[f"{score}_high"]
    doubtful = bool(row["collapsed_cells"] or row["hollow_cells"])
    important = [text for text in deviations if text not in claim.accepted]
    run = ", ".join(str(row[column]) for column in ("protocol", "defense", "attack", "task"))
    return LedgerRow(
        figure, published, row[score], low, high, run, deviations, _badge(published, low, high, doubtful, important)
    )


def _measurement(
    claim: Claim, figure: Figure, score: str, rankings: Sequence[Ranking]
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the row that measures a figure and its deviations: under the paper's protocol, or else of the twin."""
    for row, comparison in _compared_rows(rankings):
        compared = comparison.scores.get(score)
        if compared and any(match.figure == figure for match in compared.figures):
            return row, comparison.deviations
    for row, _ in _compared_rows(rankings):
        if claim.twin and claim.twin.matches(row):
            return row, (f"{row['protocol']} has another model, other data and another judge than the paper",)
    return None, ()


def _compared_rows(rankings: Sequence[Ranking]) -> Iterator[tuple[dict[str, Any], PublishedComparison]]:
    for ranking in rankings:
        yield from zip(ranking.rows, ranking.published, strict=True)


def _badge(published: float, low: float, high: float, doubtful: bool, deviations: Sequence[str]) -> Badge:
    """Return the badge by `RULE`."""
    if doubtful or deviations or math.isnan(low) or math.isnan(high):
        return "not comparable"
    return "reproduced" if low <= published <= high else "differs"


# ---------------------------------------------------------------------------------------------------------------------
# Views

LEDGER_COLUMNS = [
    Column("paper", wrap=False),
    Column("table", drop=3, least=8),
    Column("defense"),
    Column("task", drop=2),
    Column("score", wrap=False),
    number_column("published"),
    Column("measured %"),
    Column("difference", drop=1),
    Column("badge", wrap=False),
]


def ledger_view(rows: Sequence[LedgerRow]) -> RenderableType:
    """Show the ledger in the terminal."""
    return Group(render_table(LEDGER_COLUMNS, map(ledger_cells, rows)), *dim_notes(ledger_notes(rows)))


def ledger_markdown(rows: Sequence[LedgerRow]) -> str:
    """Return the ledger as Markdown."""
    lines = [markdown_row([column.title for column in LEDGER_COLUMNS]), markdown_row(["---"] * len(LEDGER_COLUMNS))]
    return "\n".join(
        [*lines, *(markdown_row(ledger_cells(row)) for row in rows), "", *(f"- {note}" for note in ledger_notes(rows))]
    )


def ledger_notes(rows: Sequence[LedgerRow]) -> list[str]:
    """Return the rule of the badges, and each deviation with the runs that have it."""
    deviations: dict[str, dict[str, None]] = {}
    for row in rows:
        for text in row.deviations:
            deviations.setdefault(text, {})[row.run] = None
    return [f"{RULE}.", *(f"{text} ({'; '.join(runs)})." for text, runs in deviations.items())]


def ledger_cells(row: LedgerRow) -> list[str]:
    """Return the texts of a row, one for each of `LEDGER_COLUMNS`."""
    figure, difference = row.figure, row.difference
    setting = [figure[column] for column in ("paper", "table", "defense")]
    setting.append(f"{figure['task']} {figure['sweep']}={figure['sweep_value']}")
    measured = changed = ""
    if difference and row.measured is not None and row.low is not None and row.high is not None:
        measured = percent_text(row.measured, (row.low, row.high))
        changed = f"{difference[0]:+.1f} {interval_text(*difference[1:], '+')}"
    return [*setting, figure["metric"], figure["value"], measured, changed, row.badge]
