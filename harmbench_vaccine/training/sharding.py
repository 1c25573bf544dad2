"""The frozen base model spread over ranks (FSDP2): for models that are larger than one GPU.

Every rank keeps a part of each base weight, and a decoder layer is gathered when it runs. Adapters are laid on later
and stay whole on every rank, so that gradients, edits and saved adapters are what they are without it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from harmbench_vaccine.core import distributed

from .taps import decoder_layers


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Spreads the weights of a model in this process's memory over all ranks, layer by layer, in place.

    Raises:
        BadInput: its decoder layers are not found.
    """
    model.requires_grad_(False)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=_mesh())
    fully_shard(model, mesh=_mesh())  # embeddings, the last norm, the LM head
    return model


@cache  # all ranks make it together; one that loads its model again later must not wait for them
def _mesh() -> Any:
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (distributed.world_size(),))
