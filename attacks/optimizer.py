"""Optimizer: the user's training settings as an attack (sweeps of TamperBench; Qi et al., arXiv 2310.03693).

    lr, epochs, batch, schedule and rank replace the values of the protocol; full: all weights train, without an adapter

Parameters that are not set keep the value of the protocol. Without `ratio`, a tenth of the rows is harmful. In single
topology, training continues on the alignment adapter, so `rank` is refused there.

Departures from the authors' code (LLM-Tuning-Safety/LLMs-Finetuning-Safety): an adapter is trained unless full=true
(theirs trains all weights); the rate is constant, linear or cosine (theirs is multiplied by 0.85 after each epoch).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from harmbench_vaccine.plugins import Attack, TrainSettings, param

_SOURCE = "the protocol, unless set"


class Optimizer(Attack):
    """Changes the training settings, or trains all weights."""

    citation: ClassVar[str] = "arXiv 2310.03693"
    default_ratio: ClassVar[float] = 0.1
    neutral: ClassVar[Mapping[str, Any] | None] = {}

    lr: float | None = param(None, "peak learning rate", source=_SOURCE, main=True, gt=0)
    epochs: float | None = param(None, "number of passes over the rows", source=_SOURCE, gt=0)
    batch: int | None = param(None, "rows in a micro-batch", source=_SOURCE, ge=1)
    schedule: Literal["constant", "linear", "cosine"] | None = param(
        None, "schedule of the learning rate", source=_SOURCE
    )
    rank: int | None = param(None, "rank of the user's adapter", source=_SOURCE, ge=1)
    full: bool = param(False, "train all weights instead of an adapter", source="Qi et al., section 4.1")

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """Replace the settings that the user set."""
        values = {
            "lr": self.lr,
            "epochs": self.epochs,
            "batch": self.batch,
            "schedule": self.schedule,
            "lora_rank": self.rank,
        }
        changes: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
        return replace(settings, full=self.full, **changes)
