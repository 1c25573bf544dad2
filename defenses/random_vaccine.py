"""Random Vaccine: Gaussian noise on the hidden embeddings; the control of Vaccine (arXiv 2402.01109, table 7).

    h_l <- h_l + z_l,   z_l ~ N(0, variance) for every coordinate of a real token
    w   <- w - lr * grad L(w; B_a) at the noisy embeddings

Cost of a step: 1 forward, 1 backward. The authors' repository defines this method but never runs it. The norm of the
noise is not bounded; it is about sqrt(variance * coordinates).

Departures from the authors' code (git-disl/Vaccine): the noise has its own random stream, so that dropout masks and
batches equal those of SFT; padding has no noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmbench_vaccine.plugins import Defense, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class RandomVaccine(Defense):
    """Alignment under random shifts of the hidden embeddings."""

    citation: ClassVar[str] = "arXiv 2402.01109"
    memory: ClassVar[str] = "the attention outputs of every layer for one batch"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"variance": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("variance", step=10)  # the grid of the paper, table 7

    variance: float = param(
        0.01,
        "variance of the noise on every coordinate",
        source="middle of the grid 1e-4 to 1, paper, table 7",
        main=True,
        ge=0,
    )

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient at randomly shifted embeddings."""
        generator = stage.generator("noise", per_rank=True)
        mask = batch["attention_mask"].unsqueeze(-1)
        noise: dict[int, Tensor] = {}  # gradient checkpointing runs a block twice, and both runs need the same noise

        def shift(block: int, output: Tensor) -> Tensor:
            if block not in noise:
                normal = torch.randn(output.shape, generator=generator).to(output.device)
                noise[block] = (self.variance**0.5 * normal * mask).to(output.dtype)
            return output + noise[block]

        with stage.taps.changed(shift):
            return stage.gradient(batch)
