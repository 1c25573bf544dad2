"""LDIFS: features stay where they were. Mukhoti et al., TMLR 2024, arXiv 2308.13320.

With h_l the features of the present model at layer l, h0_l those of the model before the user stage, u(v) = v / ||v||:

    paper:     w <- w - lr * grad [L(w; B_u) + alpha * mean (u(h_l) - u(h0_l))^2]
    git-disl:  w <- w - lr * grad [L(w; B_u) + sum_l 1[d_l < 0.1] d_l],   d_l = alpha / 2 * ||h_l - h0_l||_F^2

paper: outputs of the decoder layers, the mean over layers, real tokens and dimensions. git-disl: outputs of the MLPs;
its alpha is 1e-4.

Cost a step: 2 forward (the reference without a graph), 1 backward. The reference is the same model with the user's
adapter switched off.

Departures: the paper's model is an image encoder, whose code normalises over the token axis; here each token's features
are normalised. The git-disl variant (Booster's repository) counts prompt and padding alike; here padding never counts.
It drops a layer's penalty exactly when its drift is large, which is kept, being what its figures were made with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from harmbench_vaccine.plugins import Defense, StageName, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, attended_tokens

GATE = 0.1
"""A layer's penalty from which git-disl's code drops it."""


class LDIFS(Defense):
    """Penalises the distance of features from the aligned model's."""

    citation: ClassVar[str] = "arXiv 2308.13320"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    needs_adapter: ClassVar[bool] = True
    cost: ClassVar[str] = "2F 1B"
    memory: ClassVar[str] = "the features of every layer of a batch, twice"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}

    alpha: float = param(10.0, "weight of the feature distance", source="authors' args.py", main=True, ge=0)
    variant: Literal["paper", "git-disl"] = param("paper", "which distance", source="paper")

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """The gradient of the user's loss and of the distance."""
        taps = stage.taps_on("layer" if self.variant == "paper" else "mlp")
        with stage.reference(), taps.recorded() as before:
            stage.output(batch)
        with taps.recorded() as now:
            loss = stage.loss(batch)
        real = attended_tokens(batch)
        pairs = [(new[real].float(), old[real].float()) for new, old in zip(now, before, strict=True)]
        return stage.gradient_of(loss + self.alpha * self.distance(pairs, stage.total))

    def distance(self, pairs: list[tuple[Tensor, Tensor]], total: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
        """The distance for alpha = 1 of (features, features before) of every layer, each (tokens x width); `total` adds
        up over ranks."""
        if self.variant == "paper":
            units = [[nn.functional.normalize(each, dim=-1) for each in pair] for pair in pairs]
            count = total(torch.tensor(pairs[0][0].numel(), device=pairs[0][0].device))
            return torch.stack([(new - old).square().sum() / count for new, old in units]).mean()
        terms = torch.stack([(new - old).square().sum() / 2 for new, old in pairs])
        return terms[self.alpha * total(terms) < GATE].sum()
