"""The tiny model in plain PyTorch, for tests that state the equations of a method without the code of the package."""

from __future__ import annotations

from torch import Tensor
from torch.func import functional_call

from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.training.stage import Batch, TrainingStage

from . import tiny

BASE = tiny.model().requires_grad_(False)
SCALE = 2.0  # alpha / rank of tiny.settings
Values = dict[str, Tensor]
"""Factors of an adapter, by their names in the model."""


def cross_entropy(values: Values, batch: Batch) -> Tensor:
    """Return the mean of -log p(next token) over the response tokens, for an adapter with these values."""
    weights = {}
    for name, a in values.items():
        if ".lora_A." in name:
            weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
            weights[weight] = BASE.get_parameter(weight) + SCALE * values[name.replace("lora_A", "lora_B")] @ a
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    log_p = functional_call(BASE, weights, (), inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    return -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].mean()


def leaves(stage: TrainingStage) -> Values:
    """Return a copy of the parameters of the adapter, as leaves of a new graph."""
    return {name: value.detach().clone().requires_grad_() for name, value in stage.trainable.items()}
