"""Lisa: alternating between the user's data and alignment data. Huang et al., NeurIPS 2024, arXiv 2405.18641.

Optimizer steps go by states, k1 on alignment rows, then k2 on the user's, and so on. With w_s the parameters at which
the present state began:

    w <- w - lr * [grad L(w; B) + rho * (w - w_s)]            no proximal term in the first tenth of all steps

Cost a step: 1 forward, 1 backward. The user's batch of an alignment step is passed over, as in the authors' code, so
that the number of steps is SFT's. A state's clock counts optimizer steps (theirs counts micro-batches).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class Lisa(Defense):
    """Two-state alternation with a proximal term."""

    citation: ClassVar[str] = "arXiv 2405.18641"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    memory: ClassVar[str] = "1 copy of the adapter"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"k1": 0, "rho": 0.0}

    k1: int = param(100, "steps on alignment data in a row", source="authors' script", ge=0)
    k2: int = param(900, "steps on the user's data in a row", source="authors' script", ge=1)
    rho: float = param(1.0, "weight of the proximal term", source="authors' script", main=True, ge=0)

    _anchor: list[Tensor] = PrivateAttr(default_factory=list)

    def aligning(self, step: int) -> bool:
        """Whether a step, counted from 1, is on alignment data."""
        return (step - 1) % (self.k1 + self.k2) < self.k1

    def before_step(self, stage: TrainingStage) -> None:
        """Keeps the parameters at which a state begins."""
        if stage.step == 1 or self.aligning(stage.step) != self.aligning(stage.step - 1):
            self._anchor = stage.values()

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """The gradient of the present state."""
        if self.aligning(stage.step):
            batch = stage.stream("alignment", stage.pools.alignment)
        own = stage.gradient(batch)
        if stage.step <= 0.1 * stage.steps:
            return own
        moved = [p.detach() - anchor for p, anchor in zip(stage.trainable.values(), self._anchor, strict=True)]
        half = 0.5 * torch.stack([value.square().sum() for value in moved]).sum()
        return own + self.rho * Gradient(half, moved)

    def state(self) -> dict[str, Tensor]:
        """Where the present state began."""
        return {str(number): value for number, value in enumerate(self._anchor)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes it back."""
        self._anchor = [state[str(number)] for number in range(len(state))]
