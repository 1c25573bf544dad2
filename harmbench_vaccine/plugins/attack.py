"""The attack interface: hooks that change what a benign user does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from harmbench_vaccine.core.types import Example, Mix, Pools, TrainSettings, Verdict
from harmbench_vaccine.data.prompts import EvalSet

from .base import Plugin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harmbench_vaccine.data.pools import RowPools
    from harmbench_vaccine.training.stage import TrainingStage

TRAINING_HOOKS = ("divide", "keeps_order", "mix", "upload", "select", "filter", "settings", "ablate")
"""The hooks by which an attack changes the user stage."""

Judge = Callable[[Sequence[tuple[str, str]]], list[Verdict]]
"""A function from (question, answer) pairs to the verdicts of a judge."""


class Attack(Plugin):
    """An attack by the user who uploads the fine-tuning data. The default of every hook is a benign user."""

    kind: ClassVar[str] = "attack"
    trains: ClassVar[bool] = True
    """False: the attack edits weights with `ablate`, and the user stage does not train."""
    edits_base: ClassVar[bool] = False
    """True: the attack changes the base model instead of adding an adapter."""
    excludes: ClassVar[tuple[str, ...]] = ()
    """Attacks that it cannot be combined with; `*` excludes all."""
    default_ratio: ClassVar[float] = 0.0
    """The proportion of harmful rows, unless an attack sets it in `mix`."""

    @property
    def changes_training(self) -> bool:
        """False if it acts only on the finished model or on questions: the user stage is then the same without it."""
        cls = type(self)
        return cls.default_ratio > 0 or any(getattr(cls, hook) is not getattr(Attack, hook) for hook in TRAINING_HOOKS)

    @property
    def changes_questions(self) -> bool:
        """It changes the evaluation sets."""
        return type(self).evaluations is not Attack.evaluations

    @property
    def stresses_weights(self) -> bool:
        """It changes the weights of the finished model."""
        return type(self).stress is not Attack.stress

    @property
    def keeps_order(self) -> bool:
        """True: every epoch trains on the rows in the order of the upload, instead of shuffling them."""
        return False

    def divide(self, rows: RowPools) -> RowPools:
        """Return the pools of rows after the attack changes who has which rows.

        The alignment stage of a run then depends on the attack. Count the removed rows in `dropped`.

        Args:
            rows: All rows by their users. The evaluation stays; `question_sets` may name parts of it, whose harmful
                scores are reported too.
        """
        return rows

    def mix(self, mix: Mix) -> Mix:
        """Return the number of uploaded rows and the proportion of harmful ones."""
        return mix

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the rows that the user uploads.

        Args:
            rows: The drawn task rows and harmful rows.
            pools: The rows from which an attack may draw.
        """
        return rows

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        """Return the rows of `upload` after a look at the model that the user stage starts from.

        Args:
            stage: The user stage before it trains: run its model inside `stage.reference()`.
            rows: The rows of `upload`.
        """
        return rows

    def filter(self, rows: list[Example], judge: Judge) -> list[Example]:
        """Return the uploaded rows that the provider accepts.

        Args:
            rows: The uploaded rows.
            judge: The judge of the protocol.
        """
        return rows

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """Return the training settings of the user."""
        return settings

    def ablate(self, stage: TrainingStage) -> None:
        """Edit the weights of `stage.model` in place, if the attack does not train.

        The model is the aligned model with its adapters merged.
        """

    def stress(self, model: PreTrainedModel) -> None:
        """Edit the weights of the finished model in place, after the user stage and the repair.

        Args:
            model: The final model with its adapters merged.
        """

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """Return the harmful evaluation sets of a run: an attack may change the prompt of a question."""
        return sets
