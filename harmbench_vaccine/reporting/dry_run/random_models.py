"""Models with random weights in the shape of a real model, of which only the configuration is needed."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.data import hub
from harmbench_vaccine.data.sources import is_dequantized, local_path
from harmbench_vaccine.inference.dequantization import gguf_config
from harmbench_vaccine.inference.loading import JudgeHead, readable_load_errors

if TYPE_CHECKING:
    from harmbench_vaccine.training.adapters import LoraStack


class ModelShape(BaseModel):
    """The shape of models, as `model_shapes.yaml` has it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    models: list[str]
    """Hub ids."""
    parameters: int
    """Number of weights."""
    shape: dict[str, Any]
    """Values of config.json."""


@lru_cache
def model_shapes() -> dict[str, ModelShape]:
    """Return Hub id -> shape, for the models whose shapes are part of the package."""
    text = Path(__file__).with_name("model_shapes.yaml").read_text(encoding="utf-8")
    shapes = TypeAdapter(list[ModelShape]).validate_python(yaml.safe_load(text))
    return {name: shape for shape in shapes for name in shape.models}


@lru_cache
def gated_models() -> frozenset[str]:
    """Return the Hub ids of models whose license has to be accepted before a download."""
    text = Path(__file__).with_name("gated_models.yaml").read_text(encoding="utf-8")
    return frozenset(TypeAdapter(list[str]).validate_python(yaml.safe_load(text)))


def load_config(model: str) -> Any:  # a configuration of transformers, of any architecture
    """Return the configuration of a model: from its folder or the cache, else from the package, else from the Hub.

    Raises:
        HbvError: It cannot be read.
    """
    from transformers import AutoConfig

    name = None if local_path(model) else hub.parse_hub_name(model)
    if name and name.id in model_shapes() and not hub.is_cached("model", name):
        return AutoConfig.for_model(**model_shapes()[name.id].shape, name_or_path=model)
    if not is_dequantized(model):
        return gguf_config(model)
    with readable_load_errors(model) as arguments:
        return AutoConfig.from_pretrained(**arguments)


def layer_count(config: Any) -> int:
    """Return the number of decoder layers."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def random_model(
    config: Any, dtype: str, head: JudgeHead = "generator"
) -> Any:  # a model of transformers, of any architecture
    """Return a model with random weights, on the default device of torch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if head == "classifier" else AutoModelForCausalLM
    with readable_load_errors(config.name_or_path):
        return kind.from_config(config, trust_remote_code=False, dtype=getattr(torch, dtype))


def with_adapter(base: Any, settings: TrainSettings) -> LoraStack:
    """Return a model with a trainable adapter."""
    from harmbench_vaccine.training.adapters import LoraStack

    stack = LoraStack(base)
    stack.train((), settings, 0)
    stack.model.train()
    return stack


def first_layers(config: Any, layers: int) -> Any:
    """Return a configuration with fewer layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return small
