"""What the stages of an experiment leave in the store: models, answers, verdicts, measurements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.core.types import StageName
from harmbench_vaccine.data.sources import fingerprint
from harmbench_vaccine.inference.model_pool import ModelSpec

METHOD = 2
"""Counts up when the code of a stage changes what it makes: artifacts of the earlier code are then made again."""

ADAPTER, CHECKPOINT = "adapter", "model"
ANSWERS, VERDICTS, GRADES, ROWS = "answers.jsonl", "verdicts.jsonl", "grades.jsonl", "rows.json"
ENGINE = "engine.json"
"""What gave the answers, where vLLM was asked for: another engine serves what it does not."""


@dataclass(frozen=True)
class TrainedModel:
    """A model, and the artifacts that led to it."""

    root: str
    """The base model that everything began with."""
    state: ModelSpec
    artifacts: dict[str, Artifact]
    """Stage -> artifact, for the stages that ran."""

    @property
    def identity(self) -> Any:
        """What a stage that builds on this model depends on."""
        base = [METHOD, self.root, fingerprint(self.root), self.state.dtype]
        if self.state.quantization != "none":
            base.append(self.state.quantization)
        return [*base, *(artifact.key for artifact in self.artifacts.values())]

    def then(self, stage: StageName, artifact: Artifact, state: ModelSpec) -> TrainedModel:
        """The model that a stage made of this one."""
        return TrainedModel(self.root, state, {**self.artifacts, stage: artifact})


@dataclass(frozen=True)
class Measurements:
    """Everything that one cell measures."""

    aligned: TrainedModel
    final: TrainedModel
    answers: dict[str, Artifact]
    """`before/SET` and `after/SET` -> answers, for every set of questions."""
    verdicts: dict[str, Artifact]
    """The same for the harmful sets, the headline set first: the verdicts of the first scorer."""
    drift: Artifact
    others: dict[str, dict[str, Artifact]] = field(default_factory=dict)
    """What further scorers say: name -> the same."""
    grades: dict[str, Artifact] = field(default_factory=dict)
    """`before` and `after` -> what a judge makes of the answers to the task, where a judge scores them."""


Judged = list[tuple[str, dict[str, Artifact]]]
"""Every scorer's name with its verdicts, by the key of the answers, in the order that they were asked for."""
