"""Realign: supervised fine-tuning on alignment data after the user stage. Zong et al., ICML 2024, arXiv 2402.02207.

    `steps` optimizer steps of min_w L(w; B_a), starting from the user's update

The post-hoc mode of VLGuard, and the control of every repair. Cost of a step: 1 forward, 1 backward. The update itself
is trained, with a fresh optimizer.

Departures from the paper: the rows are alignment rows of the protocol (the paper's are instructions about images, with
their answers); the settings are those of the protocol for the user stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, SeparateTraining, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage


class Realign(Defense):
    """A second alignment after the user stage."""

    citation: ClassVar[str] = "arXiv 2402.02207"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"steps": 0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("steps")

    steps: int = param(
        400, "optimizer steps", source="one epoch of 2000 rows, batch 5; not from a single source", main=True, ge=0
    )

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        """Return the second alignment."""
        return (SeparateTraining("realigned", "alignment", self.steps, start=True),)

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the adapter after more training on alignment rows."""
        return stage.train_separately("realigned", stage.pools.alignment, start=adapter, steps=self.steps)
