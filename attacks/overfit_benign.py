"""Overfitting on a few benign rows, without any harmful text (arXiv 2510.02833).

    n task rows, 0 harmful rows, and `epochs` passes over them

A preset of `benign`, `samples` and `optimizer`, written from the description of the paper's repository.

Departures from that description (of ZHIXINXIE/ten_benign): the rows are trained in one stage, with their answers
(theirs first trains on the same ten instructions with one refusal as every answer); the rows are those of the user's
task (theirs are ten fixed instructions); the number of epochs is ours (theirs is 10 in each stage).
"""

from dataclasses import replace
from typing import ClassVar

from harmbench_vaccine.plugins import Attack, Mix, TrainSettings, param


class OverfitBenign(Attack):
    """Trains on a few task rows for many epochs."""

    citation: ClassVar[str] = "arXiv 2510.02833"
    excludes: ClassVar[tuple[str, ...]] = ("ratio", "samples")

    rows: int = param(10, "number of uploaded rows", source="description of the authors' repository", main=True, ge=1)
    epochs: float = param(100.0, "number of passes over the rows", source="ours", gt=0)

    def mix(self, mix: Mix) -> Mix:
        """Set the number of rows, and no harmful ones."""
        return replace(mix, samples=self.rows, ratio=0.0)

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """Set the number of epochs."""
        return replace(settings, epochs=self.epochs)
