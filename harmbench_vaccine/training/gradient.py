"""Batches, losses and gradients: the quantities that update rules are written in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harmbench_vaccine.data.collate import IGNORED

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each (rows x length). Batches of the stage's training rows also have
`rows`: the row numbers in `TrainingStage.rows`."""


@dataclass(frozen=True)
class Gradient:
    """The contribution of one micro-batch to an optimizer step. Gradients add and scale like vectors."""

    loss: Tensor
    """The loss that the log shows: a scalar without a graph."""
    values: Sequence[Tensor | None]
    """One tensor per trainable parameter, in their order. None skips the parameter in this step: neither momentum nor
    weight decay changes it."""

    def __add__(self, other: Gradient) -> Gradient:
        pairs = zip(self.values, other.values, strict=True)
        return Gradient(self.loss + other.loss, [None if a is None or b is None else a + b for a, b in pairs])

    def __rmul__(self, scale: float) -> Gradient:
        return Gradient(scale * self.loss, [None if value is None else scale * value for value in self.values])

    def __sub__(self, other: Gradient) -> Gradient:
        return self + -1.0 * other

    @property
    def norm(self) -> Tensor:
        """The L2 norm over all parameters, a float32 scalar."""
        return global_norm([value for value in self.values if value is not None])


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of every response token.

    Args:
        logits: Logits (rows x length x vocabulary).
        labels: Labels (rows x length).

    Returns:
        The losses and the mask of response tokens, each (rows x length - 1). Position t scores label t + 1.
    """
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape), targets != IGNORED


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors as one vector, a float32 scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in tensors]))
