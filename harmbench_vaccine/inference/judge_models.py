"""Judges' models: loaded when a judge first reads, one at a time."""

from __future__ import annotations

import gc
from typing import Any, Literal

from harmbench_vaccine.data.sources import name_and_revision

from . import memory
from .loading import load_model as load_weights
from .loading import readable_load_errors

Head = Literal["classifier", "generator"]

_held: dict[tuple[str, str, str], tuple[Any, Any]] = {}


def load_judge(location: str, head: Head, dtype: str = "auto") -> tuple[Any, Any]:
    """The tokenizer and the model at a folder or hub id; another one takes its place in memory.

    Raises:
        HbvError: it cannot be loaded.
    """
    key = (location, head, dtype)
    memory.acquire("judge", release_judge)
    if key not in _held:
        release_judge()
        _held[key] = _load(location, head, dtype)
    return _held[key]


def release_judge() -> None:
    """Takes the model out of memory."""
    import torch

    _held.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_tokenizer_and_config(location: str) -> tuple[Any, Any]:
    """The tokenizer and the configuration of a model, without its weights.

    Raises:
        HbvError: they cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    with readable_load_errors(location, "Judge") as place:
        return AutoTokenizer.from_pretrained(**place), AutoConfig.from_pretrained(**place)


def generation_settings(location: str) -> Any:
    """What a model's folder says about how it generates, or what its configuration implies."""
    from transformers import GenerationConfig

    name, revision = name_and_revision(location)
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # it says nothing
        return GenerationConfig.from_model_config(load_tokenizer_and_config(location)[1])


def _load(location: str, head: Head, dtype: str) -> tuple[Any, Any]:
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    kind: Any = "auto" if dtype == "auto" and cuda else getattr(torch, "float32" if dtype == "auto" else dtype)
    tokenizer, config = load_tokenizer_and_config(location)
    auto: Any = transformers.AutoModelForSequenceClassification
    if head == "generator":
        multimodal = "ConditionalGeneration" in (config.architectures or [""])[0]  # Llama Guard 4
        auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    model = load_weights(auto, location, "Judge", dtype=kind)
    return tokenizer, model.to("cuda" if cuda else "cpu").eval()
