"""SPAG: after each user step, step back to the safe set. Chen et al., ICML 2026, arXiv 2605.28030 (SPARD).

With theta+ the parameters after the optimizer step on the user's batch, l = L(theta+; B_a) and g its gradient:

    if l > tau:   theta <- theta+ - min((l - tau) / ||g||^2, eta) g          else theta <- theta+

The step of length (l - tau) / ||g|| reaches the set l <= tau to first order. Cost of a step: 2 forward, 2 backward.

Departures from the authors' code (shuhao02/SPARD): the step is the projection of the paper (theirs clips g, scales each
tensor of it, and acts only above tau + 0.1); the step is a plain one (theirs calls the optimizer of the user step
again, whose momentum repeats that step); the safe rows are one micro-batch of the alignment rows per optimizer step
(theirs is a small set, chosen by relevance and diversity with a determinantal point process); the safe gradient is
without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import TrainingStage


class SPAG(Defense):
    """Fine-tuning that alternates with projections to a low loss on alignment rows."""

    citation: ClassVar[str] = "arXiv 2605.28030"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    cost: ClassVar[str] = "2F 2B"
    memory: ClassVar[str] = "1 gradient"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"eta": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("tau")

    tau: float = param(0.2, "largest loss on alignment rows", source="authors' script", main=True, ge=0)
    eta: float = param(1.0, "largest rate of a projection", source="authors' script (alpha_max)", ge=0)

    def after_step(self, stage: TrainingStage) -> None:
        """Step towards the set of parameters with a low loss on alignment rows."""
        with stage.isolated("projection"):
            gradient = stage.gradient(stage.stream("safe", stage.pools.alignment))
        excess, square = float(gradient.loss) - self.tau, float(gradient.dot(gradient))
        if excess > 0 and square > 0:
            rate = min(excess / square, self.eta)
            pairs = zip(stage.values(), gradient.values, strict=True)
            stage.set_values([w if g is None else w - rate * g for w, g in pairs])
