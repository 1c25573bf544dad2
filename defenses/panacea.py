"""Panacea: train around a perturbation that raises harmful loss, then add it. Wang et al., arXiv 2501.18100.

The user's rows train the aligned adapter itself (single topology). With B_h harmful rows of the defender and one norm
over all trainable parameters:

    g_h = grad L(w; B_h),   eps = rho * g_h / (||g_h|| + 1e-7)
    w  <- w - lr * [grad L(w; B_u) - lam * (grad L(w + eps; B_h) - g_h)]        eps is a constant
    after the last step: w <- w + eps, the eps of the last batch

Cost of a step: 3 forward, 3 backward.

Departures from the authors' code (w-yibo/Panacea), which does not run as published: the harmful loss at w + eps is not
clipped at 5 (where it is clipped, its gradient is 0 and the step *lowers* the harmful loss); w is restored from a copy;
the two harmful passes see the same dropout masks; gradients of earlier micro-batches survive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, Topology, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class Panacea(Defense):
    """Fine-tuning that makes a harmful-loss-raising shift cheap for the user, followed by that shift."""

    citation: ClassVar[str] = "arXiv 2501.18100"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    topology: ClassVar[Topology | None] = "single"
    cost: ClassVar[str] = "3F 3B"
    memory: ClassVar[str] = "2 gradients and 2 copies of the adapter"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0, "lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rho")

    rho: float = param(1.0, "length of the perturbation (L2)", source="authors' script", main=True, ge=0)
    lam: float = param(0.001, "weight of the rise in harmful loss", source="authors' script", ge=0)

    _shift: list[Tensor | None] = PrivateAttr(default_factory=list)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the user's gradient minus the weighted change of the harmful gradient under the perturbation."""
        harmful = stage.stream("harmful", stage.pools.harmful)
        with same_dropout():
            harmful_gradient = stage.gradient(harmful)
        scale = self.rho / (harmful_gradient.norm + 1e-7)
        self._shift = [None if value is None else scale * value for value in harmful_gradient.values]
        with same_dropout(), stage.shifted(self._shift):
            shifted_gradient = stage.gradient(harmful)
        return stage.gradient(batch) - self.lam * (shifted_gradient - harmful_gradient)

    @torch.no_grad()
    def after_step(self, stage: TrainingStage) -> None:
        """Add the last perturbation to the parameters after the last step."""
        if stage.step == stage.steps:
            for parameter, shift in zip(stage.trainable.values(), self._shift, strict=True):
                if shift is not None:
                    parameter.add_(shift)
