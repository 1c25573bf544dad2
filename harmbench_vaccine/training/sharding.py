"""Shard a frozen base model over ranks (FSDP2), for models larger than one GPU.

Every rank stores a part of each base weight and gathers a decoder layer when it runs. Adapters are added later and are
complete on every rank, so gradients, edits and saved adapters are the same as without sharding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.device import device

from .taps import decoder_layers


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Distribute the weights of a loaded model over all ranks, layer by layer, in place.

    Returns:
        The same model.

    Raises:
        BadInput: The model has no decoder layers that `decoder_layers` recognizes.
    """
    model.requires_grad_(False)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=_mesh())
    fully_shard(model, mesh=_mesh())  # embeddings, the last norm, the LM head
    return model


@cache  # one mesh per process: all ranks create it together, so a rank that reloads its model must reuse it
def _mesh() -> Any:
    return init_device_mesh(device(), (distributed.world_size(),))
