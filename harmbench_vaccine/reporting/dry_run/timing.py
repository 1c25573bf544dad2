"""Time of a batch: timed on this machine with small models of the same shape, or by the rates of a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any

from harmbench_vaccine.core.device import device, forked_rng
from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.inference.loading import JudgeHead

from .costs import BatchSeconds, TrainingMemory
from .devices import DeviceRates, fastest_call
from .random_models import first_layers, layer_count, load_config, random_model

MEASUREMENT_SECONDS = 0.2
"""Minimum total time of repeated measurements."""
_WIDTHS = 8
"""Widths of training rows are rounded up to a multiple of this number of tokens, so that stages share measurements."""
CPU_LIMIT = 5e11
"""Maximum floating point operations per step of two layers that are timed on a CPU, which needs about ten steps."""
FEW_TOKENS, MANY_TOKENS = 2, 34
"""Generated tokens of two calls, whose difference is the time of the tokens between."""


def training_seconds(rates: DeviceRates, memory: TrainingMemory, settings: TrainSettings, width: int) -> BatchSeconds:
    """Compute the times of one batch by the number of operations: 2 per number of a matrix and token in each pass.

    With every weight trained, the backward pass has products for the gradients of activations and of weights.
    """
    products = rates.product_seconds(2.0 * memory.matrices * settings.batch * width)
    return BatchSeconds(
        forward=products,
        backward=(2 if settings.full else 1) * products,
        update=2 * memory.adapter / rates.bandwidth,
    )


def measure_training(model: str, dtype: str, settings: TrainSettings, width: int) -> BatchSeconds | None:
    """Measure the times of one training batch of `settings.batch` rows of `width` tokens.

    A slightly wider batch is timed, once for all stages of similar rows. The passes of a narrower one take a shorter
    time in proportion.

    Args:
        model: Folder or Hub id.
        dtype: Data type of the weights.
        settings: Training settings.
        width: Tokens per row.

    Returns:
        The times, or None if they would take minutes to measure.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    tokens = max(width, min(_WIDTHS * math.ceil(width / _WIDTHS), settings.max_length))
    alike = replace(settings, lr=1e-5, epochs=1.0, accumulation=1, max_length=tokens)  # no batch is faster or slower
    times = _training_times(model, dtype, alike, tokens)
    share = width / tokens
    return times and replace(times, forward=share * times.forward, backward=share * times.backward)


@lru_cache
def _training_times(model: str, dtype: str, settings: TrainSettings, width: int) -> BatchSeconds | None:
    if _is_slow(model, dtype, "generator", 3 * settings.batch * width):
        return None
    return _extrapolate(load_config(model), lambda small: _measure_training(small, dtype, settings, width))


@lru_cache
def measure_inference(
    model: str, dtype: str, head: JudgeHead, rows: int, width: int, generates: bool
) -> BatchSeconds | None:
    """Measure the times of one batch of `rows` texts of `width` tokens, without gradients.

    Args:
        model: Folder or Hub id.
        dtype: Data type of the weights.
        head: "generator" for a model with a language model head, "classifier" for one with a head of labels.
        rows: Texts in the batch.
        width: Tokens per text.
        generates: Whether the model continues the texts, so that one further token of each is timed.

    Returns:
        The times, or None if they would take minutes to measure.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    if _is_slow(model, dtype, head, rows * width):
        return None
    return _extrapolate(
        load_config(model), lambda small: _measure_inference(small, dtype, head, rows, width, generates)
    )


def _is_slow(model: str, dtype: str, head: JudgeHead, tokens: int) -> bool:
    """Return whether passes over this many tokens take long on the CPU that models run on here."""
    import torch

    if device() != "cpu":
        return False
    with torch.device("meta"):
        small = random_model(first_layers(load_config(model), 2), dtype, head)
    return 2.0 * sum(parameter.numel() for parameter in small.parameters()) * tokens > CPU_LIMIT


def _extrapolate(config: Any, measure: Callable[[Any], BatchSeconds]) -> BatchSeconds:
    """Return the times of a model by those of its first layer and of its first two layers."""
    with forked_rng():
        first, second = (measure(first_layers(config, layers)) for layers in (1, 2))
    further = layer_count(config) - 1
    return BatchSeconds(
        **{
            field.name: getattr(first, field.name)
            + further * max(0.0, getattr(second, field.name) - getattr(first, field.name))
            for field in fields(BatchSeconds)
        }
    )


def _measure_training(config: Any, dtype: str, settings: TrainSettings, width: int) -> BatchSeconds:
    import torch

    from harmbench_vaccine.training.adapters import LoraStack
    from harmbench_vaccine.training.stage import TrainingStage

    seconds_of = partial(fastest_call, least_seconds=MEASUREMENT_SECONDS)
    base = random_model(config, dtype).to(device())
    ids = _random_ids(config, settings.batch, width)
    stack = LoraStack(base)
    stage = TrainingStage("align", stack, stack.train((), settings, 0), 0, settings)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stack.model.train()
    seconds_of(lambda: stage.gradient(batch))  # the first calls include one-time setup
    forward = seconds_of(lambda: stage.loss(batch))
    both = seconds_of(lambda: stage.gradient(batch))
    parameters = list(stage.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return BatchSeconds(forward, max(both - forward, 0.0), seconds_of(optimizer.step))


def _measure_inference(
    config: Any, dtype: str, head: JudgeHead, rows: int, width: int, generates: bool
) -> BatchSeconds:
    import torch

    seconds_of = partial(fastest_call, least_seconds=MEASUREMENT_SECONDS)
    if config.pad_token_id is None:  # without it, a classifier reads one text at a time
        config.pad_token_id = 0
    model = random_model(config, dtype, head).to(device()).eval()
    ids = _random_ids(config, rows, width)
    mask = torch.ones_like(ids)

    def generate(tokens: int) -> Callable[[], object]:
        return lambda: model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )

    with torch.inference_mode():
        if not generates:
            return BatchSeconds(forward=seconds_of(lambda: model(input_ids=ids, attention_mask=mask)))
        few, many = seconds_of(generate(FEW_TOKENS)), seconds_of(generate(MANY_TOKENS))
    token = max(many - few, 0.0) / (MANY_TOKENS - FEW_TOKENS)
    return BatchSeconds(forward=max(few - FEW_TOKENS * token, 0.0), token=token)


def _random_ids(config: Any, rows: int, width: int) -> Any:  # a tensor: torch is imported on use
    import torch

    return torch.randint(3, config.get_text_config(decoder=True).vocab_size, (rows, width)).to(device())
