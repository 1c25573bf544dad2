"""Files of the artifacts in the store, and the models and measurements that consist of artifacts."""

from __future__ import annotations

from dataclasses import dataclass, field

from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.core.types import ModelStage
from harmbench_vaccine.inference.model_pool import ModelSpec

ADAPTER, CHECKPOINT = "adapter", "model"
"""Folders in the artifact of a stage that makes a model: a LoRA adapter, or a full checkpoint."""
ROWS, LOG, TRAINING = "rows.json", "log.json", "training.json"
"""The ids of the rows of a training stage, its log by step, and its steps with the peak memory."""
ANSWERS, VERDICTS, GRADES, DRIFT = "answers.jsonl", "verdicts.jsonl", "grades.jsonl", "drift.json"
STEERING = "steering.safetensors"
"""The vectors that defenses add to the residual stream while a model answers."""
ENGINE = "engine.json"
"""The engine that generated the answers, stored if vLLM was requested: transformers answers for models that vLLM
does not support."""


@dataclass(frozen=True)
class TrainedModel:
    """A model with the artifacts of the stages that made it."""

    root: str
    """The location of the base model that the experiment started from."""
    spec: ModelSpec
    """The base and the adapters to load."""
    artifacts: dict[ModelStage, Artifact]
    """Stage -> artifact, for the stages that ran."""

    def after(self, stage: ModelStage, artifact: Artifact, spec: ModelSpec) -> TrainedModel:
        """Return the model that a stage made from this one."""
        return TrainedModel(self.root, spec, {**self.artifacts, stage: artifact})


@dataclass(frozen=True)
class Measurements:
    """Everything that a run measures, as artifacts."""

    aligned: TrainedModel
    final: TrainedModel
    answers: dict[str, Artifact]
    """`before/SET` and `after/SET` -> answers, for every evaluation set."""
    verdicts: dict[str, dict[str, Artifact]]
    """Scorer -> `before/SET` and `after/SET` of harmful sets -> verdicts; the headline scorer and set come first."""
    drift: Artifact
    grades: dict[str, Artifact] = field(default_factory=dict)
    """`before` and `after` -> grades of the answers to the task, where a judge grades them."""
