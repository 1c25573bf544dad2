"""Alignment loss and harmful embedding drift: what explains a harmful score (Vaccine, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.training.taps import Taps


@dataclass(frozen=True)
class Drift:
    """The difference between the attention outputs of two models over the same batches."""

    total: float
    """L2 norm over all blocks and real tokens."""
    per_layer: list[float]
    """L2 norm over real tokens, for each block."""
    per_token: float
    """Root mean square over real tokens of the norm over all blocks."""
    paper_sum: float
    """Sum of squares over the first 10 batches, padding included: the figure that the authors' code prints."""


class DriftMeter:
    """Adds up the drift batch by batch."""

    PAPER_BATCHES = 10

    def __init__(self) -> None:
        self.squares: list[float] = []
        self.tokens = 0
        self.batches = 0
        self.paper = 0.0

    def add(self, before: Sequence[Tensor], after: Sequence[Tensor], mask: Tensor) -> None:
        """One batch: L tensors (rows x length x width) of each model, and the mask of real tokens (rows x length)."""
        squares = [(new.double() - old.double()).square().sum(-1) for old, new in zip(before, after, strict=True)]
        real = [float((square * mask).sum()) for square in squares]
        self.squares = [old + new for old, new in zip(self.squares or [0.0] * len(real), real, strict=True)]
        self.tokens += int(mask.sum())
        if self.batches < self.PAPER_BATCHES:
            self.paper += float(sum(square.sum() for square in squares))
        self.batches += 1

    def result(self) -> Drift:
        """The drift of everything added."""
        whole = sum(self.squares)
        per_layer = [math.sqrt(square) for square in self.squares]
        return Drift(math.sqrt(whole), per_layer, math.sqrt(whole / max(self.tokens, 1)), self.paper)


def attention_outputs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The outputs of every attention block (rows x length x width), and the logits.

    No attention mask is given, as in the authors' code: rows are padded on the right of a causal model, so real
    tokens do not see the padding.
    """
    with torch.inference_mode(), Taps(model).recorded() as outputs:
        logits = model(input_ids=batch["input_ids"].to(next(model.parameters()).device)).logits
    return outputs, logits


def measure_drift(
    reference: Callable[[], nn.Module],
    model: Callable[[], nn.Module],
    batches: Sequence[dict[str, Tensor]],
    progress: Progress = SILENT,
) -> tuple[float, Drift]:
    """The alignment loss of `model()` and its drift from `reference()`, over alignment batches.

    Both are functions that put a model in place and return it, since two cells of one stack share its weights. The
    loss is the mean over all response tokens of all batches.
    """
    meter, loss, tokens = DriftMeter(), 0.0, 0
    with progress.bar("score: drift", len(batches)) as advance:
        for batch in batches:
            old, _ = attention_outputs(reference(), batch)
            new, logits = attention_outputs(model(), batch)
            meter.add(old, new, batch["attention_mask"].to(logits.device))
            labels = batch["labels"][:, 1:].to(logits.device)
            loss += float(
                nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).double(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
            )
            tokens += int((labels != IGNORED).sum())
            advance(1)
    return loss / tokens, meter.result()
