"""Batches, losses and gradients: the quantities that update rules are written in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmbench_vaccine.data.collate import IGNORED

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each (rows x length). Batches of the stage's training rows also have
`rows`: the row numbers in `TrainingStage.rows`. With `weights` (rows x length, float32), the loss of each label is
multiplied by its weight; the mean is still over the number of response tokens."""


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

    def dot(self, other: Gradient) -> Tensor:
        """Return the inner product over all parameters that have both gradients, a float32 scalar."""
        pairs = zip(self.values, other.values, strict=True)
        return torch.stack([(a.float() * b.float()).sum() for a, b in pairs if a is not None and b is not None]).sum()

    @property
    def norm(self) -> Tensor:
        """The L2 norm over all parameters, a float32 scalar."""
        return global_norm([value for value in self.values if value is not None])


def response_mask(batch: Batch) -> Tensor:
    """Return the mask of the positions that score a response token (rows x length - 1, bool).

    Position t scores label t + 1.
    """
    return batch["labels"][:, 1:] != IGNORED


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Compute the cross-entropy of every response token.

    Args:
        logits: Logits at the response tokens, as `TrainingStage.output` returns them (response tokens x vocabulary).
        batch: The batch.

    Returns:
        The losses, in the order of `response_mask` (response tokens).
    """
    targets = batch["labels"][:, 1:][response_mask(batch)]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def row_means(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean over the response tokens of each row.

    Args:
        values: One value per response token, in the order of `response_mask` (response tokens).
        batch: The batch.

    Returns:
        One mean per row (rows); 0 for a row without response tokens.
    """
    mask = response_mask(batch)
    sums = values.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], values)
    return sums / mask.sum(1).clamp(min=1)


def weighted(batch: Batch, weights: Tensor) -> Batch:
    """Return a batch in which the loss of each label is multiplied by a weight, on top of earlier weights.

    Args:
        batch: The batch.
        weights: One weight per row (rows), or one per label (rows x length).
    """
    labels = batch["labels"]
    per_label = weights if weights.dim() == labels.dim() else weights.unsqueeze(1).expand_as(labels)
    return {**batch, "weights": per_label.float() * batch.get("weights", 1.0)}


def response_weights(batch: Batch) -> Tensor:
    """Return the weight of every response token, in the order of `response_mask` (response tokens); 1 by default."""
    mask = response_mask(batch)
    return batch["weights"][:, 1:][mask] if "weights" in batch else torch.ones(int(mask.sum()), device=mask.device)


@contextmanager
def logits_at(model: Any, places: Tensor) -> Iterator[None]:
    """Compute logits at some tokens only inside the block: with a large vocabulary, logits cost much.

    Args:
        model: A causal language model of transformers.
        places: The places of the tokens in the flattened input of the model.
    """

    def select(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, places), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors as one vector, a float32 scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in tensors]))
