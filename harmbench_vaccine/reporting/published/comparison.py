"""The published cell beside the measured one: difference, whether it lies inside the interval, and what was done in
another way.

A cell here is what a ranking has one row for: a defense under an attack, over its seeds. The interval is Wilson's over
the prompts for one seed, and the t-interval over seeds for several; papers print none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harmbench_vaccine.evaluation.statistics import mean_interval
from harmbench_vaccine.experiment.protocol import Protocol, load_protocol

from .deviations import list_deviations
from .matching import FigureQuery, MatchedFigure, load_names, matching_figures

SCORES = {"harmful_score": "HS", "finetune_accuracy": "FA"}


@dataclass(frozen=True)
class ComparedFigure:
    """A measured score and the figures that papers print for it, the best evidenced first; percent."""

    measured: float
    low: float
    high: float
    figures: tuple[MatchedFigure, ...]

    @property
    def difference(self) -> float:
        """Measured less published."""
        return self.measured - self.figures[0].value

    @property
    def inside(self) -> bool:
        """Whether the published figure lies in the interval of the measured score."""
        return self.low <= self.figures[0].value <= self.high

    @property
    def others(self) -> tuple[MatchedFigure, MatchedFigure] | None:
        """The lowest and the highest of the other figures of the same cell."""
        ordered = sorted(self.figures[1:], key=lambda known: known.value)
        return (ordered[0], ordered[-1]) if ordered else None

    def json(self) -> dict[str, Any]:
        """The comparison as plain JSON."""
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
                "range": [known.value for known in self.others] if self.others else None,
            },
        }


@dataclass(frozen=True)
class PublishedComparison:
    """A cell with what is published of it."""

    place: dict[str, str]
    """Protocol, model, task, attack and defense, as the cell names them."""
    seeds: tuple[int, ...]
    collapsed: bool
    compared: dict[str, ComparedFigure] = field(default_factory=dict)
    """Score -> its comparison, of the scores that have a figure."""
    deviations: tuple[str, ...] = ()
    """What was done in another way than in the paper."""
    none: str = ""
    """Why there is no figure."""

    def json(self) -> dict[str, Any]:
        """What stands under `published` in the JSON of a result."""
        return {
            **{score: self.compared[score].json() if score in self.compared else None for score in SCORES},
            "deviations": list(self.deviations),
            "none": self.none,
        }

    def columns(self) -> dict[str, Any]:
        """The same as one row: the columns `COLUMNS`, None where there is no figure."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        for score, compared in self.compared.items():
            best = compared.figures[0]
            low, high = [known.value for known in compared.others] if compared.others else (None, None)
            row |= {
                f"{score}_low": compared.low,
                f"{score}_high": compared.high,
                f"published_{score}": best.value,
                f"published_{score}_difference": compared.difference,
                f"published_{score}_inside": compared.inside,
                f"published_{score}_source": f"{best.figure['paper']}, {best.figure['table']}",
                f"published_{score}_evidence": best.figure["evidence"],
                f"published_{score}_doubts": "; ".join(_remarks(best)),
                f"published_{score}_others": len(compared.figures) - 1,
                f"published_{score}_others_low": low,
                f"published_{score}_others_high": high,
            }
        return row | {"published_deviations": "; ".join(self.deviations), "published_none": self.none}


COLUMNS = {
    column: text
    for score, name in SCORES.items()
    for column, text in {
        f"{score}_low": "lower end of the 95% interval: over prompts for one seed, over seeds for several",
        f"{score}_high": "upper end",
        f"published_{score}": f"{name} that a paper prints for this cell, %; empty where none does",
        f"published_{score}_difference": "measured less published",
        f"published_{score}_inside": "whether the published one lies in the interval",
        f"published_{score}_source": "paper and table",
        f"published_{score}_evidence": "how the figure was read",
        f"published_{score}_doubts": "why it may not be this cell, and what must be known to use it",
        f"published_{score}_others": "number of other figures of the same cell",
        f"published_{score}_others_low": "the lowest of them",
        f"published_{score}_others_high": "the highest",
    }.items()
} | {
    "published_deviations": "what was done in another way than in the paper",
    "published_none": "why there is no figure",
}
"""The columns that `hbv leaderboard --published` adds to `leaderboard.csv`."""


# ---------------------------------------------------------------------------------------------------------------------
# From cells to comparisons


def compare_results(results: Sequence[Mapping[str, Any]]) -> list[PublishedComparison]:
    """The results of `hbv run`, those that differ in the seed alone as one cell, in the order of the first of each."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        key = repr([result[name] for name in ("model", "task", "attack_params", "defense_params")])
        ends = {
            f"{score}_{end}": value
            for score in SCORES
            for end, value in zip(("low", "high"), result[f"{score}_ci"], strict=True)
        }
        row = {**result, **ends, "collapsed": result["validity"]["collapsed"]}
        cells.setdefault(key, {})[result["run"]] = row
    return [compare_rows(list(rows.values()), _protocol_of(next(iter(rows.values())))) for rows in cells.values()]


def compare_rows(rows: Sequence[Mapping[str, Any]], ran: Protocol | None = None) -> PublishedComparison:
    """One cell over its seeds: rows of a CSV of results, with their parameters as JSON values.

    `ran` is the protocol that they ran under, as far as one knows; None: the file of that name.
    """
    first = rows[0]
    place = {column: str(first[column]) for column in ("protocol", "model", "task", "attack", "defense")}
    seeds = tuple(sorted({int(row["seed"]) for row in rows}))
    plain = PublishedComparison(place, seeds, any(row["collapsed"] for row in rows))
    paper = load_names().protocols.get(place["protocol"])
    if paper is None:
        return replace(plain, none=f"protocol {place['protocol']!r} is no paper's")
    own = ran or _shipped(place["protocol"], first["scorer"])
    task = re.split("[:=]", place["task"])[0]  # its parameters name a judge, which the paper has not
    samples = own.finetune.of(task).samples
    try:
        found = matching_figures(
            FigureQuery(
                place["protocol"], place["model"], task, first["defense_params"], first["attack_params"], samples
            )
        )
    except LookupError as error:
        return replace(plain, none=str(error))
    compared = {}
    for score in SCORES:
        if figures := tuple(known for known in found if known.score == score):
            compared[score] = ComparedFigure(*_interval(rows, score), figures)
    differs = [text for known in found for text in known.differs]
    told = dict.fromkeys([*list_deviations(paper, own, rows, found[0]), *differs])
    return replace(plain, compared=compared, deviations=tuple(told))


def _interval(rows: Sequence[Mapping[str, Any]], score: str) -> tuple[float, float, float]:
    """The mean over seeds with its 95% interval."""
    if len(rows) == 1:
        (only,) = rows
        return float(only[score]), float(only[f"{score}_low"]), float(only[f"{score}_high"])
    mean, half = mean_interval([float(row[score]) for row in rows])
    return mean, mean - half, mean + half


def _shipped(name: str, scorer: str) -> Protocol:
    """Our file of a paper's protocol, with the judge that rows name."""
    loaded = load_protocol(name)
    return loaded.model_copy(update={"score": loaded.score.model_copy(update={"scorer": scorer})})


def _protocol_of(result: Mapping[str, Any]) -> Protocol | None:
    """What a result ran under, values and data that its user changed included; None where that is no paper's."""
    if result["protocol"] not in load_names().protocols:
        return None
    spec = result["spec"]
    loaded = load_protocol(spec["protocol"]).replaced(spec["values"])
    score = loaded.score.model_copy(update={"scorer": result["scorer"]})
    return loaded.model_copy(update={"data": {**loaded.data, **spec["data"]}, "score": score})


# ---------------------------------------------------------------------------------------------------------------------
# What is shown

_PLACE = ("model", "task", "attack", "defense")
_LEGEND = (
    "diff.: measured less published. inside: whether the published figure lies in the measured one's 95% interval, "
    "Wilson's over the prompts for one seed, the t-interval over seeds for several; papers print none. "
    "others: further figures of the same cell, from other tables."
)


@dataclass(frozen=True)
class ComparisonSheet:
    """Comparisons as a table: what its rows have in common, its head, its rows, and what must be known to read it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def comparison_sheet(cells: Sequence[PublishedComparison]) -> ComparisonSheet:
    """Two rows a cell, one for each score. What all cells have in common stands in the title; without any figure
    there are only notes."""
    shown = [cell for cell in cells if cell.compared]
    varied = [key for key in _PLACE if key == "defense" or len({cell.place[key] for cell in shown}) > 1]
    marks: dict[str, int] = {}
    rows = []
    for cell in shown:
        for score, compared in cell.compared.items():
            named = [cell.place[key] for key in varied[:-1]]
            named.append(cell.place["defense"] + (" (collapsed)" if cell.collapsed else ""))
            rows.append([*named, str(len(cell.seeds)), *_row(score, compared, marks)])
    title = ""
    if shown:
        figure = next(iter(shown[0].compared.values())).figures[0].figure
        common = [shown[0].place[key] for key in _PLACE if key not in varied]
        title = f"Published beside measured: {figure['paper']} (arXiv {figure['arxiv']}, {figure['venue']})"
        title += f": {', '.join(common)}" if common else ""
    head = [*varied, "seeds", "", "measured %", "published", "diff.", "inside", "table", "evidence", "others"]
    notes = [_LEGEND] if shown else []
    notes += [f"[{number}] {text}." for text, number in marks.items()]
    return ComparisonSheet(title, head, rows, [*notes, *_deviation_notes(shown), *_without(cells)])


def _row(score: str, compared: ComparedFigure, marks: dict[str, int]) -> list[str]:
    best, others = compared.figures[0], compared.others
    numbers = [str(marks.setdefault(text, len(marks) + 1)) for text in _remarks(best)]
    return [
        SCORES[score],
        f"{compared.measured:.1f} [{compared.low:.1f}, {compared.high:.1f}]",
        best.figure["value"] + (f" [{','.join(numbers)}]" if numbers else ""),
        f"{compared.difference:+.1f}",
        "yes" if compared.inside else "no",
        best.figure["table"],
        best.figure["evidence"],
        f"{len(compared.figures) - 1}: {_range(*[known.figure['value'] for known in others])}" if others else "",
    ]


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _remarks(known: MatchedFigure) -> list[str]:
    """What must be known to use a figure: its own note and why it may not be this cell."""
    return [*known.doubts, *filter(None, [known.figure["note"]])]


def _deviation_notes(cells: Sequence[PublishedComparison]) -> list[str]:
    """The deviations, each once, with the defenses that have it where not all do."""
    having: dict[str, list[str]] = {}
    for cell in cells:
        for text in cell.deviations:
            having.setdefault(text, []).append(cell.place["defense"])
    told = [text if len(of) == len(cells) else f"{', '.join(dict.fromkeys(of))}: {text}" for text, of in having.items()]
    return [f"Deviations from the paper: {'; '.join(told)}."] if told else []


def _without(cells: Sequence[PublishedComparison]) -> list[str]:
    """Which cells have no figure, by reason."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if not cell.compared:
            reasons.setdefault(cell.none, []).append(f"{cell.place['defense']} under {cell.place['attack']}")
    if len(reasons) == 1 and not any(cell.compared for cell in cells):
        return [f"No published figure: {reason}." for reason in reasons]
    return [f"No published figure of {', '.join(dict.fromkeys(of))}: {why}." for why, of in reasons.items()]


def comparison_view(cells: Sequence[PublishedComparison]) -> RenderableType:
    """The comparisons in the terminal."""
    made = comparison_sheet(cells)
    notes = [Text(note, style="dim") for note in made.notes]
    if not made.rows:
        return Group(*notes)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for title in made.head:
        table.add_column(title, justify="right" if title in ("seeds", "diff.") else "left", overflow="fold")
    for row in made.rows:
        table.add_row(*map(Text, row))
    return Group(Text(made.title, style="bold"), table, *notes)
