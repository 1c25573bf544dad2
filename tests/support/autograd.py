"""Losses and gradients of a training stage in plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harmbench_vaccine.training.stage import Batch, TrainingStage


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of -log p(next token) over the response tokens, one by one."""
    log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    places = [(r, t) for r, row in enumerate(batch["labels"].tolist()) for t, label in enumerate(row) if label >= 0]
    return -torch.stack([log_p[r, t - 1, batch["labels"][r, t]] for r, t in places]).mean()


def gradient_at(stage: TrainingStage, batch: Batch, values: Sequence[Tensor], seed: int | None = None) -> list[Tensor]:
    """grad L(values; batch) by autograd; the model gets its own parameters back."""
    parameters = list(stage.trainable.values())
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.clone()
    if seed is not None:
        torch.manual_seed(seed)
    gradients = torch.autograd.grad(cross_entropy(stage.model, batch), parameters)
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data = value
    return list(gradients)


def length(tensors: Sequence[Tensor]) -> Tensor:
    return torch.sqrt(sum((tensor**2).sum() for tensor in tensors))  # type: ignore[arg-type]


def record_stream(stage: TrainingStage) -> list[Batch]:
    """From here on, the harmful batches that the stage gives out."""
    given: list[Batch] = []
    plain = stage.stream

    def stream(*args: Any) -> Batch:
        given.append(plain(*args))
        return given[-1]

    stage.stream = stream  # type: ignore[method-assign]
    return given


def replace_harmful_loss(stage: TrainingStage, loss: Callable[[list[Tensor]], Tensor]) -> None:
    """The harmful rows' loss becomes a function of the parameters; that of other rows stays."""
    plain, given = stage.loss, record_stream(stage)
    parameters = list(stage.trainable.values())
    stage.loss = lambda batch: (  # type: ignore[method-assign]
        loss(parameters) if any(batch is each for each in given) else plain(batch)
    )


def random_coefficients(stage: TrainingStage, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, generator=generator) for each in stage.trainable.values()]
