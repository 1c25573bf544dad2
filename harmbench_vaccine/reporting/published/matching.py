"""Match published figures to experiments, by the rules in `leaderboards/published/names.yaml`.

A figure matches an experiment if protocol, model, task, metric, defense with every parameter, share and number of
harmful rows agree. All rules about single papers are in that file; this module has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

from .figures import EVIDENCE, Figure, is_average, load_figures

Params = dict[str, dict[str, Any]]
"""Plug-in -> its parameters."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Where(_Strict):
    """A condition on a row: column -> its value, or a list of allowed values."""

    where: dict[str, str | list[str]] = Field(default_factory=dict)

    def matches(self, row: Figure) -> bool:
        """Return whether a row has an allowed value in every column."""
        return all(
            row[column] in ([allowed] if isinstance(allowed, str) else allowed)
            for column, allowed in self.where.items()
        )


class _Entry(Where):
    paper: list[str]
    doubt: str = ""
    deviation: str = ""


class Name(_Entry):
    """A model or task of a paper, and its name here."""

    ours: str


class Composition(_Entry):
    """A defense of a paper, and its plug-ins here."""

    ours: Params


E = TypeVar("E", bound=_Entry)


class Unstated(Where):
    """p and n for rows that do not print them."""

    harmful_ratio: str | None = None
    samples: list[int] | None = None
    reason: str


class Excluded(Where):
    """Rows that have no counterpart here."""

    reason: str


class Reference(_Strict):
    """A value of the paper that differs from our protocol file, and the message for a run that deviates from it."""

    value: Any
    message: str = ""


class Paper(_Strict):
    """The correspondence between a paper and one of our protocols."""

    published: str
    """The protocol's name in `results.csv`."""
    models: list[Name]
    tasks: list[Name]
    defenses: list[Composition]
    unstated: list[Unstated] = []
    excluded: list[Excluded] = []
    deviations: list[str] = []
    reference: dict[str, Reference] = {}


class Names(_Strict):
    """The content of `names.yaml`."""

    metrics: dict[str, str]
    """Score of a result -> metric of the papers."""
    attacks: dict[str, dict[str, str | float]]
    """Attack -> column of a figure -> its value, or $NAME for a parameter of the attack."""
    protocols: dict[str, Paper]


@cache
def load_names() -> Names:
    """Load and validate `names.yaml`."""
    text = (files("harmbench_vaccine.published") / "names.yaml").read_text(encoding="utf-8")
    return Names.model_validate(yaml.safe_load(text))


@dataclass(frozen=True)
class MatchedFigure:
    """A published figure under the names of this harness."""

    figure: Figure
    score: str
    """`harmful_score` or `finetune_accuracy`."""
    model: str
    task: str
    defense: Params
    ratio: float
    samples: tuple[int, ...]
    """The number of rows; several values if the paper states several."""
    doubts: tuple[str, ...]
    """Reasons why the figure may be for a different experiment."""
    deviations: tuple[str, ...]
    """Known differences between the authors' code and this harness for this experiment."""

    @property
    def value(self) -> float:
        """The figure as a number, in percent."""
        return float(self.figure["value"])


@cache
def matched_figures(protocol: str) -> tuple[MatchedFigure, ...]:
    """Return the figures for one of our protocols that have a counterpart here, the most direct evidence first."""
    paper = load_names().protocols[protocol]
    figures = [
        _match(row, paper)
        for row in load_figures()
        if row["protocol"] == paper.published
        and is_score(row)
        and not any(rule.matches(row) for rule in paper.excluded)
    ]
    return tuple(sorted(figures, key=_evidence_order))


def _evidence_order(matched: MatchedFigure) -> tuple[int, int, bool]:
    """Return a sort key: evidence from direct to indirect, then few doubts, then figures without a note."""
    figure = matched.figure
    return EVIDENCE.index(figure["evidence"]), len(matched.doubts), bool(figure["note"])


def is_score(row: Figure) -> bool:
    """Return whether a figure is the harmful score or accuracy of one experiment, not an average over several."""
    return row["metric"] in load_names().metrics.values() and not is_average(row)


def _match(row: Figure, paper: Paper) -> MatchedFigure:
    model, task = _entry(row, "model", paper.models), _entry(row, "task", paper.tasks)
    defense = _entry(row, "defense", paper.defenses)
    ratio, _, remark = row["harmful_ratio"].partition(" (")
    samples = [int(row["samples"])] if row["samples"] else []
    doubts = [f"p={ratio}: {remark.rstrip(')')}"] if remark else []
    for rule in paper.unstated:
        if rule.matches(row):
            ratio, samples = rule.harmful_ratio or ratio, rule.samples or samples
            doubts.append(rule.reason)
    swept = dict(zip(row["sweep"].split("/"), row["sweep_value"].split("/"), strict=False))
    return MatchedFigure(
        row,
        next(score for score, metric in load_names().metrics.items() if metric == row["metric"]),
        model.ours,
        task.ours,
        {plugin: _substitute(params, swept) for plugin, params in defense.ours.items()},
        float(ratio),
        tuple(samples),
        tuple(filter(None, [*doubts, model.doubt, task.doubt, defense.doubt])),
        tuple(filter(None, [model.deviation, task.deviation, defense.deviation])),
    )


def _entry(row: Figure, column: str, entries: Sequence[E]) -> E:
    """Return the entry for the value of a column; if several match, the one with the most conditions."""
    return max(
        (entry for entry in entries if row[column] in entry.paper and entry.matches(row)),
        key=lambda entry: len(entry.where),
    )


def _substitute(params: Mapping[str, Any], swept: Mapping[str, str]) -> dict[str, Any]:
    """Return parameters with every $NAME replaced by its swept value."""
    return {
        key: float(swept[value[1:]]) if isinstance(value, str) and value.startswith("$") else value
        for key, value in params.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# From an experiment to its figures


@dataclass(frozen=True)
class FigureQuery:
    """The properties of an experiment that a figure must share."""

    protocol: str
    model: str
    task: str
    defense: Params
    attack: Params
    samples: int
    """Number of uploaded rows in the protocol; an attack's own number has precedence."""


def matching_figures(query: FigureQuery) -> list[MatchedFigure]:
    """Return the figures for an experiment, of both scores, the most direct evidence first.

    Raises:
        LookupError: No figure matches; the message names the first property that does not.
    """
    uploaded = _uploaded_rows(query)
    model = query.model.partition("@")[0]  # a revision is the same model
    conditions: tuple[tuple[Callable[[MatchedFigure], bool], str], ...] = (
        (lambda figure: is_model(model, figure.model), f"the paper does not report model {query.model!r}"),
        (lambda figure: figure.task == query.task, f"the paper does not report task {query.task!r} for this model"),
        (
            lambda figure: figure.defense == query.defense,
            "the paper does not report this defense with these parameters",
        ),
        (
            lambda figure: figure.ratio == uploaded["harmful_ratio"] and uploaded["samples"] in figure.samples,
            f"the paper does not report p={uploaded['harmful_ratio']:g}, n={uploaded['samples']:g}",
        ),
    )
    figures = list(matched_figures(query.protocol))
    for condition, message in conditions:
        figures = [figure for figure in figures if condition(figure)]
        if not figures:
            raise LookupError(message)
    return figures


def is_model(name: str, hub: str) -> bool:
    """Return whether `name` is the Hub id `hub`, or a folder that has the last part of the id as its name."""
    return name == hub or PurePath(name).name == hub.rpartition("/")[2]


def _uploaded_rows(query: FigureQuery) -> dict[str, float]:
    """Return the share of harmful rows and the number of rows that the attack uploads."""
    uploaded: dict[str, float] = {"harmful_ratio": 0, "samples": query.samples}
    for attack, params in query.attack.items():
        if attack not in load_names().attacks:
            raise LookupError(f"the paper does not report attack {attack!r}")
        for column, value in load_names().attacks[attack].items():
            uploaded[column] = params[value[1:]] if isinstance(value, str) else value
    return uploaded
