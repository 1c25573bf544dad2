"""Constrained SFT: limit how far the first response tokens move. Qi et al., ICLR 2025, arXiv 2406.05946.

For response token t, with D_t = log p_w(y_t | ..) - log p_w0(y_t | ..) and w0 the parameters before the user stage:

    loss = mean over response tokens of (2 / beta_t) * softplus(-beta_t D_t)
    its gradient = mean of omega_t * grad(-log p_w(y_t | ..)),   omega_t = 2 sigmoid(-beta_t D_t), a constant

beta_1 = beta_first, beta_2..5 = beta_early, later beta_rest; Adam's beta1 is 0.5. The gradient is computed in the
weighted form, which is finite at beta = 0 (omega = 1: SFT).

Cost of a step: 1 forward, 1 backward; once: 1 forward over every row, without dropout, for log p_w0.

Departures from the authors' code (Unispac/shallow-vs-deep-alignment): omega has no lower bound (theirs is at least
0.001, and the paper has no such bound); dropout stays at the protocol's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, TrainSettings, TuningGrid, param
from harmbench_vaccine.training.stage import (
    Batch,
    Gradient,
    TrainingStage,
    response_mask,
    response_weights,
    token_losses,
)

EARLY = 5
"""Position of the last response token that uses `beta_early`."""


class ConstrainedSFT(Defense):
    """Fine-tuning that weights each token by how far it has moved, most strictly the first ones."""

    citation: ClassVar[str] = "arXiv 2406.05946"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    once: ClassVar[str] = "1F over every user row"
    memory: ClassVar[str] = "one number for every token of the user's rows"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {
        "beta_first": 0.0,
        "beta_early": 0.0,
        "beta_rest": 0.0,
        "adam_beta1": 0.9,
    }
    grid: ClassVar[TuningGrid | None] = TuningGrid("beta_early")  # the strongest of the three

    beta_first: float = param(0.5, "strength at response token 1", source="authors' script, paper's table 3", ge=0)
    beta_early: float = param(2.0, "strength at tokens 2 to 5", source="authors' script, paper's table 3", ge=0)
    beta_rest: float = param(0.1, "strength at later tokens", source="authors' script, paper's table 3", ge=0)
    adam_beta1: float = param(0.5, "Adam's momentum (beta1)", source="authors' finetune.py", ge=0, le=1)

    _before: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))

    def settings(self, stage: StageName, settings: TrainSettings) -> TrainSettings:
        """Lower the momentum, so that the optimizer follows the constraint more closely."""
        return replace(settings, adam_beta1=self.adam_beta1)

    @torch.no_grad()
    def before(self, stage: TrainingStage) -> None:
        """Store -log p_w0 of every token of every row (rows x longest row - 1)."""
        width = max(len(row.ids) for row in stage.rows) - 1
        padded = []
        for batch in stage.training_batches(stage.settings.batch):
            mask = response_mask(batch)
            losses = torch.zeros(mask.shape, device=mask.device)
            losses[mask] = token_losses(stage.output(batch).logits, batch)
            padded.append(torch.nn.functional.pad(losses, (0, width - losses.shape[1])))
        self._before = torch.cat(padded)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the weighted gradient, with the paper's loss for the log."""
        mask = response_mask(batch)
        losses = token_losses(stage.output(batch).logits, batch)
        before = self._before.to(mask.device)[batch["rows"], : mask.shape[1]]
        shift = before[mask] - losses.detach()  # D
        beta = self._strengths(mask)[mask]
        weights = 2 * torch.sigmoid(-beta * shift) * response_weights(batch)
        count = stage.sum_over_ranks(mask.sum())
        gradient = stage.gradient_of((weights * losses).sum() / count)
        terms = torch.where(beta > 0, 2 / beta.clamp(min=1e-12) * torch.nn.functional.softplus(-beta * shift), losses)
        return replace(gradient, loss=stage.sum_over_ranks(terms.sum()) / count)

    def _strengths(self, mask: Tensor) -> Tensor:
        position = mask.cumsum(1)  # 1 at the first response token of a row
        beta = torch.where(position <= EARLY, self.beta_early, self.beta_rest)
        return torch.where(position == 1, self.beta_first, beta)

    def state(self) -> dict[str, Tensor]:
        """Return -log p_w0."""
        return {"before": self._before}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore -log p_w0."""
        self._before = state["before"]
