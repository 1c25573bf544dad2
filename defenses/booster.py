"""Booster: attenuate harmful perturbation during alignment. Huang et al., ICLR 2025, arXiv 2409.01586.

With B_h harmful rows of the defender, the same in both terms, and the norm over all trainable parameters:

    g_h = grad L(w; B_h),   w' = w - alpha * g_h / (||g_h|| + 1e-7)
    g   = grad L(w; B_a) + lam * (g_h - grad L(w'; B_h))          dw'/dw is replaced by the identity
    w  <- w - lr * g

To first order the correction is lam * alpha * H g_h / ||g_h||: the step flattens the harmful loss along its gradient.

Cost of a step: 3 forward, 3 backward.

Departures from the authors' code (git-disl/Booster): w is restored from a copy (theirs adds alpha * g_h / ||g_h||
again, which leaves rounding errors); gradients of earlier micro-batches survive under accumulation; the two harmful
passes see the same dropout masks, so that only the perturbation makes them differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class Booster(Defense):
    """Alignment that reduces how much one harmful step can lower the harmful loss."""

    citation: ClassVar[str] = "arXiv 2409.01586"
    cost: ClassVar[str] = "3F 3B"
    memory: ClassVar[str] = "2 gradients and 1 copy of the adapter"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam")

    lam: float = param(
        5.0, "weight of the reduction in harmful loss", source="authors' smooth_align.sh", main=True, ge=0
    )
    alpha: float = param(0.1, "length of the simulated harmful step (L2)", source="authors' smooth_align.sh", ge=0)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the alignment gradient plus the change of the harmful gradient over a harmful step."""
        harmful = stage.stream("harmful", stage.pools.harmful)
        with same_dropout():
            harmful_gradient = stage.gradient(harmful)
        scale = -self.alpha / (harmful_gradient.norm + 1e-7)
        shifts = [None if value is None else scale * value for value in harmful_gradient.values]
        with same_dropout(), stage.shifted(shifts):
            shifted_gradient = stage.gradient(harmful)
        return stage.gradient(batch) + self.lam * (harmful_gradient - shifted_gradient)
