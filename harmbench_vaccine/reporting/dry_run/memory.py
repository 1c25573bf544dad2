"""Count memory on models without storage: weights, adapters, activations, and the keys and values of attention."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.device import forked_rng
from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.inference.loading import JudgeHead

from .costs import ModelSize, TrainingMemory
from .random_models import first_layers, layer_count, load_config, random_model, with_adapter

if TYPE_CHECKING:
    from harmbench_vaccine.training.adapters import LoraStack

_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5}
"""Quantization -> bytes per number of a matrix."""


@lru_cache
def count_weights(model: str, dtype: str, head: JudgeHead = "generator", quantization: str = "none") -> ModelSize:
    """Count the weights of a model that only reads or generates.

    Args:
        model: Folder or Hub id.
        dtype: Data type of the weights.
        head: "generator" for a model with a language model head, "classifier" for one with a head of labels.
        quantization: "none", "8bit" or "4bit".

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    import torch

    with torch.device("meta"), forked_rng():
        return _model_size(random_model(load_config(model), dtype, head), quantization)


@lru_cache
def count_memory(
    model: str,
    dtype: str,
    quantization: str,
    settings: TrainSettings,
    width: int,
    gradient_checkpointing: bool = False,
) -> TrainingMemory:
    """Count the memory of a training step on `settings.batch` rows of `width` tokens.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    import torch

    config = load_config(model)
    with torch.device("meta"), forked_rng():
        base = random_model(config, dtype)
        size = _model_size(base, quantization)
        stack = with_adapter(base, settings)
        trained = sum(parameter.numel() for parameter in stack.model.parameters() if parameter.requires_grad)
        try:
            activations = _activation_bytes(stack, settings.batch, width)
        except (RuntimeError, NotImplementedError):  # the forward pass reads values, as the one of OPT does
            activations = None
    if activations is None:
        with forked_rng():
            first, second = (
                _activation_bytes(with_adapter(random_model(first_layers(config, layers), dtype), settings), 1, width)
                for layers in (1, 2)
            )
        activations = settings.batch * (first + (layer_count(config) - 1) * (second - first))
    if gradient_checkpointing:  # the input of every layer, and the activations of one layer
        text, layers = config.get_text_config(decoder=True), layer_count(config)
        inputs = settings.batch * width * text.hidden_size * base.dtype.itemsize
        activations = min(activations, layers * inputs + activations // layers)
    return TrainingMemory(size.weights, size.matrices, 16 * trained, activations)


def _model_size(base: Any, quantization: str) -> ModelSize:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    if quantization in _QUANTIZED_BYTES:  # of the layers; the head stays in the data type of the model
        layers = _matrix_numbers(base.get_decoder().modules())
        weights -= round(layers * (base.dtype.itemsize - _QUANTIZED_BYTES[quantization]))
    return ModelSize(weights, _matrix_numbers(base.modules()))


def _matrix_numbers(modules: Any) -> int:
    import torch

    return sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))


def _activation_bytes(stack: LoraStack, rows: int, width: int) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, without the weights."""
    import torch

    model = stack.model
    ids = torch.zeros(rows, width, dtype=torch.long, device=next(model.parameters()).device)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, labels=ids)  # keep it alive: a freed storage's identity could be reused
    del output
    return sum(sizes.values())


# ---------------------------------------------------------------------------------------------------------------------
# Inference


def drift_bytes(config: Any, dtype: str, rows: int, width: int) -> int:
    """Return the bytes of the tensors by which drift and alignment loss compare two models on one batch.

        attention outputs of both models: 2 x layers x rows x width x hidden size x bytes per number
        logits of both models, and in float64 with their logarithms: rows x width x vocabulary x (2 x bytes + 16)

    An upper bound: only the logits of response tokens are in float64. Source: `evaluation/drift.py`.

    Args:
        config: Configuration of the model.
        dtype: Data type of the weights.
        rows: Rows in a batch.
        width: Tokens per row.
    """
    import torch

    text, itemsize = config.get_text_config(decoder=True), getattr(torch, dtype).itemsize
    outputs = 2 * layer_count(config) * text.hidden_size * itemsize
    return int(rows * width * (outputs + text.vocab_size * (2 * itemsize + 16)))
