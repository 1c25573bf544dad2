"""Estimate the cost of a run: memory on a model without storage, and time by measurement or by the rates of a device.

On this machine, models with one and with two layers are timed, with random weights and the shapes of the real run. A
decoder consists of equal layers, so the time of one layer is the difference between the two models, and the rest
(embeddings, logits, call overhead) is the remainder. For another device, and where that would take minutes, the time
follows from the number of operations. Only the configuration of the model is needed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.types import Example, StageName, TrainSettings
from harmbench_vaccine.data.prompts import PromptTemplate
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools, user_rows
from harmbench_vaccine.experiment.separate_trainings import RequestedTraining, requested_trainings
from harmbench_vaccine.inference.loading import readable_load_errors
from harmbench_vaccine.plugins import Defense

from .costs import Estimate
from .devices import THIS_MACHINE, Target
from .evaluation_estimates import estimate_answers, estimate_drift, estimate_scores
from .memory import count_memory, count_weights
from .timing import measure_training, training_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ESTIMATED: tuple[str, ...] = ("align", "finetune", "repair", "nested", "stress", "answer", "score", "drift")
"""The stages that an estimate covers; `nested`: the trainings that defenses request inside a stage."""


def estimate_costs(
    experiment: Experiment,
    target: Target = THIS_MACHINE,
    *,
    read_rows: bool = True,
    gradient_checkpointing: bool = False,
    stages: Collection[str] = ESTIMATED,
) -> list[Estimate]:
    """Estimate the stages of an experiment that run a model, as if none were stored.

    Args:
        experiment: The experiment.
        target: The device.
        read_rows: False: take the numbers of rows from the protocol, since to read the rows would download them.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        stages: The stages to estimate.

    Raises:
        HbvError: The configuration of a model cannot be read.
    """
    trained: list[StageName] = ["align"] if experiment.stages["align"].defenses.runs else []
    trained += ["finetune"] if experiment.user_trains else []
    estimates = [
        _estimate_training(experiment, name, target, read_rows, gradient_checkpointing)
        for name in trained
        if name in stages
    ]
    if "repair" in stages and experiment.acting("repair"):
        estimates.append(_estimate_repair(experiment, target, read_rows))
    if "nested" in stages:
        estimates += [
            _estimate_separate(experiment, requested, target, read_rows, gradient_checkpointing)
            for requested in requested_trainings(experiment)
        ]
    if "stress" in stages and experiment.attack_team.stresses_weights:
        estimates.append(_estimate_stress(experiment))
    if "answer" in stages:
        estimates.append(estimate_answers(experiment, target, read_rows))
    if "score" in stages:
        estimates.append(estimate_scores(experiment, target, read_rows))
    if "drift" in stages:
        estimates.append(estimate_drift(experiment, target, _row_shape(experiment, "align", read_rows)[1]))
    return estimates


def _estimate_training(
    experiment: Experiment, name: StageName, target: Target, read_rows: bool, gradient_checkpointing: bool
) -> Estimate:
    settings = experiment.stages[name].settings
    rows, width = _row_shape(experiment, name, read_rows)
    passes = passes_per_step([defense.plugin for defense in experiment.acting(name)], name)
    return _estimate_steps(experiment, name, _step_count(settings, rows), width, passes, target, gradient_checkpointing)


def _estimate_separate(
    experiment: Experiment,
    requested: RequestedTraining,
    target: Target,
    read_rows: bool,
    gradient_checkpointing: bool,
) -> Estimate:
    """Estimate plain fine-tuning inside a stage, with the settings of the stage."""
    stage, training = requested.stage, requested.training
    rows, width = _separate_shape(experiment, requested, read_rows)
    steps = _step_count(experiment.stages[stage].settings, rows) if training.steps is None else training.steps
    cost = _estimate_steps(experiment, stage, steps, width, (1, 1), target, gradient_checkpointing)
    return replace(cost, stage="nested", training=requested.name)


def _estimate_steps(
    experiment: Experiment,
    name: StageName,
    steps: int,
    width: int,
    passes: tuple[int, int],
    target: Target,
    gradient_checkpointing: bool,
) -> Estimate:
    """Estimate the steps of a training with the settings of a stage.

    Args:
        experiment: The experiment.
        name: The stage.
        steps: Number of optimizer steps.
        width: Tokens per row.
        passes: Forward and backward passes of each micro-batch.
        target: The device.
        gradient_checkpointing: As in `estimate_costs`.
    """
    protocol, model, settings = experiment.protocol, experiment.model, experiment.stages[name].settings
    memory = count_memory(model, protocol.dtype, protocol.quantization, settings, width, gradient_checkpointing)
    measured = None if target.rates else measure_training(model, protocol.dtype, settings, width)
    times = measured or training_seconds(target.table_rates(), memory, settings, width)
    forward, backward = passes
    forward += backward if gradient_checkpointing else 0
    seconds = steps * (settings.accumulation * (forward * times.forward + backward * times.backward) + times.update)
    detail = f"{steps} steps of {settings.batch} rows of {width} tokens, {forward}F {backward}B per step"
    disk = memory.adapter // 4 * 7  # of 4 copies: the adapter, then it and its moments twice
    return Estimate(name, seconds, memory.peak, detail, disk, measured is not None)


def _step_count(settings: TrainSettings, rows: int) -> int:
    """Return the optimizer steps of a stage; the last one may have fewer micro-batches."""
    return math.ceil(settings.micro_batches(rows) / settings.accumulation)


def _estimate_repair(experiment: Experiment, target: Target, read_rows: bool) -> Estimate:
    """Estimate the edit of the user's adapter without the passes of the edit; its trainings are separate estimates."""
    protocol, settings = experiment.protocol, experiment.stages["repair"].settings
    width = _row_shape(experiment, "finetune", read_rows)[1]
    memory = count_memory(experiment.model, protocol.dtype, protocol.quantization, settings, width)
    adapter = memory.adapter // 4
    size = memory.weights + adapter
    return Estimate("repair", 0.0, size, "edits and stores the adapter, not timed", adapter, target.rates is None)


def _estimate_stress(experiment: Experiment) -> Estimate:
    """Estimate the edit of the final weights, which are loaded and stored once; it runs no model."""
    size = count_weights(experiment.model, experiment.protocol.dtype).weights
    return Estimate("stress", 0.0, size, "edits and stores every weight, not timed", size, timed=True)


def passes_per_step(defenses: Sequence[Defense], stage: StageName) -> tuple[int, int]:
    """Return the forward and backward passes of a step of a stage.

    At most one of the defenses of a stage computes the gradient, so the result is the highest declared cost.
    """
    costs = [re.fullmatch(r"(\d+)F (\d+)B", defense.passes(stage)) for defense in defenses]
    return max(((int(cost[1]), int(cost[2])) for cost in costs if cost), default=(1, 1))


def _row_shape(experiment: Experiment, name: StageName, read_rows: bool) -> tuple[int, int]:
    """Return the number of rows of a stage, and the mean width of its batches in tokens.

    If the rows are not on this machine, return the number in the protocol and the maximum width.
    """
    settings = experiment.stages[name].settings
    count = _alignment_count(experiment) if name == "align" else experiment.finetune.samples
    if read_rows:
        with suppress(HbvError):
            pools = plugin_pools(experiment)
            rows = list(pools.alignment) if name == "align" else user_rows(experiment, pools)
            rows = experiment.stages[name].defenses.fresh().train_on(name, rows, pools)
            if shape := _encoded_shape(experiment, name, rows):
                return shape
    return count, settings.max_length


def _separate_shape(experiment: Experiment, requested: RequestedTraining, read_rows: bool) -> tuple[int, int]:
    """Return the number of rows of a separate training, and the mean width of its batches in tokens.

    Rows that the defense chooses are as wide as those of the stage, in the repair stage as alignment rows. If the rows
    are not on this machine, every pool has as many rows as the alignment stage, of the maximum width.
    """
    stage, rows = requested.stage, requested.training.rows
    if not isinstance(rows, str):
        return rows or 0, _row_shape(experiment, "align" if stage == "repair" else stage, read_rows)[1]
    if read_rows:
        with suppress(HbvError):
            if shape := _encoded_shape(experiment, stage, getattr(plugin_pools(experiment), rows)):
                return shape
    return _alignment_count(experiment), experiment.stages[stage].settings.max_length


def _alignment_count(experiment: Experiment) -> int:
    return experiment.protocol.align.rows + experiment.protocol.align.instructions


def _encoded_shape(experiment: Experiment, name: StageName, rows: Sequence[Example]) -> tuple[int, int] | None:
    """Return the number of rows with room for a response and the mean width of their batches; None without a row."""
    from harmbench_vaccine.core.seeds import derive_seed
    from harmbench_vaccine.training.trainer import batch_order

    settings, template = experiment.stages[name].settings, experiment.stages[name].template
    counts = (_token_count(experiment.model, template, row, settings.max_length) for row in rows)
    lengths = [count for count in counts if count]
    order = batch_order(len(lengths), settings, derive_seed(experiment.spec.seed, name)) if lengths else []
    widths = [max(lengths[index] for index in batch) for batch in order]
    return (len(lengths), round(statistics.mean(widths))) if widths else None


@lru_cache(maxsize=100_000)  # runs share most rows
def _token_count(model: str, template: PromptTemplate, row: Example, max_length: int) -> int:
    """Return the number of tokens of a training row; 0 if no response token remains."""
    from harmbench_vaccine.data.collate import encode_example

    encoded = encode_example(_tokenizer(model), template, row, max_length)
    return len(encoded.ids) if encoded else 0


@lru_cache(maxsize=4)
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with readable_load_errors(model) as arguments:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**arguments)
    return tokenizer
