"""LDIFS: keep hidden features close to their initial values. Mukhoti et al., TMLR 2024, arXiv 2308.13320.

With h_l the features of the current model at layer l, h0_l those of the model before the user stage, u(v) = v / ||v||:

    paper:     w <- w - lr * grad [L(w; B_u) + alpha * mean (u(h_l) - u(h0_l))^2]
    git-disl:  w <- w - lr * grad [L(w; B_u) + sum_l 1[d_l < 0.1] d_l],   d_l = alpha / 2 * ||h_l - h0_l||_F^2

paper: h_l is the output of decoder layer l; the mean is over layers, real tokens and dimensions. git-disl: h_l is the
output of the MLP of layer l; its alpha is 1e-4. This variant, from the Booster code, drops the penalty of a layer
exactly when its drift is large. This is unchanged, because its published figures were computed this way.

Cost of a step: 2 forward (the reference without a graph), 1 backward. The reference is the same model with the user's
adapter disabled.

Departures: the features are those of a language model (the paper's model is an image encoder); the features of each
token are normalized (the code of the paper normalizes over the token axis); padding does not count in the variant
git-disl (the Booster code counts prompt and padding).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, attended_tokens

GATE = 0.1
"""Penalty of a layer from which the git-disl variant drops it."""


class LDIFS(Defense):
    """Fine-tuning with a penalty on the distance of features from the aligned model's."""

    citation: ClassVar[str] = "arXiv 2308.13320"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    needs_adapter: ClassVar[bool] = True
    cost: ClassVar[str] = "2F 1B"
    memory: ClassVar[str] = "the features of every layer for one batch, twice"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("alpha")

    alpha: float = param(10.0, "weight of the feature distance", source="authors' args.py", main=True, ge=0)
    variant: Literal["paper", "git-disl"] = param(
        "paper", "feature distance of the paper or of the Booster code (git-disl)", source="paper"
    )

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the user's loss plus the weighted distance."""
        taps = stage.taps_on("layer" if self.variant == "paper" else "mlp")
        with stage.reference(), taps.recorded() as initial:
            stage.output(batch)
        with taps.recorded() as current:
            loss = stage.loss(batch)
        tokens = attended_tokens(batch)
        pairs = [(new[tokens].float(), old[tokens].float()) for new, old in zip(current, initial, strict=True)]
        return stage.gradient_of(loss + self.alpha * self.distance(pairs, stage.sum_over_ranks))

    def distance(
        self, pairs: list[tuple[Tensor, Tensor]], sum_over_ranks: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> Tensor:
        """Compute the feature distance at alpha = 1.

        Args:
            pairs: (current features, initial features) of every layer, each (tokens x width).
            sum_over_ranks: Sums a value over ranks; the default is for one rank.

        Returns:
            A scalar with a graph: this rank's share of the distance.
        """
        if self.variant == "paper":
            units = [[nn.functional.normalize(features, dim=-1) for features in pair] for pair in pairs]
            count = sum_over_ranks(torch.tensor(pairs[0][0].numel(), device=pairs[0][0].device))
            return torch.stack([(new - old).square().sum() / count for new, old in units]).mean()
        terms = torch.stack([(new - old).square().sum() / 2 for new, old in pairs])
        return terms[self.alpha * sum_over_ranks(terms) < GATE].sum()
