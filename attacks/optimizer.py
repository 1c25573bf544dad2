"""Optimizer: the user's training settings as the attack (TamperBench's sweeps; Qi et al., arXiv 2310.03693).

    lr, epochs, batch, schedule, rank in place of the protocol's; full: every weight is trained, no adapter

What is not given stays the protocol's. Without `ratio`, a tenth of the rows is harmful. In single topology the
alignment adapter goes on, so that a rank is refused there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from harmbench_vaccine.plugins import Attack, TrainSettings, param

_SOURCE = "the protocol's, unless given"


class Optimizer(Attack):
    """Trains harder, longer, or on every weight."""

    citation: ClassVar[str] = "arXiv 2310.03693"
    default_ratio: ClassVar[float] = 0.1
    neutral: ClassVar[Mapping[str, Any] | None] = {}

    lr: float | None = param(None, "peak learning rate", source=_SOURCE, main=True, gt=0)
    epochs: float | None = param(None, "passes over the rows", source=_SOURCE, gt=0)
    batch: int | None = param(None, "rows a micro-batch", source=_SOURCE, ge=1)
    schedule: Literal["constant", "linear", "cosine"] | None = param(None, "of the learning rate", source=_SOURCE)
    rank: int | None = param(None, "rank of the user's adapter", source=_SOURCE, ge=1)
    full: bool = param(False, "train every weight in place of an adapter", source="Qi et al., section 4.1")

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """The settings that were given, over the protocol's."""
        given = {
            "lr": self.lr,
            "epochs": self.epochs,
            "batch": self.batch,
            "schedule": self.schedule,
            "lora_rank": self.rank,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return replace(settings, full=self.full, **changes)
