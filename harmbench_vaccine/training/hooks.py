"""The hooks that the trainer calls around and inside a training stage."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .stage import Batch, Gradient, TrainingStage


class StepHooks(Protocol):
    """The part of a defense that the trainer uses."""

    def before(self, stage: TrainingStage) -> None:
        """Run once before the first step, without dropout; a resumed stage skips it."""

    def before_step(self, stage: TrainingStage) -> None:
        """Run before the first micro-batch of every optimizer step."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the loss and the gradient of one micro-batch."""
        ...

    def after_step(self, stage: TrainingStage) -> None:
        """Run after every optimizer step."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors that `state` returned."""


class PlainFinetuning:
    """The hooks of plain supervised fine-tuning: only the gradient does something."""

    def before(self, stage: TrainingStage) -> None:
        """Do nothing."""

    def before_step(self, stage: TrainingStage) -> None:
        """Do nothing."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the mean cross-entropy over response tokens."""
        return stage.gradient(batch)

    def after_step(self, stage: TrainingStage) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""
