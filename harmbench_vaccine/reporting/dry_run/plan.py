"""Plan runs without executing them: stored stages, stages to run, and files to download.

The functions of `pipeline` request the stages, from a store that creates nothing. The trainings that defenses request
inside a stage that is not stored are requested as the defenses declare them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harmbench_vaccine import pipeline
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.data import hub
from harmbench_vaccine.data.sources import TESTBED, TESTBED_VERSION, is_dequantized, local_path
from harmbench_vaccine.evaluation.scorer_facts import scorer_models
from harmbench_vaccine.experiment.artifacts import TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import data_locations
from harmbench_vaccine.experiment.separate_trainings import TrainingKeys, requested_trainings
from harmbench_vaccine.inference.model_pool import ModelPool

from .costs import Kind
from .random_models import gated_models, model_shapes


class DryRunStore(Store):
    """A store that returns stored artifacts, and an address without content for the others."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requested: dict[str, Artifact] = {}
        """Key -> artifact, in the order of the requests."""

    def get_or_create(
        self, stage: str, inputs: Mapping[str, Any], create: Callable[[Path, Path], None], *, all_ranks: bool = False
    ) -> Artifact:
        """Return the artifact, and create nothing; the artifact is `cached` if it is stored."""
        path = self.path_of(stage, inputs)
        key = path.name
        if key not in self.requested:
            self.requested[key] = self._finished(stage, key, path) or Artifact(stage, key, path, 0.0, cached=False)
        return self.requested[key]


@dataclass(frozen=True)
class Source:
    """A model, a judge or a data set that a run reads."""

    what: str
    """`model`, `judge` or `data`."""
    location: str
    available: bool
    """Whether it is on this machine: a file, a part of the testbed, or a file in the Hub's cache."""
    detail: str = ""
    gated: bool = False
    """Whether its license has to be accepted on the Hub before it can be downloaded."""


@dataclass
class Plan:
    """The stages and sources of a list of experiments."""

    experiments: Sequence[Experiment] = ()
    stages: list[list[Artifact]] = field(default_factory=list)
    """For every experiment, the artifacts that no earlier experiment requests; empty if they are unknown."""
    sources: list[Source] = field(default_factory=list)
    trainings: dict[str, str] = field(default_factory=dict)
    """Key -> name, such as `align: aligned`, of the separate trainings among the stages."""
    unknown: str = ""
    """The reason why some stages are unknown: they depend on data that is not on this machine."""

    def kind_of(self, artifact: Artifact) -> Kind:
        """Return the stage of an artifact, and the separate training that it is of."""
        return artifact.stage, self.trainings.get(artifact.key, "")

    def is_stored(self, index: int) -> bool:
        """Return whether all artifacts of an experiment are stored."""
        return bool(self.stages) and not self.unknown and all(artifact.cached for artifact in self.stages[index])


def plan_runs(experiments: Sequence[Experiment], root: Path) -> Plan:
    """Plan experiments; nothing is created or downloaded.

    Args:
        experiments: The experiments, in the order of execution.
        root: Folder of the store.
    """
    locations: dict[str, set[str]] = {"model": set(), "judge": set(), "data": set()}
    for experiment in experiments:
        locations["model"].add(experiment.model)
        locations["judge"] |= {model for judge in experiment.judges for model in scorer_models(judge.plugin)}
        locations["data"] |= set(data_locations(experiment).values())
    is_built = DryRunStore(root).get_or_create("testbed", {"version": TESTBED_VERSION}, lambda *_: None).cached
    sources = [describe_source(what, name, is_built) for what, names in locations.items() for name in sorted(names)]
    if missing := [source.location for source in sources if not source.available and source.what != "judge"]:
        return Plan(experiments, sources=sources, unknown=f"{missing[0]} is not on this machine yet")
    plan = Plan(experiments, sources=sources)
    store, models = DryRunStore(root), ModelPool()
    context, keys = RunContext(store, models), TrainingKeys(models)
    for experiment in experiments:
        earlier = len(store.requested)
        try:
            aligned, final = pipeline.train_models(experiment, context)
            plan.trainings |= _request_trainings(experiment, store, keys, aligned, final)
            pipeline.measure(experiment, context, aligned, final)
        except HbvError as error:
            plan.unknown = str(error).removesuffix(".")
        plan.stages.append(list(store.requested.values())[earlier:])
    return plan


def _request_trainings(
    experiment: Experiment, store: DryRunStore, keys: TrainingKeys, aligned: TrainedModel, final: TrainedModel
) -> dict[str, str]:
    """Request the separate trainings of the stages that are not stored, and return key -> name."""
    names = {}
    for requested in requested_trainings(experiment):
        stage = final.artifacts[requested.stage]
        if not stage.cached:
            inputs = keys.inputs(experiment, requested, aligned, stage.key)
            names[store.get_or_create("nested", inputs, lambda *_: None).key] = requested.name
    return names


def describe_source(what: str, location: str, testbed_is_built: bool) -> Source:
    """Return whether a location is on this machine, and otherwise its size on the Hub.

    Raises:
        BadInput: The Hub has no such model or data set.
    """
    if location.startswith(TESTBED):
        detail = "" if testbed_is_built else "the first run builds it, in one to three minutes"
        return Source(what, location, testbed_is_built, detail)
    if local_path(location) is not None:
        return Source(what, location, True, "" if is_dequantized(location) else "the first run dequantizes it")
    name = hub.parse_hub_name(location)
    kind: hub.Kind = "dataset" if what == "data" else "model"
    assert name is not None  # `local_path` refuses every other form
    if hub.is_cached(kind, name):
        return Source(what, location, True, "in the cache of the Hub")
    missing = partial(Source, what, location, available=False, gated=name.id in gated_models())
    try:
        return missing(detail=f"{hub.download_size(kind, name) / 2**30:.1f} GiB")
    except HbvError as error:
        label = "Data set" if what == "data" else "Model"
        refusal = error.__cause__ and hub.hub_access_error(
            f"{label} {location!r}", kind, location, error.__cause__, "choose a folder"
        )
        if isinstance(refusal, BadInput):
            raise refusal from error
        if shape := model_shapes().get(name.id):
            return missing(detail=f"about {2 * shape.parameters / 2**30:.1f} GiB in 16 bits")
        return missing(detail=f"size unknown: {error}")
