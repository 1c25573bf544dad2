"""Antibody: a flat harmful loss in alignment, and weights for the user's rows. arXiv 2603.00498, ICLR 2026.

Alignment, with u(g) = g / (||g|| + 1e-7), B_h harmful rows and B_r the refusals of their prompts:

    w'  = w - rho * u(grad L(w; B_h)),   g_s = grad L(w; B_h) - grad L(w'; B_h)
    lam = max(0, xi - <g_s, g_a> / ||g_s||^2),   g_a = grad L(w; B_a)
    w  <- w - lr * [g_a + lam * g_s + lam_r * grad L(w'; B_r)]

g = g_a + lam * g_s is the vector closest to g_a with <g, g_s> >= xi * ||g_s||^2; a constant lam would be Booster. User
stage, with r_i = log p(y_i | x_i) - log p(refusal | x_i) under the current model, both summed over tokens:

    w  <- w - lr * grad mean over response tokens of v_i * loss,   v = b * softmax(r / tau) over the b rows of a batch

A row that a refusal fits better loses weight. The weights v are computed without dropout, and are constants.

Cost of a step: alignment 4 forward, 4 backward; user stage 3 forward, 1 backward. No code of the authors was found;
rho, lam_r and tau are the values of another project, SafeTune. xi is ours: rho * xi is lam * alpha of Booster. The
refusal of the user stage is the first one of the defender's pairs.

Departures from SafeTune: xi is 10 (theirs is 0 by default); lam has no upper limit (theirs is 10); v weights the losses
of tokens (theirs weights the mean losses of rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmbench_vaccine.data.collate import IGNORED, Encoded
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


class Antibody(Defense):
    """Alignment that flattens the harmful loss, and fine-tuning that weights rows by how unlike refusals they are."""

    citation: ClassVar[str] = "arXiv 2603.00498"
    stages: ClassVar[tuple[StageName, ...]] = ("align", "finetune")
    cost: ClassVar[str] = "4F 4B"
    memory: ClassVar[str] = "3 gradients and 1 copy of the adapter"
    data: ClassVar[tuple[str, ...]] = ("paired safe and harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0, "lam_r": 0.0, "weights": False}
    grid: ClassVar[TuningGrid | None] = TuningGrid("xi")

    xi: float = param(10.0, "lower bound of <g, g_s> / ||g_s||^2", source="ours: as in Booster", main=True, ge=0)
    rho: float = param(0.05, "length of the simulated harmful step (L2)", source="SafeTune", ge=0)
    lam_r: float = param(1.0, "weight of the refusals after the harmful step", source="SafeTune", ge=0)
    weights: bool = param(True, "weight the user's rows", source="paper")
    tau: float = param(1.0, "temperature of the row weights", source="SafeTune", gt=0)

    def passes(self, stage: StageName) -> str:
        """Return the passes of a step: the user stage runs the model three times, two of them without a graph."""
        return self.cost if stage == "align" else "3F 1B" if self.weights else "1F 1B"

    def takes_gradient(self, stage: StageName) -> bool:
        """Return whether the stage is the alignment: the user stage changes the weights of the batch only."""
        return stage == "align"

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the alignment gradient plus the flattening term and the refusals after a harmful step."""
        refusals, harmful = stage.paired_stream("pairs", stage.pools.paired)
        with same_dropout():
            harmful_gradient = stage.gradient(harmful)
        scale = -self.rho / (harmful_gradient.norm + 1e-7)
        shifts = [None if value is None else scale * value for value in harmful_gradient.values]
        with same_dropout(), stage.shifted(shifts):
            flattening = harmful_gradient - stage.gradient(harmful)
        with same_dropout(), stage.shifted(shifts):
            refusal = stage.gradient(refusals)
        aligned = stage.gradient(batch)
        square = float(flattening.dot(flattening))
        lam = max(0.0, self.xi - float(flattening.dot(aligned)) / square) if square else 0.0
        return aligned + lam * flattening + self.lam_r * refusal

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        """Return the user's batch with the weights of its rows."""
        if stage.name == "align" or not self.weights:
            return batch
        refusal = stage.encoded("refusals", [safe for safe, _ in stage.pools.paired])[0]
        response = refusal.labeled_ids
        rows = [stage.rows[number] for number in batch["rows"].tolist()]
        refused = stage.collated([self._answered(row, response, stage.settings.max_length) for row in rows])
        with torch.no_grad(), stage.isolated("weights"):
            ratio = self._log_probability(stage, batch) - self._log_probability(stage, refused)
        return weighted(batch, len(rows) * (ratio / self.tau).softmax(0))

    @staticmethod
    def _answered(row: Encoded, response: list[int], max_length: int) -> Encoded:
        """Return the row with another response."""
        prompt = row.ids[: row.response_start]
        ids, labels = prompt + response, [IGNORED] * len(prompt) + response
        return replace(row, ids=ids[:max_length], labels=labels[:max_length])

    @staticmethod
    def _log_probability(stage: TrainingStage, batch: Batch) -> Tensor:
        """Return log p(y_i | x_i), summed over the response tokens of each row (rows)."""
        losses = token_losses(stage.output(batch).logits, batch)
        return -row_means(losses, batch) * response_mask(batch).sum(1)
