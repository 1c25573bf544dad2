"""EWC: elastic weight consolidation. Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; baseline of Vaccine's repository.

The user's rows train the *aligned* adapter itself (single topology); w0 its values before, F a Fisher diagonal on the
alignment rows B_1, B_2, ...:

    F = sum_b (grad L(w0; B_b))^2, batches of 5                  fisher=batch, the authors' code, with its lam = 1e9
    F = mean over rows i of (grad L(w0; i))^2                    fisher=sample, as the paper has it (token means a row)
    w <- w - lr * [grad L(w; B_u) + 2 lam F (w - w0)]

No factor 1/2, as in the code (the paper has lam / 2). For 2000 rows the first F is about 80 times the second.

Cost a step: 1 forward, 1 backward; once: as many as there are batches. Departures from the authors' code: F is taken
without dropout, and its last gradient does not leak into the first step. In double topology F would be 0 on every A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, Topology, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage

BATCH = 5
"""Of the authors' Fisher pass; lam = 1e9 belongs to it."""


class EWC(Defense):
    """Holds each parameter by how much the alignment loss depends on it."""

    citation: ClassVar[str] = "arXiv 1612.00796"
    stages: ClassVar[tuple[Any, ...]] = ("finetune",)
    topology: ClassVar[Topology | None] = "single"
    once: ClassVar[str] = "1F 1B for every 5 alignment rows (fisher=batch) or every row (fisher=sample)"
    memory: ClassVar[str] = "2 copies of the adapter"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}

    lam: float = param(1e9, "weight of the quadratic penalty", source="authors' EWC scripts", main=True, ge=0)
    fisher: Literal["batch", "sample"] = param("batch", "how the Fisher diagonal is estimated", source="authors' code")

    _fisher: list[Tensor] = PrivateAttr(default_factory=list)
    _start: list[Tensor] = PrivateAttr(default_factory=list)

    def before(self, stage: TrainingStage) -> None:
        """The Fisher diagonal, and where the parameters start."""
        self._start = stage.values()
        self._fisher = [torch.zeros_like(value) for value in self._start]
        batches = list(stage.batches(stage.pools.alignment, BATCH if self.fisher == "batch" else 1))
        for batch in batches:
            for total, value in zip(self._fisher, stage.gradient(batch).values, strict=True):
                assert value is not None
                total += value.square() if self.fisher == "batch" else value.square() / len(batches)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """The user's gradient and the pull back to the start."""
        moved = [
            parameter.detach() - start for parameter, start in zip(stage.trainable.values(), self._start, strict=True)
        ]
        pulls = [fisher * value for fisher, value in zip(self._fisher, moved, strict=True)]
        penalty = torch.stack([(pull * value).sum() for pull, value in zip(pulls, moved, strict=True)]).sum()
        return stage.gradient(batch) + self.lam * Gradient(penalty, [2 * pull for pull in pulls])

    def state(self) -> dict[str, Tensor]:
        """F and the start."""
        return {
            f"{name}/{number}": value
            for name, values in (("fisher", self._fisher), ("start", self._start))
            for number, value in enumerate(values)
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
        count = len(state) // 2
        self._fisher, self._start = ([state[f"{name}/{n}"] for n in range(count)] for name in ("fisher", "start"))
