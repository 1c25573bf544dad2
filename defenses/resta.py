"""RESTA: add a safety vector back after fine-tuning. Bhardwaj et al., ACL 2024, arXiv 2402.11746.

With dW_h the update that harmful fine-tuning adds to the *aligned* model, trained with the protocol's settings for the
user stage:

    dW <- dW - gamma * dW_h          the safety vector is -dW_h

The only cost at repair time is that training run, which all runs of one aligned model share. As a LoRA the sum has both
ranks: A' = [A; A_h], B' = [B, -gamma B_h].

The authors' code (declare-lab/resta) merges complete checkpoints with mergekit. Its scripts were not compared line by
line. gamma = 0.5 is the value reported for the paper; it is not verified.

Departures from the paper: there is no DARE (RESTA_d), which drops random entries of dW and rescales the rest, because a
sparse dW has full rank; dW_h is trained on the defender's harmful rows, starting at the aligned model of the protocol
(the authors start at Llama-2-Chat and use their own harmful questions and answers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, SeparateTraining, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter, concatenate
from harmbench_vaccine.training.stage import TrainingStage


class RESTA(Defense):
    """Subtraction of the update that harmful fine-tuning adds."""

    citation: ClassVar[str] = "arXiv 2402.11746"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "one user stage on harmful rows"
    memory: ClassVar[str] = "a second adapter"
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"gamma": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("gamma")

    gamma: float = param(
        0.5, "weight of the safety vector", source="value reported for the paper, not verified", main=True, ge=0
    )

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        """Return the training on harmful rows."""
        return (SeparateTraining("unaligned", "harmful"),) if self.gamma else ()

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the adapter minus gamma times the harmful adapter."""
        if self.gamma == 0:
            return adapter
        harmful = stage.train_separately("unaligned", stage.pools.harmful)
        return concatenate([adapter, harmful.scaled(-self.gamma)])
