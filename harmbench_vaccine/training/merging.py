"""Merge adapters into the weights of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .adapters import Adapter, is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untie_head(model: PreTrainedModel) -> None:
    """Give the LM head weights of its own, equal to those that it shares with the embeddings; otherwise do nothing."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=embeddings.weight.requires_grad)
        text_config: Any = model.config.get_text_config(decoder=True)
        model.config.tie_word_embeddings = text_config.tie_word_embeddings = False


def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter to the weights of a model, in place.

    An adapter of an LM head that shares its weights with the embeddings changes the head alone, so the head is untied.
    """
    head = model.get_output_embeddings()
    if any(model.get_submodule(name) is head for name in adapter.factors):
        untie_head(model)
    with torch.no_grad():
        for name in adapter.factors:
            module = model.get_submodule(name)
            weight, delta = cast("Tensor", module.weight), adapter.delta(name)
            if is_transposed(module):
                delta = delta.T
            weight.copy_(weight.float() + delta.to(weight.device))
