"""Quantization: round the weights of the final model to 8 or 4 bits, as a user who serves it cheaply does.

For each group g of weights in a row of a matrix (the inputs of one output), with b bits:

    s = max |w_g| / (2^(b-1) - 1)          w_g <- s * round(w_g / s)

It is a stress test without training: it acts on the merged weights of the final model, after the user stage and after
a repair, and shows whether safety survives rounding. Linear layers and experts of the decoder are rounded; embeddings,
LM head, norms and biases stay, as in common practice. The rounded weights are stored in the model's data type, so
every backend serves them: the attack measures answers, not speed. Rounding to the nearest value is the simplest scheme.

Departures: none: a definition without a source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harmbench_vaccine.plugins import Attack, param
from harmbench_vaccine.training.taps import decoder_layers


class Quantize(Attack):
    """Rounds the weights of the final model to multiples of a scale."""

    citation: ClassVar[str] = "definition"

    bits: Literal["8", "4"] = param("8", "bits of a weight", source="ours", main=True)
    group: int = param(64, "largest number of weights of a row with one scale", source="ours", ge=1)

    @torch.no_grad()
    def stress(self, model: PreTrainedModel) -> None:
        """Round every matrix of the decoder layers in place."""
        for weight in linear_weights(decoder_layers(model)):
            groups = weight.float().split(self.group, dim=-1)
            weight.copy_(torch.cat([rounded(group, int(self.bits)) for group in groups], -1))


def linear_weights(layers: nn.Module) -> Iterator[Tensor]:
    """Yield a view of the weights of every linear layer, and of every tensor of experts (... x outputs x inputs)."""
    for module in layers.modules():
        is_linear = isinstance(module, nn.Linear | Conv1D)
        transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        for weight in module.parameters(recurse=False):
            is_experts = weight.dim() == 3 and not isinstance(module, nn.Conv1d)
            if is_experts or (is_linear and weight.dim() == 2):
                yield weight.mT if transposed else weight


def rounded(weights: Tensor, bits: int) -> Tensor:
    """Round each row to a multiple of its scale, symmetric around 0.

    Args:
        weights: A group of every row (... x rows x weights).
        bits: Bits of an integer.
    """
    scale = weights.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, scale * (weights / scale).round(), weights)
