"""Attacks: the hooks by which a user departs from a benign one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from harmbench_vaccine.core.types import Example, Mix, Pools, TrainSettings, Verdict
from harmbench_vaccine.data.prompts import EvalSet

from .base import Plugin

if TYPE_CHECKING:
    from harmbench_vaccine.training.stage import TrainingStage


class Attack(Plugin):
    """What the user who uploads data does to the provider's model: the default of every hook is a benign user."""

    kind: ClassVar[str] = "attack"
    trains: ClassVar[bool] = True
    """False: it edits the weights in place of the user stage."""
    edits_base: ClassVar[bool] = False
    """It makes another base model, not an adapter."""
    excludes: ClassVar[tuple[str, ...]] = ()
    """Attacks that it cannot act beside; `*` stands for all."""

    default_ratio: ClassVar[float] = 0.0
    """The share of harmful rows where no attack beside it says another."""

    def mix(self, mix: Mix) -> Mix:
        """How many rows, and how many of them harmful."""
        return mix

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """The rows uploaded, given the draw of task rows and harmful rows."""
        return rows

    def filter(self, rows: list[Example], judge: Judge) -> list[Example]:
        """The uploaded rows that the provider lets through; `judge` is the protocol's."""
        return rows

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """The user's training settings."""
        return settings

    def ablate(self, stage: TrainingStage) -> None:
        """Changes the weights of `stage.model`, the aligned model with its adapters merged, in place: all that the
        user does if the attack does not train."""

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """The harmful evaluation sets of a cell, for an attack that changes how a question is put."""
        return sets


Judge = Callable[[Sequence[tuple[str, str]]], list[Verdict]]
"""(question, answer) pairs -> a judge's verdicts."""
