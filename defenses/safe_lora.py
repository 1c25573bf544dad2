"""Safe LoRA: project the update onto the alignment direction. Hsu et al., NeurIPS 2024, arXiv 2405.16833.

For every adapted module, with V the update of its weight by alignment and dW = B A the update by the user:

    C = V V^T / ||V||_F            projector=paper; not a true projector: its eigenvalues are sigma_i(V)^2 / ||V||_F
    C = V (V^T V)^+ V^T            projector=exact
    B <- C B   where cos(C B A, B A) <= tau, or, without tau, in the k modules with the smallest cosine

No pass over data. V has the rank of the alignment adapter, so C is stored as U diag(c) U^T. The rank and A are
unchanged.

Departures from the authors' code (IBM/SafeLoRA): exactly k modules are edited (theirs rounds cosines, so that ties
select more).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.projection import projected_update
from harmbench_vaccine.training.stage import TrainingStage


class SafeLoRA(Defense):
    """Projection of the modules that moved away from the alignment direction."""

    citation: ClassVar[str] = "arXiv 2405.16833"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    needs_alignment: ClassVar[bool] = True
    cost: ClassVar[str] = "none"
    neutral: ClassVar[Mapping[str, Any] | None] = {"k": 0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("k", step=2)  # so that it remains below the number of modules

    tau: float | None = param(
        None, "project modules with a cosine of at most tau", source="authors' config.py", main=True
    )
    k: int = param(10, "number of modules to project if tau is none", source="authors' config.py", ge=0)
    projector: Literal["paper", "exact"] = param("paper", "formula of C", source="paper")

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the adapter with the selected modules projected."""
        aligned = stage.alignment_adapter()
        assert aligned is not None
        candidates = [m for m, (a, b) in adapter.factors.items() if m in aligned.factors and (b @ a).any()]
        projections = {module: projected_update(aligned, adapter, module, self.projector) for module in candidates}
        cosines = {module: cosine for module, (_, cosine) in projections.items()}
        if self.tau is not None:
            selected = {module for module in candidates if cosines[module] <= self.tau}
        else:
            selected = set(sorted(candidates, key=lambda module: cosines[module])[: self.k])
        factors = {
            module: (a, projections[module][0] if module in selected else b)
            for module, (a, b) in adapter.factors.items()
        }
        return Adapter(factors, adapter.scale)
