"""Trainings that defenses request inside a stage: which ones a run has, and their keys before the stage runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import STAGES, StageName, TrainSettings
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins import SeparateTraining

from .artifacts import TrainedModel
from .experiment import Experiment
from .keys import Inputs, nested_key, planned_key
from .rows import plugin_pools


@dataclass(frozen=True)
class RequestedTraining:
    """A separate training of a run, and the stage that requests it."""

    stage: StageName
    training: SeparateTraining

    @property
    def name(self) -> str:
        """The stage and the purpose, for people."""
        return f"{self.stage}: {self.training.purpose}"


def requested_trainings(experiment: Experiment) -> list[RequestedTraining]:
    """Return the separate trainings that the defenses of a run declare, each once."""
    requests = (
        RequestedTraining(stage, training)
        for stage in STAGES
        for defense in experiment.acting(stage)
        for training in defense.plugin.separate_trainings(stage)
    )
    return list(dict.fromkeys(requests))


def separate_settings(settings: TrainSettings, steps: int | None, rows: int) -> TrainSettings:
    """Return the optimizer settings of a separate training.

    Args:
        settings: Those of the stage that requests it.
        steps: Number of optimizer steps; None: the epochs of the stage.
        rows: Number of training rows.
    """
    if steps is None:
        return settings
    return replace(settings, epochs=steps * settings.accumulation / max(1, math.ceil(rows / settings.batch)))


@dataclass(frozen=True)
class TrainingKeys:
    """The keys of separate trainings before their stage runs. Equal rows are encoded once."""

    models: ModelPool
    _exact: dict[str, Inputs] = field(default_factory=dict)

    def inputs(
        self, experiment: Experiment, requested: RequestedTraining, aligned: TrainedModel, stage_key: str
    ) -> Inputs:
        """Return the inputs of the artifact of a training.

        They are those of the stored artifact for a new adapter on all rows of a pool. Another start and other rows are
        only known while the stage runs, so such a training has the key of its stage instead.

        Args:
            experiment: The experiment.
            requested: The training.
            aligned: The aligned model.
            stage_key: The key of the stage that requests the training.
        """
        training = requested.training
        if not training.uses_pool:
            return {"stage": stage_key, **asdict(training)}
        on_base = training.on_base or requested.stage == "align"
        model = replace(aligned, artifacts={}) if on_base else aligned
        known = digest(planned_key(experiment, requested.stage, model, training))
        if known not in self._exact:
            self._exact[known] = self._exact_inputs(experiment, requested, model)
        return self._exact[known]

    def _exact_inputs(self, experiment: Experiment, requested: RequestedTraining, model: TrainedModel) -> Inputs:
        from harmbench_vaccine.data.collate import encode_examples
        from harmbench_vaccine.training.stage import SeparateRun

        training, config = requested.training, experiment.stages[requested.stage]
        examples = getattr(plugin_pools(experiment), str(training.rows))
        tokenizer = self.models.tokenizer(model.spec)
        rows = encode_examples(tokenizer, config.template, examples, config.settings.max_length)
        run = SeparateRun(training.purpose, examples, steps=training.steps, on_base=training.on_base)
        settings = separate_settings(config.settings, training.steps, len(rows))
        return nested_key(model, run, rows, settings, derive_seed(experiment.spec.seed, requested.stage))
