"""EWC: elastic weight consolidation. Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; baseline of the Vaccine code.

The user's rows train the *aligned* adapter itself (single topology). With w0 its initial values and F a Fisher
diagonal on the alignment rows B_1, B_2, ...:

    F = sum_b (grad L(w0; B_b))^2, batches of 5                  fisher=batch, the authors' code, with its lam = 1e9
    F = mean over rows i of (grad L(w0; i))^2                    fisher=sample, the paper (token mean in each row)
    w <- w - lr * [grad L(w; B_u) + 2 lam F (w - w0)]

There is no factor 1/2, as in the code (the paper has lam / 2). For 2000 rows the first F is about 80 times the second.
In double topology F would be 0 on every A.

Cost of a step: 1 forward, 1 backward; once: 1 forward and 1 backward for every batch of F.

Departures from the authors' code (git-disl/Vaccine): F is computed without dropout; the last gradient of F does not
leak into the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, StageName, Topology, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage

BATCH = 5
"""Batch size of the authors' Fisher pass; lam = 1e9 is tuned for it."""


class EWC(Defense):
    """Fine-tuning with a penalty on moving the parameters that the alignment loss depends on."""

    citation: ClassVar[str] = "arXiv 1612.00796"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    topology: ClassVar[Topology | None] = "single"
    once: ClassVar[str] = "1F 1B for every 5 alignment rows (fisher=batch) or every row (fisher=sample)"
    memory: ClassVar[str] = "2 copies of the adapter"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam", step=10)  # Fisher diagonals differ by orders of magnitude

    lam: float = param(1e9, "weight of the quadratic penalty", source="authors' EWC scripts", main=True, ge=0)
    fisher: Literal["batch", "sample"] = param("batch", "how the Fisher diagonal is estimated", source="authors' code")

    _fisher: list[Tensor] = PrivateAttr(default_factory=list)
    _start: list[Tensor] = PrivateAttr(default_factory=list)

    def before(self, stage: TrainingStage) -> None:
        """Compute the Fisher diagonal and store the initial parameters."""
        self._start = stage.values()
        self._fisher = [torch.zeros_like(value) for value in self._start]
        batches = list(stage.batches(stage.pools.alignment, BATCH if self.fisher == "batch" else 1))
        for batch in batches:
            for diagonal, value in zip(self._fisher, stage.gradient(batch).values, strict=True):
                assert value is not None
                diagonal += value.square() if self.fisher == "batch" else value.square() / len(batches)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the user's gradient plus the gradient of the penalty."""
        shifts = [
            parameter.detach() - start for parameter, start in zip(stage.trainable.values(), self._start, strict=True)
        ]
        pulls = [fisher * shift for fisher, shift in zip(self._fisher, shifts, strict=True)]
        penalty = torch.stack([(pull * shift).sum() for pull, shift in zip(pulls, shifts, strict=True)]).sum()
        return stage.gradient(batch) + self.lam * Gradient(penalty, [2 * pull for pull in pulls])

    def state(self) -> dict[str, Tensor]:
        """Return F and the initial parameters."""
        return {
            f"{name}/{number}": value
            for name, values in (("fisher", self._fisher), ("start", self._start))
            for number, value in enumerate(values)
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore F and the initial parameters."""
        count = len(state) // 2
        self._fisher, self._start = ([state[f"{name}/{n}"] for n in range(count)] for name in ("fisher", "start"))
