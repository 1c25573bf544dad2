"""What a run would do, without doing it: the stages that are there, those to make, and what has to be downloaded.

The stages are asked for by the method itself (`pipeline.run`), of a store that makes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmbench_vaccine import pipeline
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.data import hub
from harmbench_vaccine.data.sources import TESTBED, TESTBED_VERSION, local_path
from harmbench_vaccine.evaluation.verdicts import scorer_models
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.rows import HARM_DATA
from harmbench_vaccine.inference.model_pool import ModelPool


class _Planned(Store):
    """A store that says what it has, and gives an empty address for what it has not."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: dict[str, Artifact] = {}

    def get_or_create(
        self, stage: str, inputs: Mapping[str, Any], create: Callable[[Path, Path], None], *, all_ranks: bool = False
    ) -> Artifact:
        path = self.path_of(stage, inputs)
        key = path.name
        if key not in self.asked:
            self.asked[key] = self._finished(stage, key, path) or Artifact(stage, key, path, 0.0, cached=False)
        return self.asked[key]


@dataclass(frozen=True)
class Source:
    """Something that a run reads: a model, a judge or a data set."""

    what: str
    location: str
    there: bool
    """On this machine: a file, a part of the testbed, or in the hub's cache."""
    detail: str = ""


@dataclass
class Plan:
    """What a list of cells would do, in order."""

    stages: list[list[Artifact]] = field(default_factory=list)
    """For every cell, what no cell before it asks for; empty where it cannot be told yet."""
    sources: list[Source] = field(default_factory=list)
    unknown: str = ""
    """Why some stages cannot be told yet: the data that they depend on is not here."""


def plan_runs(cells: Sequence[Experiment], root: Path) -> Plan:
    """What `pipeline.run` would ask of the store below `root`; nothing is made and nothing is downloaded."""
    wanted: dict[str, set[str]] = {"model": {cell.model for cell in cells}, "judge": set(), "data": set()}
    for cell in cells:
        wanted["judge"] |= {model for judge in cell.scorers for model in scorer_models(judge.plugin)}
        wanted["data"] |= {cell.location(name) for name in (*HARM_DATA, *cell.task.datasets)}
    built = planned_testbed(root).cached
    made = Plan(
        sources=[describe_source(what, place, built) for what, places in wanted.items() for place in sorted(places)]
    )
    if missing := [entry.location for entry in made.sources if not entry.there and entry.what != "judge"]:
        made.unknown = f"{missing[0]} is not on this machine yet"
        return made
    store = _Planned(root)
    for cell in cells:
        before = len(store.asked)
        try:
            pipeline.run(cell, RunContext(store, ModelPool()))
        except HbvError as error:
            made.unknown = str(error)
        made.stages.append(list(store.asked.values())[before:])
    return made


def planned_testbed(root: Path) -> Artifact:
    """The testbed in the store below `root`, built or not."""
    return _Planned(root).get_or_create("testbed", {"version": TESTBED_VERSION}, lambda *_: None)


def describe_source(what: str, location: str, built: bool) -> Source:
    """Whether a location can be read as it is, or has to be downloaded, and how much that is if the hub says."""
    if location.startswith(TESTBED):  # to locate it would build it
        return Source(what, location, built, "" if built else "the first run builds it, in one to two minutes")
    if local_path(location) is not None:
        return Source(what, location, True)
    name = hub.parse_hub_name(location)
    kind: hub.Kind = "dataset" if what == "data" else "model"
    assert name is not None  # `locate` refuses what has another form
    if hub.is_cached(kind, name):
        return Source(what, location, True, "in the hub's cache")
    try:
        return Source(what, location, False, f"{hub.download_size(kind, name) / 2**30:.1f} GiB")
    except HbvError as error:
        return Source(what, location, False, f"size unknown: {error}")
