"""Lisa: alternate between the user's data and alignment data. Huang et al., NeurIPS 2024, arXiv 2405.18641.

Optimizer steps alternate between two states: k1 steps on alignment rows, then k2 on the user's rows, and so on. With
w_s the parameters at the first step of the current state:

    w <- w - lr * [grad L(w; B) + rho * (w - w_s)]            no proximal term in the first tenth of all steps

Cost of a step: 1 forward, 1 backward. An alignment step skips the user's batch, as in the authors' code, so that the
number of steps equals that of SFT.

Departures from the authors' code (git-disl/Lisa): k1 and k2 count optimizer steps (theirs count micro-batches).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class Lisa(Defense):
    """Alternation between alignment data and the user's data with a proximal term."""

    citation: ClassVar[str] = "arXiv 2405.18641"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    memory: ClassVar[str] = "1 copy of the adapter"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"k1": 0, "rho": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rho")

    k1: int = param(100, "consecutive steps on alignment data", source="authors' script", ge=0)
    k2: int = param(900, "consecutive steps on the user's data", source="authors' script", ge=1)
    rho: float = param(1.0, "weight of the proximal term", source="authors' script", main=True, ge=0)

    _anchor: list[Tensor] = PrivateAttr(default_factory=list)

    def aligning(self, step: int) -> bool:
        """Return whether a step, counted from 1, uses alignment data."""
        return (step - 1) % (self.k1 + self.k2) < self.k1

    def before_step(self, stage: TrainingStage) -> None:
        """Store the parameters at the first step of a state."""
        if stage.step == 1 or self.aligning(stage.step) != self.aligning(stage.step - 1):
            self._anchor = stage.values()

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the current state plus the proximal term."""
        if self.aligning(stage.step):
            batch = stage.stream("alignment", stage.pools.alignment)
        gradient = stage.gradient(batch)
        if stage.step <= 0.1 * stage.steps:
            return gradient
        shifts = [p.detach() - anchor for p, anchor in zip(stage.trainable.values(), self._anchor, strict=True)]
        half = 0.5 * torch.stack([shift.square().sum() for shift in shifts]).sum()
        return gradient + self.rho * Gradient(half, shifts)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters at the first step of the current state."""
        return {str(number): value for number, value in enumerate(self._anchor)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the parameters at the first step of the current state."""
        self._anchor = [state[str(number)] for number in range(len(state))]
