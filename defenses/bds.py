"""BDS, Bayesian data scheduler: learn a weight for each user row. Hu et al., NeurIPS 2025, arXiv 2510.27172.

With one logit s_i for each of the N user rows, p = softmax(s), weights w_i = N p_i, and L_i the mean loss of row i:

    theta <- theta - lr_theta * grad [safe * mean over B_a of L_i + mean over B_u of w_i L_i]           w is a constant
    s     <- Adam step of rate lr on mean over B_u of w_i L_i                                           L is a constant
    gradient of this loss for s_k: N/b p_k ([k in B_u] L_k - sum over B_u of p_i L_i)         b rows in B_u

A row that a safe model finds unlikely loses weight. This needs the safe term: without it the losses of harmful rows
fall too. The logit of a row outside of B_u rises. Cost of a step: 2 forward, 2 backward. mean=tokens replaces the row
means in the first line by means over response tokens, as in SFT; the logits always use row means. With accumulation,
both lines use the mean over the micro-batches of a step.

Departures from the paper and from the authors' code (Egg-Hu/Bayesian-Data-Scheduler): the optimizer of theta, its rate
and the rows are the protocol's; there is no Langevin noise, and the priors are flat, as in their script and in contrast
to the paper's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import (
    Batch,
    Gradient,
    TrainingStage,
    response_mask,
    row_means,
    same_dropout,
    token_losses,
    weighted,
)

BETAS = 0.9, 0.95
"""Adam's betas for the logits, from the authors' trainer."""


class BDS(Defense):
    """Fine-tuning with a learned weight for each of the user's rows."""

    citation: ClassVar[str] = "arXiv 2510.27172"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    cost: ClassVar[str] = "2F 2B"
    memory: ClassVar[str] = "3 numbers for each user row"
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"lr": 0.0, "safe": 0.0, "mean": "tokens"}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lr")

    lr: float = param(5e-3, "learning rate of the logits", source="authors' script", main=True, ge=0)
    safe: float = param(1.0, "weight of the safe rows", source="authors' trainer", ge=0)
    mean: Literal["rows", "tokens"] = param("rows", "mean of the losses of theta", source="authors' trainer")

    _logits: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))
    _moments: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))
    _gradients: list[Tensor] = PrivateAttr(default_factory=list)

    def before(self, stage: TrainingStage) -> None:
        """Start with equal weights."""
        self._logits = torch.full((len(stage.rows),), 0.1, dtype=torch.float64)
        self._moments = torch.zeros(2, len(stage.rows), dtype=torch.float64)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the safe rows and of the weighted user rows."""
        with same_dropout():
            safe_rows = stage.stream("safe", stage.pools.alignment)
            safe = stage.gradient(self._weighted(safe_rows, torch.ones(len(safe_rows["labels"]), device=stage.device)))
        numbers = batch["rows"].cpu()
        weights = len(self._logits) * self._logits.softmax(0)[numbers]
        output = stage.output(self._weighted(batch, weights.to(stage.device)))
        losses = row_means(token_losses(output.logits.detach(), batch), batch)
        user = stage.gradient_of(output.loss)
        self._gradients.append(self._gradient_of_logits(numbers, losses.cpu().double()))
        return self.safe * safe + user

    def _weighted(self, batch: Batch, weights: Tensor) -> Batch:
        """Return the batch with weights that give the weighted mean over rows or over tokens."""
        if self.mean == "rows":
            counts = response_mask(batch).sum(1)
            weights = weights * counts.sum() / (len(counts) * counts.clamp(min=1))
        return weighted(batch, weights)

    def _gradient_of_logits(self, numbers: Tensor, losses: Tensor) -> Tensor:
        """Return the gradient of the mean of w_i L_i.

        Args:
            numbers: The numbers of the rows of the batch.
            losses: Their mean losses.
        """
        p = self._logits.softmax(0)
        gradient = -(p[numbers] * losses).sum() * p
        gradient[numbers] += p[numbers] * losses
        return gradient * len(p) / len(numbers)

    def after_step(self, stage: TrainingStage) -> None:
        """Take one Adam step on the logits."""
        gradient = torch.stack(self._gradients).mean(0)
        self._gradients.clear()
        first, second = self._moments
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        corrections = [1 - beta**stage.step for beta in BETAS]
        self._logits = self._logits - self.lr * first / corrections[0] / (second / corrections[1]).sqrt().add(1e-8)

    def state(self) -> dict[str, Tensor]:
        """Return the logits and the state of their optimizer."""
        return {"logits": self._logits, "moments": self._moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the logits and the state of their optimizer."""
        self._logits, self._moments = state["logits"].cpu(), state["moments"].cpu()
