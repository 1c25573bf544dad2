"""One training stage as a defense sees it: the model, its clock, and the operations that update rules are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ..seeds import derive
from ..terms import Pools, StageName
from .taps import Taps

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask`, `labels`: each rows x length."""


@dataclass(frozen=True)
class Gradient:
    """What one micro-batch contributes to an optimizer step."""

    loss: Tensor
    """A scalar without a graph: what the log shows."""
    values: Sequence[Tensor | None]
    """One tensor for each trainable parameter, in their order; None leaves the parameter out of the step: neither
    momentum nor weight decay moves it."""


@dataclass
class TrainingStage:
    """What a hook is given. `step` counts optimizer steps from 1; it is 0 before the first."""

    name: StageName
    model: nn.Module
    trainable: Mapping[str, nn.Parameter]
    seed: int
    pools: Pools = field(default_factory=Pools)
    step: int = 0
    steps: int = 0
    """How many optimizer steps the stage has in all."""
    micro: int = 0
    """Which micro-batch of the step is being taken, from 0."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the response tokens of a batch: L(w; B)."""
        ids, mask, labels = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    def gradient(self, batch: Batch) -> Gradient:
        """The gradient of L(w; B), nothing else touched: .grad stays the trainer's."""
        return self.gradient_of(self.loss(batch))

    def gradient_of(self, loss: Tensor) -> Gradient:
        """The gradient of a loss of any making; a parameter that it does not reach gets zeros, a frozen one None."""
        free = [parameter for parameter in self.trainable.values() if parameter.requires_grad]
        values = iter(torch.autograd.grad(loss, free, materialize_grads=True, allow_unused=True))
        return Gradient(loss.detach(), [next(values) if p.requires_grad else None for p in self.trainable.values()])

    @contextmanager
    def apart(self, purpose: str) -> Iterator[None]:
        """For work beside the steps: no dropout, and random numbers of its own, which leave the steps' alone."""
        training = self.model.training
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, purpose))
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(training)

    @cached_property
    def taps(self) -> Taps:
        """Taps on the outputs of the attention blocks."""
        return Taps(self.model)

    def generator(self, purpose: str) -> torch.Generator:
        """A random stream of its own, on the CPU: drawing from it never reorders batches or dropout masks.

        The same purpose at the same micro-batch gives the same numbers, so an interrupted stage draws what it would
        have drawn.
        """
        return torch.Generator().manual_seed(derive(self.seed, self.name, purpose, self.step, self.micro))


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all tensors taken as one vector, a float32 scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in tensors]))
