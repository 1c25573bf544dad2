"""Task arithmetic: subtract a harmful task vector. Ilharco et al., ICLR 2023, arXiv 2212.04089.

With dW_h the update that training on harmful rows adds to the *base* model (the task vector of the unwanted behavior):

    dW <- dW - lam * dW_h

The only cost at repair time is that training run. All runs of one protocol, base model and seed share it, for any
alignment, topology or attack. As a LoRA its rank is the sum of both ranks. `resta` is the same formula with dW_h
trained on the aligned model.

Departures from the paper: dW_h is subtracted from a model that was aligned and fine-tuned after the base model (the
paper subtracts it from the base model); dW_h is a LoRA, trained on the defender's harmful rows with the protocol's
settings for the user stage (the paper trains all weights); lam is a parameter (the paper chooses it on held-out data).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, SeparateTraining, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter, concatenate
from harmbench_vaccine.training.stage import TrainingStage


class TaskArithmetic(Defense):
    """Subtraction of the update that makes the base model harmful."""

    citation: ClassVar[str] = "arXiv 2212.04089"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "one user stage on harmful rows, from the base model"
    memory: ClassVar[str] = "a second adapter"
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam")

    lam: float = param(
        0.5, "weight of the harmful task vector", source="ours: the paper chooses it on held-out data", main=True, ge=0
    )

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        """Return the training on harmful rows."""
        return (SeparateTraining("harmful task", "harmful", on_base=True),) if self.lam else ()

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the adapter minus lam times the harmful task vector."""
        if self.lam == 0:
            return adapter
        harmful = stage.train_separately("harmful task", stage.pools.harmful, on_base=True)
        return concatenate([adapter, harmful.scaled(-self.lam)])
