"""Antidote: harmful parameters pruned after fine-tuning. Huang et al., ICML 2025, arXiv 2408.09600.

For every matrix M of the user's update (A and B of each module), with x its inputs over all tokens of N harmful rows:

    a_j = sqrt(1/N sum x_j^2),   score_ij = |M_ij| a_j
    M_ij <- 0 where the score is among the top share alpha      scope=row: of each output row (the authors' code)
                                                                scope=model: of all entries of the adapter (the paper)

One pass of the N rows, no gradient; all scores are of the unpruned model. The rank stays. An entry returns to 0, so the
weight returns to the aligned one's. Labels play no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage


class Antidote(Defense):
    """Prunes what harmful inputs use most."""

    citation: ClassVar[str] = "arXiv 2408.09600"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "1F of every harmful row"
    memory: ClassVar[str] = "a number for every input of every matrix"
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}

    alpha: float = param(0.1, "share that is pruned", source="authors' SST2 script", main=True, ge=0, le=1)
    scope: Literal["row", "model"] = param("row", "what the share is taken of", source="authors' code")

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """The adapter without its harmful entries."""
        norms = self.input_norms(stage, adapter)
        scores = {
            module: tuple(factor.abs() * norm for factor, norm in zip(factors, norms[module], strict=True))
            for module, factors in adapter.factors.items()
        }
        if self.scope == "model":
            every = torch.cat([score.flatten() for pair in scores.values() for score in pair])
            kept = iter(torch.split(~top(every, self.alpha), [s.numel() for pair in scores.values() for s in pair]))
            keep = {module: tuple(next(kept).view_as(score) for score in pair) for module, pair in scores.items()}
        else:
            keep = {module: tuple(~top(score, self.alpha) for score in pair) for module, pair in scores.items()}
        pruned = {module: (a * keep[module][0], b * keep[module][1]) for module, (a, b) in adapter.factors.items()}
        return Adapter(pruned, adapter.scale)

    @torch.no_grad()
    def input_norms(self, stage: TrainingStage, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> a_j of the inputs of A (length inputs) and of B (length rank)."""
        sums = {
            module: [torch.zeros(a.shape[1]), torch.zeros(a.shape[0])] for module, (a, _) in adapter.factors.items()
        }
        real = torch.empty(0)

        def see(module: str, x: Tensor) -> None:
            x = x.float() * real.to(x.device)
            a = adapter.factors[module][0].to(x.device)
            for total, inputs in zip(sums[module], (x, x @ a.T), strict=True):
                total += inputs.square().sum((0, 1)).cpu()

        rows = stage.pools.harmful
        with stage.inputs(adapter.factors, see):
            for batch in stage.batches(rows, stage.settings.batch):
                real = batch["attention_mask"].unsqueeze(-1)
                stage.output(batch)
        return {
            module: (of_a.div(len(rows)).sqrt(), of_b.div(len(rows)).sqrt()) for module, (of_a, of_b) in sums.items()
        }


def top(scores: Tensor, share: float) -> Tensor:
    """The mask of the d - floor(d (1 - share)) largest along the last dimension, which is d long."""
    width = scores.shape[-1]
    count = width - math.floor(width * (1 - share) + 1e-9)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.topk(count, dim=-1).indices, True)
