"""Random perturbation: noise of a fixed length on the user's update; the control that motivates Panacea (2501.18100).

    w <- w + rho * z / ||z||,   z ~ N(0, I)         w is every A and B of the update as one vector

No pass over data. The noise has its own random stream, seeded by the seed of the run.

Departures: none known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage, global_norm


class RandomPerturbation(Defense):
    """A shift of the update in a random direction."""

    citation: ClassVar[str] = "arXiv 2501.18100"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    cost: ClassVar[str] = "none"
    neutral: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rho")

    rho: float = param(
        1.0, "length of the perturbation (L2)", source="rho of Panacea, authors' script", main=True, ge=0
    )

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the adapter plus noise of length rho."""
        generator = stage.generator("perturbation")
        noise = {
            module: [torch.randn(factor.shape, generator=generator) for factor in factors]
            for module, factors in adapter.factors.items()
        }
        scale = self.rho / global_norm([z for pair in noise.values() for z in pair])
        noisy = {
            module: (a + scale * noise[module][0], b + scale * noise[module][1])
            for module, (a, b) in adapter.factors.items()
        }
        return Adapter(noisy, adapter.scale)
