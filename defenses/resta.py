"""RESTA: the safety vector added back. Bhardwaj et al., ACL 2024, arXiv 2402.11746.

With dW_h what harmful fine-tuning of the *aligned* model adds to its weights, as long as the user's by the protocol:

    dW <- dW - gamma * dW_h          the safety vector is -dW_h

No pass at repair time besides that training run, which the cells of one aligned model share. As a LoRA the sum has both
ranks: A' = [A; A_h], B' = [B, -gamma B_h]. Without DARE (RESTA_d), whose dropped entries of dW are of full rank. The
authors publish no code; gamma = 0.5 is reported of the paper, unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, StageName, param
from harmbench_vaccine.training.adapters import Adapter, concatenate
from harmbench_vaccine.training.stage import TrainingStage


class RESTA(Defense):
    """Subtracts what harmful fine-tuning would have added."""

    citation: ClassVar[str] = "arXiv 2402.11746"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "a user stage on harmful rows"
    memory: ClassVar[str] = "a second adapter"
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"gamma": 0.0}

    gamma: float = param(
        0.5, "weight of the safety vector", source="reported of the paper, unverified", main=True, ge=0
    )

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """The adapter less the harmful one."""
        if self.gamma == 0:
            return adapter
        harmful = stage.train_separately("unaligned", stage.pools.harmful)
        return concatenate([adapter, harmful.scaled(-self.gamma)])
