"""AsFT: penalize the part of the update that leaves the alignment direction. Yang et al., arXiv 2506.08473.

For every adapted module, with V the update of its weight by alignment and B A the user's update without the LoRA scale:

    C    = V V^T / ||V||_F          projector=paper;   C = V (V^T V)^+ V^T   projector=exact
    loss = L(w; B_u) + lam * sum over modules of ||(I - C) B A||_F^2

V is low-rank: C = U diag(c) U^T. With R = (I - C)^2 B = B - U diag(2c - c^2) U^T B, the gradient of the penalty is
2 lam R A A^T for B and 2 lam B^T R A for A, so that no matrix of outputs x outputs is formed.

Cost of a step: 1 forward, 1 backward. The paper's C is not a projector: for a small V it vanishes, and for rank 1 and
||V||_F > 2 the aligned direction is penalized most.

Departures from the authors' code (PKU-YuanGroup/AsFT): V is the protocol's alignment (theirs is a chat model minus its
base model); the penalty does not grow with accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, Topology, TuningGrid, param
from harmbench_vaccine.training.projection import alignment_projector
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class AsFT(Defense):
    """Fine-tuning with a penalty on the update outside of the alignment direction."""

    citation: ClassVar[str] = "arXiv 2506.08473"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    topology: ClassVar[Topology | None] = "double"
    needs_adapter: ClassVar[bool] = True
    needs_alignment: ClassVar[bool] = True
    memory: ClassVar[str] = "the left singular vectors of the alignment update"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam")

    lam: float = param(1.0, "weight of the penalty", source="authors' script", main=True, ge=0)
    projector: Literal["paper", "exact"] = param("paper", "formula of C", source="paper")
    scaled: bool = param(False, "penalize the scaled update (alpha / rank) B A", source="authors' code")

    _projectors: dict[str, tuple[Tensor, Tensor]] = PrivateAttr(default_factory=dict)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the user's gradient plus the gradient of the penalty."""
        with torch.no_grad():
            penalty = self._penalty(stage)
        return stage.gradient(batch) + self.lam * penalty

    def _penalty(self, stage: TrainingStage) -> Gradient:
        """Return the sum of ||(I - C) B A||_F^2 over the modules, with its gradient."""
        if not self._projectors:
            self._projectors = self._all_projectors(stage)
        factor = (stage.settings.lora_alpha / stage.settings.lora_rank) ** 2 if self.scaled else 1.0
        loss, gradients = torch.zeros((), device=stage.device), {}
        for module, (a, b) in stage.factors.items():
            rest: Tensor = b
            if module in self._projectors:
                directions, weights = self._projectors[module]
                rest = b - directions @ (weights.unsqueeze(1) * (directions.T @ b))
            loss = loss + factor * ((b.T @ rest) * (a @ a.T)).sum()
            gradients[id(a)], gradients[id(b)] = 2 * factor * b.T @ rest @ a, 2 * factor * rest @ (a @ a.T)
        return Gradient(loss, [gradients[id(parameter)] for parameter in stage.trainable.values()])

    def _all_projectors(self, stage: TrainingStage) -> dict[str, tuple[Tensor, Tensor]]:
        """Return module -> U and 2c - c^2."""
        aligned = stage.alignment_adapter()
        assert aligned is not None
        projectors = {}
        for module in aligned.factors:
            directions, c = alignment_projector(aligned, module, self.projector)
            projectors[module] = directions.to(stage.device), (2 * c - c.square()).to(stage.device)
        return projectors
