"""The loss of the LM head on the hidden states of every layer, at tokens that differ from a safe answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harmbench_vaccine.data.collate import IGNORED

from .gradient import Batch, response_mask
from .stage import TrainingStage
from .taps import final_norm


def layerwise_loss(stage: TrainingStage, output: Any, batch: Batch, mask: Tensor) -> Tensor:
    """Compute A: the mean cross-entropy of the LM head on the hidden states of every layer.

    Args:
        stage: The stage.
        output: The model's output on the batch, with hidden states.
        batch: The batch.
        mask: The response tokens that count (rows x length, bool).

    Returns:
        A scalar with a graph.
    """
    model: Any = stage.model  # nn.Module does not declare get_output_embeddings
    head, norm = model.get_output_embeddings(), final_norm(model)
    targets = batch["input_ids"][:, 1:][mask[:, 1:]]
    states = [norm(state[:, :-1][mask[:, 1:]]) for state in output.hidden_states[:-1]]
    logits = [*(head(state) for state in states), output.logits[mask[:, 1:][response_mask(batch)]]]
    return torch.stack([nn.functional.cross_entropy(scores.float(), targets) for scores in logits]).mean()


def differing(safe: Batch, harmful: Batch) -> Tensor:
    """Return a mask of the harmful response tokens that differ from the safe row at the same position.

    Returns:
        Rows x length of `harmful`, bool. A position after the end of the safe row counts as different.
    """
    width = harmful["input_ids"].shape[1]
    safe_ids = nn.functional.pad(safe["input_ids"], (0, width), value=-1)[:, :width]
    safe_tokens = nn.functional.pad(safe["attention_mask"], (0, width))[:, :width].bool()
    return (harmful["labels"] != IGNORED) & ((harmful["input_ids"] != safe_ids) | ~safe_tokens)
