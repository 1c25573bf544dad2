"""Embeddings of alignment rows: the outputs of the last attention block, whose change is a part of the drift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harmbench_vaccine.training.gradient import Batch

from .drift import attention_outputs


def row_embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the embedding of each row: the output of the last attention block, averaged over the real tokens.

    Args:
        model: The model.
        batches: `input_ids` and `attention_mask`, each rows x length.

    Returns:
        Rows x width, in float32 on the CPU.
    """
    means = []
    for batch in batches:
        outputs, _ = attention_outputs(model, batch)
        mask = batch["attention_mask"].to(outputs[-1].device).unsqueeze(-1)
        means.append(((outputs[-1].float() * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(means)
