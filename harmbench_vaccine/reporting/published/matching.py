"""Which published figure belongs to which cell: `leaderboards/published/names.yaml` applied to the figures.

A figure belongs to a cell if protocol, model, task, metric, defense with every parameter, share and number of harmful
rows agree. No rule of a single paper is written here: they are all in that file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Values that columns of a row must have: one of several, or one."""

    where: dict[str, str | list[str]] = Field(default_factory=dict)

    def fits(self, row: Figure) -> bool:
        """Whether the row has them."""
        return all(
            row[column] in ([wanted] if isinstance(wanted, str) else wanted) for column, wanted in self.where.items()
        )


class _Entry(Where):
    paper: list[str]
    doubt: str = ""
    differs: str = ""


class Name(_Entry):
    """A model or task of a paper, and its name here."""

    ours: str


class Composition(_Entry):
    """A defense of a paper, and what it is here."""

    ours: Params


E = TypeVar("E", bound=_Entry)


class Unstated(Where):
    """p and n of rows that do not print them."""

    harmful_ratio: str | None = None
    samples: list[int] | None = None
    because: str


class Without(Where):
    """Rows that have no counterpart here."""

    why: str


class Reference(_Strict):
    """A value of the paper where our file of its protocol has another; `text` is what to say of a run that has."""

    value: Any = Field(alias="is")
    text: str = Field("", alias="else")


class Paper(_Strict):
    """A protocol of ours that is a paper's."""

    published: str
    """The protocol's name in `results.csv`."""
    models: list[Name]
    tasks: list[Name]
    defenses: list[Composition]
    unstated: list[Unstated] = []
    without: list[Without] = []
    differs: list[str] = []
    reference: dict[str, Reference] = {}


class Names(_Strict):
    """`names.yaml`."""

    metrics: dict[str, str]
    """Score of a result -> metric of the papers."""
    attacks: dict[str, dict[str, str | float]]
    """Attack -> column of a figure -> its value, or $NAME of the parameter that is its value."""
    protocols: dict[str, Paper]


@cache
def load_names() -> Names:
    """The correspondence, validated."""
    text = (files("harmbench_vaccine.published") / "names.yaml").read_text(encoding="utf-8")
    return Names.model_validate(yaml.safe_load(text))


@dataclass(frozen=True)
class MatchedFigure:
    """A published figure in the words of this harness."""

    figure: Figure
    score: str
    """`harmful_score` or `finetune_accuracy`."""
    model: str
    task: str
    defense: Params
    ratio: float
    samples: tuple[int, ...]
    """The number of rows; several where the paper is not of one mind."""
    doubts: tuple[str, ...]
    """Why it may be a figure of something else."""
    differs: tuple[str, ...]
    """What the harness does in another way in just this cell."""

    @property
    def value(self) -> float:
        """The figure as a number, in percent."""
        return float(self.figure["value"])


@cache
def matched_figures(protocol: str) -> tuple[MatchedFigure, ...]:
    """The figures of a protocol of ours that have a counterpart here, the best evidenced first."""
    paper = load_names().protocols[protocol]
    found = [
        _known(row, paper)
        for row in load_figures()
        if row["protocol"] == paper.published and is_score(row) and not any(rule.fits(row) for rule in paper.without)
    ]
    return tuple(sorted(found, key=_doubtful))


def _doubtful(matched_figures: MatchedFigure) -> tuple[int, int, bool]:
    """How far a figure is from one that the paper's text prints for just this cell."""
    figure = matched_figures.figure
    return EVIDENCE.index(figure["evidence"]), len(matched_figures.doubts), bool(figure["note"])


def is_score(row: Figure) -> bool:
    """Whether a figure is the harmful score or accuracy of one cell, no average of several."""
    return row["metric"] in load_names().metrics.values() and not is_average(row)


def _known(row: Figure, paper: Paper) -> MatchedFigure:
    model, task = _named(row, "model", paper.models), _named(row, "task", paper.tasks)
    defense = _named(row, "defense", paper.defenses)
    ratio, _, remark = row["harmful_ratio"].partition(" (")
    samples = [int(row["samples"])] if row["samples"] else []
    doubts = [f"p={ratio}: {remark.rstrip(')')}"] if remark else []
    for rule in paper.unstated:
        if rule.fits(row):
            ratio, samples = rule.harmful_ratio or ratio, rule.samples or samples
            doubts.append(rule.because)
    swept = dict(zip(row["sweep"].split("/"), row["sweep_value"].split("/"), strict=False))
    return MatchedFigure(
        row,
        next(score for score, metric in load_names().metrics.items() if metric == row["metric"]),
        model.ours,
        task.ours,
        {plugin: _filled(params, swept) for plugin, params in defense.ours.items()},
        float(ratio),
        tuple(samples),
        tuple(filter(None, [*doubts, model.doubt, task.doubt, defense.doubt])),
        tuple(filter(None, [model.differs, task.differs, defense.differs])),
    )


def _named(row: Figure, column: str, entries: Sequence[E]) -> E:
    """The entry that names what stands in a column: of those that fit, the one that asks for most."""
    return max(
        (entry for entry in entries if row[column] in entry.paper and entry.fits(row)),
        key=lambda entry: len(entry.where),
    )


def _filled(params: Mapping[str, Any], swept: Mapping[str, str]) -> dict[str, Any]:
    """The parameters with every $NAME replaced by the number it stands for."""
    return {
        key: float(swept[value[1:]]) if isinstance(value, str) and value.startswith("$") else value
        for key, value in params.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# From a cell to its figures


@dataclass(frozen=True)
class FigureQuery:
    """What a figure has to agree with. `samples` is what the protocol has, where the attack does not say."""

    protocol: str
    model: str
    task: str
    defense: Params
    attack: Params
    samples: int


def matching_figures(place: FigureQuery) -> list[MatchedFigure]:
    """The figures of a cell, both scores', the best evidenced first.

    Raises:
        LookupError: there is none; the sentence says what agrees with no figure.
    """
    uploaded = _uploaded(place)
    model = place.model.partition("@")[0]  # a revision is the same model
    left = list(matched_figures(place.protocol))
    for agrees, sentence in (
        (lambda each: is_model(model, each.model), f"the paper has no model {place.model!r}"),
        (lambda each: each.task == place.task, f"the paper prints no task {place.task!r} for this model"),
        (lambda each: each.defense == place.defense, "the paper prints no such defense with these parameters"),
        (
            lambda each: uploaded["harmful_ratio"] == each.ratio and uploaded["samples"] in each.samples,
            f"the paper prints no cell with p={uploaded['harmful_ratio']:g}, n={uploaded['samples']:g}",
        ),
    ):
        left = [each for each in left if agrees(each)]
        if not left:
            raise LookupError(sentence)
    return left


def is_model(name: str, hub: str) -> bool:
    """Whether a model is the one of that hub id: by its id, or as a folder of the id's last name."""
    return name == hub or PurePath(name).name == hub.rpartition("/")[2]


def _uploaded(place: FigureQuery) -> dict[str, float]:
    """Share of harmful rows and number of rows that the attack uploads."""
    uploaded: dict[str, float] = {"harmful_ratio": 0, "samples": place.samples}
    for attack, params in place.attack.items():
        if attack not in load_names().attacks:
            raise LookupError(f"the paper has no attack {attack!r}")
        for column, value in load_names().attacks[attack].items():
            uploaded[column] = params[value[1:]] if isinstance(value, str) else value
    return uploaded
