"""AdamW in plain PyTorch, as a reference for the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage

from . import tiny
from .autograd import cross_entropy


def plain_adamw(stage: TrainingStage, gradients: Sequence[Callable[[], Sequence[Tensor | None]]]) -> list[Tensor]:
    """Train the stage with AdamW at the constant rate 1e-3, weight decay 0.1, gradients clipped at norm 1.

    Args:
        stage: Its trainable parameters are changed.
        gradients: One function a step, which returns a gradient for every parameter; None skips the parameter.

    Returns:
        Masks of the entries whose gradient was never below 1/1000 of the largest. The first steps of Adam follow the
        sign of the gradient, which rounding decides for smaller entries.
    """
    parameters = list(stage.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    firm = [torch.ones_like(parameter, dtype=torch.bool) for parameter in parameters]
    for gradient in gradients:
        values = gradient()
        largest = max(value.abs().max() for value in values if value is not None)
        for number, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
            parameter.grad = value
            if value is not None:
                firm[number] &= value.abs() > 1e-3 * largest
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return firm


def assert_equal_where_firm(ours: TrainingStage, theirs: TrainingStage, firm: Sequence[Tensor]) -> None:
    """Compare the masked entries up to 1e-5 of the largest; the masks must contain 90% of all entries."""
    assert torch.cat([mask.flatten() for mask in firm]).float().mean() > 0.9
    largest = max(parameter.abs().max().item() for parameter in theirs.trainable.values())
    for actual, expected, mask in zip(ours.trainable.values(), theirs.trainable.values(), firm, strict=True):
        torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5 * largest, rtol=0)


def train_two_steps(stage: TrainingStage, rows: Sequence[Encoded]) -> Adapter:
    """Train the adapter of the stage with two steps of AdamW on all rows at once, and return it."""
    parameters, batch = list(stage.trainable.values()), tiny.collated(rows)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(stage.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return stage.stack.trained()
