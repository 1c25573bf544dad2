"""Train every weight of a classifier with independent labels, by the trainer of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import StageName, TrainSettings
from harmbench_vaccine.data.collate import Encoded

from .adapters import LoraStack
from .hooks import PlainFinetuning
from .stage import Batch, Gradient, TrainingStage
from .trainer import train


@dataclass(frozen=True)
class LabeledText:
    """A text as token ids, and the labels that apply to it."""

    ids: list[int]
    labels: list[bool]
    """One for each label of the classifier."""


class _LabelLoss(PlainFinetuning):
    """The gradient of the classifier's own loss: the mean binary cross-entropy over texts and labels."""

    def __init__(self, texts: Sequence[LabeledText]) -> None:
        self.targets = torch.tensor([text.labels for text in texts], dtype=torch.float32)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        ids = batch["input_ids"]
        targets = self.targets[batch["rows"].cpu()].to(ids.device)
        return stage.gradient_of(
            stage.model(input_ids=ids, attention_mask=batch["attention_mask"], labels=targets).loss
        )


def train_classifier(
    model: PreTrainedModel,
    texts: Sequence[LabeledText],
    settings: TrainSettings,
    seed: int,
    checkpoints: Path,
    *,
    save_share: float = 0.1,
    progress: Progress = SILENT,
) -> list[dict[str, float]]:
    """Train a classifier in place, from the newest checkpoint in `checkpoints` if any (see `trainer.train`).

    Args:
        model: The classifier, whose configuration names a padding token; it is moved to the device of models.
        texts: The texts with their labels.
        settings: The optimizer settings, with `full`.
        seed: Seed of the order of the texts, and of dropout.
        checkpoints: Folder for checkpoints.
        save_share: Share of the optimizer steps between two checkpoints.
        progress: Receives the progress bar.

    Returns:
        The log, one entry for each optimizer step.

    Raises:
        HbvError: The checkpoints do not fit on the disk.
    """
    stack = LoraStack(model)
    name = cast(StageName, "judge")  # the trainer only prints it
    stage = TrainingStage(name, stack, stack.train_all_weights(), seed)
    rows = [Encoded(text.ids, text.ids) for text in texts]
    log = train(
        stage,
        _LabelLoss(texts),
        rows,
        settings,
        checkpoints,
        pad=model.config.pad_token_id,
        save_share=save_share,
        title="Training the judge",
        progress=progress,
    )
    model.eval()
    return log
