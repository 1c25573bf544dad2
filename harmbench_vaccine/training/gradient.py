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
