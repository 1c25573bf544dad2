"""Losses and gradients of a training stage in plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from harmbench_vaccine.training.lora_linear import LoraLinear
from harmbench_vaccine.training.stage import Batch, TrainingStage


@contextmanager
def peft_computation() -> Iterator[None]:
    """Let LoRA layers compute their outputs as in peft inside the block, with any number of derivatives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLinear, "forward", Linear.forward)
        yield


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean of -log p(next token) over the response tokens, taken one by one from all logits."""
    with peft_computation():
        log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    places = [(r, t) for r, row in enumerate(batch["labels"].tolist()) for t, label in enumerate(row) if label >= 0]
    return -torch.stack([log_p[r, t - 1, batch["labels"][r, t]] for r, t in places]).mean()


def gradient_at(stage: TrainingStage, batch: Batch, values: Sequence[Tensor], seed: int | None = None) -> list[Tensor]:
    """Return grad L(values; batch) by autograd; the parameters of the model are restored."""
    parameters = list(stage.trainable.values())
    originals = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.clone()
    if seed is not None:
        torch.manual_seed(seed)
    gradients = torch.autograd.grad(cross_entropy(stage.model, batch), parameters)
    for parameter, value in zip(parameters, originals, strict=True):
        parameter.data = value
    return list(gradients)


def length(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all entries together."""
    return torch.sqrt(sum((tensor**2).sum() for tensor in tensors))  # type: ignore[arg-type]


def record_stream(stage: TrainingStage) -> list[Batch]:
    """Return a list to which every batch is appended that the stage draws from its second stream from now on."""
    batches: list[Batch] = []
    stream_of_stage = stage.stream

    def stream(*args: Any) -> Batch:
        batches.append(stream_of_stage(*args))
        return batches[-1]

    stage.stream = stream  # type: ignore[method-assign]
    return batches


def record_pairs(stage: TrainingStage) -> list[tuple[Batch, Batch]]:
    """Record the pairs of batches that the stage returns from now on."""
    pairs: list[tuple[Batch, Batch]] = []
    plain = stage.paired_stream

    def paired_stream(*args: Any) -> tuple[Batch, Batch]:
        pairs.append(plain(*args))
        return pairs[-1]

    stage.paired_stream = paired_stream  # type: ignore[method-assign]
    return pairs


def replace_harmful_loss(stage: TrainingStage, loss: Callable[[list[Tensor]], Tensor]) -> None:
    """Replace the loss of harmful rows by a function of the parameters; the loss of other rows is unchanged."""
    loss_of_stage, harmful = stage.loss, record_stream(stage)
    parameters = list(stage.trainable.values())
    stage.loss = lambda batch: (  # type: ignore[method-assign]
        loss(parameters) if any(batch is drawn for drawn in harmful) else loss_of_stage(batch)
    )


def random_coefficients(stage: TrainingStage, seed: int) -> list[Tensor]:
    """Draw a random tensor of the shape of every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(value.shape, generator=generator).to(value.device) for value in stage.trainable.values()]
