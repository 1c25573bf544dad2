"""Load a base model in shards: each rank reads its rows of every weight, and never has the whole model.

The model is created without memory (PyTorch's `meta` device), sharded, and then filled from the safetensors tensor by
tensor. Source: meta-device initialization in the documentation of `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.errors import HbvError

from .loading import PICKLED, is_finite, load_model, readable_load_errors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in a file of safetensors."""

    file: str
    name: str
    shape: tuple[int, ...]

    def rows(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Read rows of the tensor; by default all."""
        from safetensors import safe_open

        # A file is open for one tensor only: pages of an open file that were read count as memory of the process.
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_slice(self.name)[start:stop] if self.shape else file.get_tensor(self.name)
        return tensor


def load_sharded(location: str, dtype: Any) -> PreTrainedModel:
    """Load a causal language model in shards over all ranks.

    A model whose tensors have other names or shapes in its files (the experts of a mixture, quantized weights) is
    loaded as a whole by each rank, and then sharded.

    Args:
        location: Folder or hub id, with an optional `@revision`.
        dtype: Data type of the weights.

    Raises:
        BadInput: As for `load_model`; or the model has no decoder layers that `decoder_layers` recognizes.
        HbvError: As for `load_model`.
    """
    from transformers import AutoModelForCausalLM

    from harmbench_vaccine.training.sharding import shard

    with readable_load_errors(location) as source:
        model = _without_weights(source, dtype)
        stored = _stored_weights(model, _stored_tensors(**source))
        if stored is not None:
            shard(model)
            _allocate(model)
            broken = _fill(model, stored)
    if stored is None:  # also if weights are missing: `load_model` reports them
        return shard(load_model(AutoModelForCausalLM, location, dtype=dtype))
    if broken:
        raise HbvError(f"Model {location!r} has broken weights: {broken} has a value that is not a finite number.")
    return model


def _without_weights(source: Mapping[str, Any], dtype: Any) -> PreTrainedModel:
    """Create a model with real buffers, which are computed from its configuration, and weights on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(**source)
    config.name_or_path = source["pretrained_model_name_or_path"]
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


def _stored_tensors(
    pretrained_model_name_or_path: str, revision: str | None = None, **_: Any
) -> dict[str, _StoredTensor]:
    """Return the tensors of a model by their names in its safetensors; empty if it has none."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
    from transformers.utils.hub import get_checkpoint_shard_files

    logging.disable_progress_bar()
    name = pretrained_model_name_or_path
    if name in PICKLED:
        return {}
    optional = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    if single := cached_file(name, SAFE_WEIGHTS_NAME, **optional):
        files = [single]
    elif index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **optional):
        files = get_checkpoint_shard_files(name, index, revision=revision or "main")[0]
    else:
        return {}
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dictionary
                tensors[key] = _StoredTensor(path, key, tuple(file.get_slice(key).get_shape()))
    return tensors


def _stored_weights(model: PreTrainedModel, tensors: Mapping[str, _StoredTensor]) -> dict[str, _StoredTensor] | None:
    """Return the stored tensor of each weight and of each stored buffer; None unless they are stored as they are.

    Files of a model without its head have names without the prefix of the base model.
    """
    prefix = f"{model.base_model_prefix}."
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    candidates = {name: tensors.get(name) or tensors.get(name.removeprefix(prefix)) for name in names}
    stored = {name: tensor for name, tensor in candidates.items() if tensor}
    is_complete = all(
        name in stored and stored[name].shape == weight.shape for name, weight in model.named_parameters()
    )
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    has_tied_copies = any(name in tensors for name in model.all_tied_weights_keys)  # they may differ, and are not tied
    return stored if is_complete and not is_quantized and not has_tied_copies else None


def _allocate(model: PreTrainedModel) -> None:
    """Allocate the memory of this rank's part of each weight, and keep the buffers."""
    place = device()
    buffers = {name: buffer.to(place) for name, buffer in model.named_buffers()}
    model.to_empty(device=place)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()  # `to_empty` creates new parameters


def _fill(model: PreTrainedModel, stored: Mapping[str, _StoredTensor]) -> str:
    """Read this rank's rows of each weight; return the name of a weight that is not finite on some rank, or ""."""
    import torch

    names, broken = [""], 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rows = -(-weight.shape[0] // distributed.world_size())  # FSDP gives the last ranks fewer rows
            start = rows * distributed.rank()
            local = weight.to_local()  # type: ignore[attr-defined]  # a DTensor
            if local.numel():
                local.copy_(stored[name].rows(start, start + rows))
            names.append(name)
            broken = broken if is_finite(local) else len(names) - 1
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.copy_(stored[name].rows())
    return names[distributed.largest_over_ranks(broken)]
