"""A second adapter on top of the trained one, for a simulated attacker inside a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .stage import TrainingStage


@contextmanager
def second_adapter(stage: TrainingStage, purpose: str) -> Iterator[list[Tensor]]:
    """Add a new LoRA to the adapted modules inside the block, as the user stage does in double topology.

    The trained adapter stays active below it, and gradients reach both. The new one has the modules of the trained one,
    the rank and the scale of the stage's settings, A as peft draws it, B = 0, and no dropout.

    Args:
        stage: A stage that trains an adapter.
        purpose: Name of the adapter; its random numbers depend on it and on the step.

    Yields:
        A and B of every module in turn: float32 leaves that require a gradient.
    """
    generator, rank = stage.generator(purpose), stage.settings.lora_rank
    scale = stage.settings.lora_alpha / rank
    factors: list[Tensor] = []
    handles = []
    for module, (a, b) in stage.factors.items():
        new_a = torch.empty(rank, a.shape[1])
        nn.init.kaiming_uniform_(new_a, a=math.sqrt(5), generator=generator)
        pair = new_a.to(a.device).requires_grad_(), b.new_zeros(b.shape[0], rank).requires_grad_()
        factors += pair
        handles.append(stage.stack.base.get_submodule(module).register_forward_hook(_adding(*pair, scale)))
    try:
        yield factors
    finally:
        for handle in handles:
            handle.remove()


def _adding(a: Tensor, b: Tensor, scale: float) -> Any:
    """Return a forward hook that adds scale * x A^T B^T to the output of a linear layer."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (scale * (args[0].float() @ a.T @ b.T)).to(output.dtype)

    return add
