"""The figures of an estimate: the size of a model, the times of a batch, the cost of a stage."""

from __future__ import annotations

from dataclasses import dataclass

Kind = tuple[str, str]
"""A stage and an empty text, or `nested` and the name of a separate training, such as `align: aligned`."""


@dataclass(frozen=True)
class ModelSize:
    """The weights of a model."""

    weights: int
    """Bytes of all weights."""
    matrices: int
    """Numbers in the matrices of the layers and of the head; a token is multiplied with each of them once."""


@dataclass(frozen=True)
class TrainingMemory(ModelSize):
    """Memory while training, in bytes."""

    adapter: int
    """The adapter with its gradient and the two moments of the optimizer."""
    activations: int
    """Tensors that a forward pass keeps for the backward pass."""

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return self.weights + self.adapter + self.activations


@dataclass(frozen=True)
class BatchSeconds:
    """Times for one batch, in seconds."""

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0
    """The optimizer's step."""
    token: float = 0.0
    """One generated token of every row."""


@dataclass(frozen=True)
class Estimate:
    """The cost of one stage."""

    stage: str
    seconds: float
    memory: int
    """Peak memory in bytes."""
    detail: str
    disk: int
    """Bytes of the stored adapter and of two checkpoints, while one replaces the other."""
    timed: bool
    """Whether batches were timed on this machine; else the time follows from the rates of a device."""
    artifacts: int = 1
    """Number of artifacts that the stage creates."""
    training: str = ""
    """The stage and the purpose of a separate training, whose `stage` is `nested`; empty for a stage."""

    @property
    def kind(self) -> Kind:
        """The stage or the separate training that is estimated."""
        return self.stage, self.training
