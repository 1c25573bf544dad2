"""WiSE-FT: interpolate between the aligned and the fine-tuned model. Wortsman et al., CVPR 2022, arXiv 2109.01903.

With dW the update that the user stage added to the aligned model:

    W = W_aligned + alpha dW          alpha = 0 is the aligned model, alpha = 1 the fine-tuned one

No pass over data. As a LoRA: B <- alpha B, the rank and A are unchanged. alpha = 0.5 is the paper's recommendation
where nothing is known about the new data.

Departures from the paper: the model is an aligned language model and its update an adapter (the paper interpolates all
weights of a zero-shot image classifier, for robustness).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage


class WiSEFT(Defense):
    """Interpolation of the weights towards the aligned model."""

    citation: ClassVar[str] = "arXiv 2109.01903"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    cost: ClassVar[str] = "none"
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 1.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("alpha", share=True)

    alpha: float = param(0.5, "share of the user's update", source="paper's recommendation", main=True, ge=0, le=1)

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the user's update, alpha times as large."""
        # B instead of the scale: at alpha = 0, a later repair can still train the adapter
        return Adapter({module: (a, self.alpha * b) for module, (a, b) in adapter.factors.items()}, adapter.scale)
