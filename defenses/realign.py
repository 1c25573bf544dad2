"""Realign: supervised fine-tuning on alignment data once more, after the user stage.

    steps optimizer steps of min_w L(w; B_a), from the user's update

The post-hoc mode of VLGuard (arXiv 2402.02207), and the control of every repair. Cost: 1 forward, 1 backward a step.
The update itself is trained on, with a fresh optimizer and the settings of the protocol's user stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, StageName, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage


class Realign(Defense):
    """Aligns the tuned model again."""

    citation: ClassVar[str] = "arXiv 2402.02207"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"steps": 0}

    steps: int = param(
        400, "optimizer steps", source="one epoch of 2000 rows, batch 5; no single source", main=True, ge=0
    )

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """The adapter, trained on."""
        return stage.train_separately("realigned", stage.pools.alignment, start=adapter, steps=self.steps)
