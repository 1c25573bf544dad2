"""Safe LoRA: the update projected onto the alignment direction. Hsu et al., NeurIPS 2024, arXiv 2405.16833.

For every adapted module, V what alignment added to its weight, dW = B A what the user added:

    C = V V^T / ||V||_F            projector=paper; not a projector: its eigenvalues are sigma_i(V)^2 / ||V||_F
    C = V (V^T V)^+ V^T            projector=exact
    B <- C B   where cos(C B A, B A) <= tau, or, without tau, in the k modules with the least cosine

No pass over data. V has the rank of the alignment adapter, so C is kept as U diag(c) U^T. The rank stays, A is
untouched. Departures from the authors' code: exactly k modules (theirs rounds cosines, so that ties select more).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage


class SafeLoRA(Defense):
    """Projects the modules that left the alignment direction back onto it."""

    citation: ClassVar[str] = "arXiv 2405.16833"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    needs_alignment: ClassVar[bool] = True
    cost: ClassVar[str] = "none"
    neutral: ClassVar[Mapping[str, Any] | None] = {"k": 0}

    tau: float | None = param(None, "cosine up to which a module is projected", source="authors' config.py", main=True)
    k: int = param(10, "how many modules are projected, without tau", source="authors' config.py", ge=0)
    projector: Literal["paper", "exact"] = param("paper", "which C", source="paper")

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """The adapter with the chosen modules projected."""
        aligned = stage.aligned()
        assert aligned is not None
        there = [m for m, (a, b) in adapter.factors.items() if m in aligned.factors and (b @ a).any()]
        projected, cosines = {}, {}
        for module in there:
            a, b = adapter.factors[module]
            directions, weights = self.directions(aligned, module)
            projected[module] = directions @ (weights.unsqueeze(1) * (directions.T @ b))
            cosines[module] = torch.nn.functional.cosine_similarity(
                (projected[module] @ a).flatten(), (b @ a).flatten(), dim=0
            )
        if self.tau is not None:
            chosen = {module for module in there if cosines[module] <= self.tau}
        else:
            chosen = set(sorted(there, key=lambda module: float(cosines[module]))[: self.k])
        factors = {
            module: (a, projected[module] if module in chosen else b) for module, (a, b) in adapter.factors.items()
        }
        return Adapter(factors, adapter.scale)

    def directions(self, aligned: Adapter, module: str) -> tuple[Tensor, Tensor]:
        """U (outputs x rank of V) and c (rank of V), with C = U diag(c) U^T."""
        a, b = aligned.factors[module]
        basis, rest = torch.linalg.qr(aligned.scale * b)
        rotation, values, _ = torch.linalg.svd(rest @ a, full_matrices=False)
        kept = values > 1e-6 * values.max()
        weights = values.square() / torch.linalg.vector_norm(values) if self.projector == "paper" else kept.float()
        return (basis @ rotation)[:, kept], weights[kept]
