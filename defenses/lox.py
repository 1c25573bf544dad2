"""LoX: extrapolate the leading directions of alignment. Perin et al., COLM 2025, arXiv 2506.15606.

For every adapted module, with V the update of its weight by alignment and U_k the first k left singular vectors of V:

    V <- V + alpha U_k U_k^T V          as a LoRA: B <- B + alpha U_k U_k^T B, the rank and A are unchanged

The edit follows the last alignment step; no pass over data, one small SVD for each module. The first k singular values
of V grow by the factor 1 + alpha, so if k is at least the rank, the entire update grows.

Departures: k is a parameter (the paper is reported to choose, for each model, the smallest rank that preserves the
safety of the aligned model); V is the adapter itself, so that it is exact (in the authors' code, VITA-Group/LoX, V is a
difference of weights in bfloat16); only adapted modules have a V (theirs: every matrix of the model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.projection import left_singular_vectors
from harmbench_vaccine.training.stage import TrainingStage


class LoX(Defense):
    """Extrapolation of the alignment update along its leading directions."""

    citation: ClassVar[str] = "arXiv 2506.15606"
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("alpha")

    alpha: float = param(
        1.25, "factor of the added update", source="reported for the paper (Llama-2-7B), not verified", main=True, ge=0
    )
    k: int = param(6, "number of directions", source="reported for the paper (Llama-2-7B), not verified", ge=1)

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the alignment adapter with its leading directions extrapolated."""
        factors = {}
        for module, (a, b) in adapter.factors.items():
            directions = left_singular_vectors(adapter, module)[0][:, : self.k]
            factors[module] = (a, b + self.alpha * (directions @ (directions.T @ b)))
        return Adapter(factors, adapter.scale)
