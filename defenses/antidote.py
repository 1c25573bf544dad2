"""Antidote: prune harmful parameters after fine-tuning. Huang et al., ICML 2025, arXiv 2408.09600.

For every matrix M of the user's update (A and B of each module), with x its inputs over all tokens of N harmful rows:

    a_j = sqrt(1/N sum x_j^2),   score_ij = |M_ij| a_j
    M_ij <- 0 where the score is in the top share alpha         scope=row: of each output row (the authors' code)
                                                                scope=model: of all entries of the adapter (the paper)

One forward pass over the N rows, no gradient; all scores are computed on the unpruned model. The rank is unchanged. A
pruned entry of the update is 0, so the weight returns to its aligned value. Labels are not used.

Departures from the authors' code (git-disl/Antidote, utils.py): padding does not count in a_j (their calibration passes
no attention mask, so that their scores depend on the batch size and the order of the rows); no harmful row is skipped
(their loop skips the first one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage


class Antidote(Defense):
    """Pruning of the update's entries that harmful inputs activate most."""

    citation: ClassVar[str] = "arXiv 2408.09600"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "1F over every harmful row"
    memory: ClassVar[str] = "one number for every input of every matrix"
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("alpha", share=True)

    alpha: float = param(0.1, "share of entries to prune", source="authors' SST2 script", main=True, ge=0, le=1)
    scope: Literal["row", "model"] = param(
        "row", "apply the share to each output row or to the entire adapter", source="authors' code"
    )

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the adapter without its highest-scoring entries."""
        norms = self.input_norms(stage, adapter)
        scores = {
            module: tuple(factor.abs() * norm for factor, norm in zip(factors, norms[module], strict=True))
            for module, factors in adapter.factors.items()
        }
        if self.scope == "model":
            all_scores = torch.cat([score.flatten() for pair in scores.values() for score in pair])
            sizes = [score.numel() for pair in scores.values() for score in pair]
            flat_masks = iter(torch.split(~top(all_scores, self.alpha), sizes))
            masks = {
                module: tuple(next(flat_masks).view_as(score) for score in pair) for module, pair in scores.items()
            }
        else:
            masks = {module: tuple(~top(score, self.alpha) for score in pair) for module, pair in scores.items()}
        pruned = {module: (a * masks[module][0], b * masks[module][1]) for module, (a, b) in adapter.factors.items()}
        return Adapter(pruned, adapter.scale)

    @torch.no_grad()
    def input_norms(self, stage: TrainingStage, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute a_j for the inputs of A and of B, in one pass over the harmful rows.

        Returns:
            Module name -> (a_j of the inputs of A, length inputs; a_j of the inputs of B, length rank).
        """
        sums = {
            module: [torch.zeros(a.shape[1]), torch.zeros(a.shape[0])] for module, (a, _) in adapter.factors.items()
        }
        token_mask = torch.empty(0)

        def add_squares(module: str, x: Tensor) -> None:
            x = x.float() * token_mask.to(x.device)
            a = adapter.factors[module][0].to(x.device)
            for square_sum, inputs in zip(sums[module], (x, x @ a.T), strict=True):
                square_sum += inputs.square().sum((0, 1)).cpu()

        rows = stage.pools.harmful
        with stage.module_inputs(adapter.factors, add_squares):
            for batch in stage.batches(rows, stage.settings.batch):
                token_mask = batch["attention_mask"].unsqueeze(-1)
                stage.output(batch)
        return {module: (a.div(len(rows)).sqrt(), b.div(len(rows)).sqrt()) for module, (a, b) in sums.items()}


def top(scores: Tensor, share: float) -> Tensor:
    """Return a mask of the d - floor(d (1 - share)) largest entries along the last dimension, of length d."""
    width = scores.shape[-1]
    count = width - math.floor(width * (1 - share) + 1e-9)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.topk(count, dim=-1).indices, True)
