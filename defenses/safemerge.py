"""SafeMERGE: merge the modules that left the alignment direction with a safe adapter. Djuhera et al., arXiv 2503.17239.

For every adapted module, with C as in Safe LoRA, dW = B A the user's update, and dW_safe the update by a training run
on alignment rows from the aligned model, with the protocol's settings for the user stage:

    dW <- (1 - weight) dW + weight dW_safe          where cos(C B A, B A) < tau; other modules are unchanged

All runs of one aligned model share this training. The sum is exact: as a LoRA its rank is the sum of both ranks. The
cosine is never negative; a module without an update by alignment or by the user has none, and is unchanged. With
tau = 2 all others are merged: an interpolation towards the safe adapter.

Departures from the authors' code (aladinD/SafeMERGE): the sum is the sum of the updates (theirs is the rule `linear` of
peft, which mixes A and B separately, so that the product has cross terms B A_safe and B_safe A); a module without an
update by alignment is unchanged (theirs merges it, because its cosine is 0 there); the cosine is not rounded; the rule
`dare_linear`, which drops random entries, is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from harmbench_vaccine.plugins import Defense, SeparateTraining, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter, concatenate
from harmbench_vaccine.training.projection import projected_update
from harmbench_vaccine.training.stage import TrainingStage


class SafeMERGE(Defense):
    """Merge of selected modules with an adapter that was trained on alignment rows."""

    citation: ClassVar[str] = "arXiv 2503.17239"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    needs_alignment: ClassVar[bool] = True
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "one user stage on alignment rows"
    memory: ClassVar[str] = "a second adapter"
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"weight": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("weight", share=True)

    weight: float = param(0.2, "share of the safe update", source="authors' script", main=True, ge=0, le=1)
    tau: float = param(0.35, "merge modules with a cosine below tau", source="authors' script", ge=-1, le=2)
    projector: Literal["paper", "exact"] = param("paper", "formula of C (see safe_lora)", source="authors' utils.py")

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        """Return the training of the safe adapter."""
        return (SeparateTraining("safe", "alignment"),) if self.weight else ()

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the adapter with the selected modules merged."""
        selected = self.selected(stage, adapter) if self.weight else []
        if not selected:
            return adapter
        safe = stage.train_separately("safe", stage.pools.alignment)
        reduced = {m: (a, (1 - self.weight) * b if m in selected else b) for m, (a, b) in adapter.factors.items()}
        added = {m: (a, self.weight * b if m in selected else 0 * b) for m, (a, b) in safe.factors.items()}
        return concatenate([Adapter(reduced, adapter.scale), Adapter(added, safe.scale)])

    def selected(self, stage: TrainingStage, adapter: Adapter) -> list[str]:
        """Return the modules whose cosine with their projection is below tau."""
        aligned = stage.alignment_adapter()
        assert aligned is not None
        candidates = [
            module
            for module, (a, b) in adapter.factors.items()
            if module in aligned.factors and aligned.delta(module).any() and (b @ a).any()
        ]
        return [m for m in candidates if projected_update(aligned, adapter, m, self.projector)[1] < self.tau]
