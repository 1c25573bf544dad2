"""Vaccine: perturbation-aware alignment. Huang, Hu, Liu, NeurIPS 2024, arXiv 2402.01109.

With h_l the output of attention block l (before the residual), g_l = dL/dh_l at w, over every row and real token:

    eps_l = rho * g_l / (||(g_1, ..., g_L)|| + 1e-7)            one norm over all blocks (eq. 3)
    L'(w) = L(w; B_a) with h_l replaced by h_l + eps_l          eps is a constant
    w    <- w - lr * grad L'(w)

Cost of a perturbed step: 2 forward, 2 backward; the first backward stops at the activations. With tau > 1 (appendix A,
algorithm 2) step t is perturbed if and only if t mod tau = 0, and the other steps use the clean gradient.

Departures from the authors' code (git-disl/Vaccine): padding is masked explicitly; both passes see the same dropout
masks, so that eps is computed for the same function that it perturbs and rho = 0 is exactly SFT; the norm is computed
in float32; gradients of earlier micro-batches survive under accumulation (the authors' code zeroes them inside the
step).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from harmbench_vaccine.plugins import Defense, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class Vaccine(Defense):
    """Alignment under the worst-case shift of the hidden embeddings within an L2 ball of radius rho."""

    citation: ClassVar[str] = "arXiv 2402.01109"
    cost: ClassVar[str] = "2F 2B"
    memory: ClassVar[str] = "the attention outputs of every layer for one batch"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rho")

    rho: float = param(
        2.0,
        "radius: the L2 norm of the shift over all blocks, rows and tokens",
        source="paper, section 5.1",
        main=True,
        ge=0,
    )
    tau: int = param(1, "perturb every tau-th optimizer step", source="paper, algorithm 1 (every step)", ge=1)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient at the perturbed embeddings, or the clean gradient between perturbed steps."""
        if stage.step % self.tau:
            return stage.gradient(batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        with same_dropout(), stage.taps.probed() as probes:
            gradients = [gradient * mask for gradient in torch.autograd.grad(stage.loss(batch), probes)]
        scale = self.rho / (stage.norm(gradients) + 1e-7)
        with stage.taps.shifted([gradient.mul_(scale) for gradient in gradients]):  # in place: one copy of the shifts
            return stage.gradient(batch)
