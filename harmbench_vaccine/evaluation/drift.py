"""Alignment loss and embedding drift, which help to explain a harmful score (Vaccine, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.collate import IGNORED, collate, encode_examples, pad_token_id
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools
from harmbench_vaccine.training.gradient import Batch
from harmbench_vaccine.training.taps import Taps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """An accumulator of the drift over batches."""

    PAPER_BATCHES = 10

    def __init__(self) -> None:
        self.squares: list[float] = []
        self.tokens = 0
        self.batches = 0
        self.paper = 0.0

    def add(self, before: Sequence[Tensor], after: Sequence[Tensor], mask: Tensor) -> None:
        """Add one batch.

        Args:
            before: L attention outputs of the first model (rows x length x width).
            after: The same of the second model.
            mask: The real tokens (rows x length).
        """
        squares = [(new.double() - old.double()).square().sum(-1) for old, new in zip(before, after, strict=True)]
        real = [float((square * mask).sum()) for square in squares]
        self.squares = [total + new for total, new in zip(self.squares or [0.0] * len(real), real, strict=True)]
        self.tokens += int(mask.sum())
        if self.batches < self.PAPER_BATCHES:
            self.paper += float(sum(square.sum() for square in squares))
        self.batches += 1

    def result(self) -> Drift:
        """Return the drift over all batches."""
        total = sum(self.squares)
        per_layer = [math.sqrt(square) for square in self.squares]
        return Drift(math.sqrt(total), per_layer, math.sqrt(total / max(self.tokens, 1)), self.paper)


def alignment_batches(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, config: Any) -> list[Batch]:
    """Return the alignment rows over which loss and drift are measured, as padded batches.

    Args:
        experiment: The experiment; its protocol has the number of rows and the size of a batch.
        tokenizer: Tokenizer of the model.
        config: Configuration of the model.

    Returns:
        `input_ids`, `attention_mask` and `labels` of each batch, each rows x length.
    """
    protocol = experiment.protocol
    rows = list(plugin_pools(experiment).alignment)[: protocol.score.drift_rows]
    encoded = encode_examples(tokenizer, experiment.template, rows, protocol.align.settings.max_length)
    size, pad = protocol.score.drift_batch, pad_token_id(tokenizer, config)
    return [collate(encoded[start : start + size], pad) for start in range(0, len(encoded), size)]


def attention_outputs(model: nn.Module, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of every attention block (rows x length x width), and the logits.

    The model gets no attention mask, as in the authors' code: rows are padded on the right and the model is causal, so
    real tokens do not attend to padding.
    """
    with torch.inference_mode(), Taps(model).recorded() as outputs:
        logits = model(input_ids=batch["input_ids"].to(next(model.parameters()).device)).logits
    return outputs, logits


def measure_drift(
    reference: Callable[[], nn.Module],
    model: Callable[[], nn.Module],
    batches: Sequence[Batch],
    progress: Progress = SILENT,
) -> tuple[float, Drift]:
    """Measure the alignment loss of a model and its drift from a reference, over alignment batches.

    Args:
        reference: Activates the reference model and returns it; both models may share the weights of one stack.
        model: Activates the model and returns it.
        batches: `input_ids`, `attention_mask` and `labels`, each rows x length.
        progress: Where progress is reported.

    Returns:
        The mean cross-entropy over all response tokens of all batches, and the drift.
    """
    meter, loss, tokens = DriftMeter(), 0.0, 0
    with progress.bar("score: drift", len(batches)) as advance:
        network, order = reference(), [reference, model]
        for batch in batches:
            first = attention_outputs(network, batch)
            network = order[1]()
            second = attention_outputs(network, batch)
            (before, _), (after, logits) = (first, second) if order[0] is reference else (second, first)
            order.reverse()  # the active model reads the next batch first: to activate adapters takes time
            meter.add(before, after, batch["attention_mask"].to(logits.device))
            labels = batch["labels"][:, 1:].to(logits.device)
            is_response = labels != IGNORED  # in float64, the logits of other tokens would take most of the memory
            responses = logits[:, :-1][is_response].double()
            loss += float(nn.functional.cross_entropy(responses, labels[is_response], reduction="sum"))
            tokens += len(responses)
            advance(1)
    return loss / tokens, meter.result()
