"""Compare measured scores with the figures that papers print for the same experiment.

One comparison covers a defense under an attack over all its seeds. The interval of the measured score is that of the
ranking, or else by the seeds of the defense alone; papers print no intervals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.dispersion import SeedShares, pool_dispersion
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.result_text import percent_text
from harmbench_vaccine.evaluation.results_csv import csv_row
from harmbench_vaccine.experiment.protocol import Protocol, load_protocol

from ..render import Column, VisibleText, dim_notes, number_column, render_table
from .deviations import list_deviations
from .matching import FigureQuery, MatchedFigure, load_names, matching_figures

SCORES = {"harmful_score": "HS", "finetune_accuracy": "FA"}


@dataclass(frozen=True)
class ComparedFigure:
    """A measured score with its published figures, the most direct evidence first; percent."""

    measured: float
    low: float
    high: float
    figures: tuple[MatchedFigure, ...]

    @property
    def difference(self) -> float:
        """Measured minus published score."""
        return self.measured - self.figures[0].value

    @property
    def inside(self) -> bool:
        """True if the published figure is inside the interval of the measured score."""
        return self.low <= self.figures[0].value <= self.high

    @property
    def alternatives(self) -> tuple[MatchedFigure, MatchedFigure] | None:
        """The lowest and the highest further figure for the same experiment, or None."""
        ordered = sorted(self.figures[1:], key=lambda figure: figure.value)
        return (ordered[0], ordered[-1]) if ordered else None

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON."""
        best = self.figures[0]
        return {
            "value": best.value,
            "printed": best.figure["value"],
            "difference": self.difference,
            "interval": [self.low, self.high],
            "inside": self.inside,
            **{column: best.figure[column] for column in ("paper", "arxiv", "table", "defense", "evidence", "note")},
            "doubts": list(best.doubts),
            "others": {
                "count": len(self.figures) - 1,
                "range": [figure.value for figure in self.alternatives] if self.alternatives else None,
            },
        }


@dataclass(frozen=True)
class PublishedComparison:
    """A defense under an attack, with the published figures for it."""

    setting: dict[str, str]
    """Protocol, model, task, attack and defense, as the results name them."""
    seeds: tuple[int, ...]
    collapsed: bool
    scores: dict[str, ComparedFigure] = field(default_factory=dict)
    """Score -> comparison, for each score that has a figure."""
    deviations: tuple[str, ...] = ()
    """Differences between the runs and the paper's setup."""
    no_figure: str = ""
    """The reason why no figure is available; empty if one is."""

    def to_json(self) -> dict[str, Any]:
        """Return the value of `published` in the JSON of a result."""
        return {
            **{score: self.scores[score].to_json() if score in self.scores else None for score in SCORES},
            "deviations": list(self.deviations),
            "none": self.no_figure,
        }

    def to_columns(self) -> dict[str, Any]:
        """Return the comparison as one row with the columns `COLUMNS`; None without a figure."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        for score, compared in self.scores.items():
            best, extremes = compared.figures[0], compared.alternatives
            row |= {
                f"published_{score}": best.value,
                f"published_{score}_difference": compared.difference,
                f"published_{score}_inside": compared.inside,
                f"published_{score}_source": f"{best.figure['paper']}, {best.figure['table']}",
                f"published_{score}_evidence": best.figure["evidence"],
                f"published_{score}_doubts": "; ".join(_caveats(best)),
                f"published_{score}_others": len(compared.figures) - 1,
                f"published_{score}_others_low": extremes[0].value if extremes else None,
                f"published_{score}_others_high": extremes[1].value if extremes else None,
            }
        return row | {"published_deviations": "; ".join(self.deviations), "published_none": self.no_figure}


COLUMNS = {
    column: text
    for score, name in SCORES.items()
    for column, text in {
        f"published_{score}": f"{name} that a paper prints for this experiment, %; empty if none does",
        f"published_{score}_difference": "measured minus published",
        f"published_{score}_inside": "whether the published figure is inside the interval",
        f"published_{score}_source": "paper and table",
        f"published_{score}_evidence": "how the figure was read",
        f"published_{score}_doubts": "doubts whether the figure is for this experiment, and notes on it",
        f"published_{score}_others": "number of further figures for the same experiment",
        f"published_{score}_others_low": "the lowest of them",
        f"published_{score}_others_high": "the highest",
    }.items()
} | {
    "published_deviations": "differences between the runs and the paper's setup",
    "published_none": "reason why no figure is available",
}
"""The columns that `hbv leaderboard --published` adds to `leaderboard.csv`."""


# ---------------------------------------------------------------------------------------------------------------------
# From results to comparisons


def compare_results(results: Sequence[Result]) -> list[PublishedComparison]:
    """Compare the results of `hbv run` with published figures.

    Returns:
        One comparison per defense, attack, task and model, over its seeds, in the order of the first result of each.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        key = repr([result.model, result.task, result.attack_params, result.defense_params])
        row = {**csv_row(result), "spec": result.spec}
        groups.setdefault(key, {})[result.run] = row
    return [compare_rows(list(rows.values()), _run_protocol(next(iter(rows.values())))) for rows in groups.values()]


def compare_rows(
    rows: Sequence[Mapping[str, Any]],
    protocol: Protocol | None = None,
    intervals: Mapping[str, tuple[float, float, float]] | None = None,
) -> PublishedComparison:
    """Compare one defense under one attack, over its seeds, with published figures.

    Args:
        rows: Rows of a CSV of results, one per seed, with parameters as JSON values.
        protocol: Protocol of the runs with the user's changes, if known; None loads the shipped file of that name.
        intervals: Score -> mean over the seeds and the ends of its 95% interval; None: from these rows alone.
    """
    first = rows[0]
    setting = {column: str(first[column]) for column in ("protocol", "model", "task", "attack", "defense")}
    seeds = tuple(sorted({int(row["seed"]) for row in rows}))
    comparison = PublishedComparison(setting, seeds, any(row["collapsed"] for row in rows))
    paper = load_names().protocols.get(setting["protocol"])
    if paper is None:
        return replace(comparison, no_figure=f"protocol {setting['protocol']!r} is not a paper's protocol")
    protocol = protocol or _shipped_protocol(setting["protocol"], first["scorer"])
    task = re.split("[:=]", setting["task"])[0]  # the parameters name a judge, which a paper's task does not have
    query = FigureQuery(
        setting["protocol"],
        setting["model"],
        task,
        first["defense_params"],
        first["attack_params"],
        protocol.finetune.of(task).samples,
    )
    try:
        figures = matching_figures(query)
    except LookupError as error:
        return replace(comparison, no_figure=str(error))
    scores = {}
    for score in SCORES:
        if figures_of_score := tuple(figure for figure in figures if figure.score == score):
            measured = intervals[score] if intervals else _interval(rows, score)
            scores[score] = ComparedFigure(*measured, figures_of_score)
    deviations = [*list_deviations(paper, protocol, rows, figures[0])]
    deviations += [text for figure in figures for text in figure.deviations]
    return replace(comparison, scores=scores, deviations=tuple(dict.fromkeys(deviations)))


def _interval(rows: Sequence[Mapping[str, Any]], score: str) -> tuple[float, float, float]:
    """Return the mean over seeds and the ends of its 95% interval, by the spread between these seeds."""
    if len(rows) == 1:
        row = rows[0]
        return float(row[score]), float(row[f"{score}_low"]), float(row[f"{score}_high"])
    cell = SeedShares(tuple(row[score] / 100 for row in rows), max(1, min(int(row[f"{score}_n"]) for row in rows)))
    estimate = pool_dispersion([cell]).score(cell)
    return 100 * estimate.value, 100 * estimate.low, 100 * estimate.high


def _shipped_protocol(name: str, scorer: str) -> Protocol:
    """Load a paper's protocol file, with the judge that the rows name."""
    protocol = load_protocol(name)
    return protocol.model_copy(update={"score": protocol.score.model_copy(update={"scorer": scorer})})


def _run_protocol(result: Mapping[str, Any]) -> Protocol | None:
    """Return the protocol of a result with the user's values and data; None if it is not a paper's protocol."""
    if result["protocol"] not in load_names().protocols:
        return None
    spec = result["spec"]
    protocol = load_protocol(spec["protocol"]).replaced(spec["values"])
    score = protocol.score.model_copy(update={"scorer": result["scorer"]})
    return protocol.model_copy(update={"data": {**protocol.data, **spec["data"]}, "score": score})


# ---------------------------------------------------------------------------------------------------------------------
# Views

_SETTING = ("model", "task", "attack", "defense")
_COLUMNS = {
    "seeds": number_column("seeds", drop=2),
    "measured %": Column("measured %", fold_last=True),
    "published": Column("published", wrap=False),
    "diff.": number_column("diff."),
    "table": Column("table", drop=4, least=8),
    "evidence": Column("evidence", drop=3, least=8),
    "others": Column("others", wrap=False, drop=1),
}
"""How the columns of a comparison fit into a narrow terminal."""
_LEGEND = (
    "diff.: measured minus published. inside: whether the published figure is inside the 95% interval of the measured "
    "score; papers print no intervals. "
    "others: further figures for the same experiment, from other tables."
)


@dataclass(frozen=True)
class ComparisonSheet:
    """Comparisons as a table of texts: a title with the shared setting, a head, rows, and notes."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def comparison_sheet(comparisons: Sequence[PublishedComparison]) -> ComparisonSheet:
    """Arrange comparisons as a table, one row per score.

    The title states the setting that all rows share. Without any figure, the sheet has only notes.
    """
    compared = [comparison for comparison in comparisons if comparison.scores]
    varied = [
        key for key in _SETTING if key == "defense" or len({comparison.setting[key] for comparison in compared}) > 1
    ]
    marks: dict[str, int] = {}
    rows = []
    for comparison in compared:
        setting = [comparison.setting[key] for key in varied]
        setting[-1] += " (collapsed)" if comparison.collapsed else ""
        for name, score in comparison.scores.items():
            rows.append([*setting, str(len(comparison.seeds)), *_score_cells(name, score, marks)])
    title = ""
    if compared:
        figure = next(iter(compared[0].scores.values())).figures[0].figure
        shared = [compared[0].setting[key] for key in _SETTING if key not in varied]
        title = f"Published and measured: {figure['paper']} (arXiv {figure['arxiv']}, {figure['venue']})"
        title += f": {', '.join(shared)}" if shared else ""
    head = [*varied, "seeds", "score", "measured %", "published", "diff.", "inside", "table", "evidence", "others"]
    notes = [_LEGEND] if compared else []
    notes += [f"[{number}] {text}." for text, number in marks.items()]
    return ComparisonSheet(
        title, head, rows, [*notes, *_deviation_notes(compared), *_missing_figure_notes(comparisons)]
    )


def _score_cells(name: str, score: ComparedFigure, marks: dict[str, int]) -> list[str]:
    """Return the cells of one score; `marks` numbers the caveats and grows by new ones."""
    best, extremes = score.figures[0], score.alternatives
    numbers = [str(marks.setdefault(text, len(marks) + 1)) for text in _caveats(best)]
    alternatives = ""
    if extremes:
        low, high = (figure.figure["value"] for figure in extremes)
        alternatives = f"{len(score.figures) - 1}: {low if low == high else f'{low} to {high}'}"
    return [
        SCORES[name],
        percent_text(score.measured, (score.low, score.high)),
        best.figure["value"] + (f" [{','.join(numbers)}]" if numbers else ""),
        f"{score.difference:+.1f}",
        "yes" if score.inside else "no",
        best.figure["table"],
        best.figure["evidence"],
        alternatives,
    ]


def _caveats(figure: MatchedFigure) -> list[str]:
    """Return the doubts whether a figure is for this experiment, then the note printed with it."""
    return [*figure.doubts, *filter(None, [figure.figure["note"]])]


def _deviation_notes(comparisons: Sequence[PublishedComparison]) -> list[str]:
    """Return one note with every deviation once; a deviation of some defenses names them."""
    defenses: dict[str, list[str]] = {}
    for comparison in comparisons:
        for text in comparison.deviations:
            defenses.setdefault(text, []).append(comparison.setting["defense"])
    deviations = [
        text if len(names) == len(comparisons) else f"{', '.join(dict.fromkeys(names))}: {text}"
        for text, names in defenses.items()
    ]
    return [f"Deviations from the paper: {'; '.join(deviations)}."] if deviations else []


def _missing_figure_notes(comparisons: Sequence[PublishedComparison]) -> list[str]:
    """Return one note per reason for a missing figure, with the experiments that it applies to."""
    reasons: dict[str, list[str]] = {}
    for comparison in comparisons:
        if not comparison.scores:
            experiment = f"{comparison.setting['defense']} under {comparison.setting['attack']}"
            reasons.setdefault(comparison.no_figure, []).append(experiment)
    if len(reasons) == 1 and not any(comparison.scores for comparison in comparisons):
        return [f"No published figure: {reason}." for reason in reasons]
    return [
        f"No published figure for {', '.join(dict.fromkeys(experiments))}: {reason}."
        for reason, experiments in reasons.items()
    ]


def comparison_view(comparisons: Sequence[PublishedComparison]) -> RenderableType:
    """Show comparisons in the terminal."""
    sheet = comparison_sheet(comparisons)
    if not sheet.rows:
        return Group(*dim_notes(sheet.notes))
    columns = [_COLUMNS.get(title, Column(title, least=10)) for title in sheet.head]
    return Group(VisibleText(sheet.title, style="bold"), render_table(columns, sheet.rows), *dim_notes(sheet.notes))
