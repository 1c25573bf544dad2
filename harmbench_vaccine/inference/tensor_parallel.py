"""The number of GPUs that share the weights of a vLLM engine (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.errors import BadInput

from .engine import Backend


def check_gpus(gpus: int, backends: Iterable[Backend]) -> None:
    """Check that this machine can run vLLM on a number of GPUs, before any work.

    Args:
        gpus: The number of GPUs; 1 is always allowed.
        backends: Backends of the runs.

    Raises:
        BadInput: There are fewer GPUs, or a run does not use vLLM.
    """
    if gpus == 1:
        return
    problem = f"--tensor-parallel {gpus} divides a vLLM engine over {gpus} GPUs, but"
    if device() == "cpu":
        raise BadInput(f"{problem} models run on the CPU. Allowed: 1, or --device cuda on a machine with GPUs.")
    if "transformers" in backends:
        raise BadInput(f"{problem} transformers generates the answers. Allowed: 1, or --backend vllm.")
    import torch

    if gpus > (visible := torch.cuda.device_count()):
        noun = "GPU is" if visible == 1 else "GPUs are"
        raise BadInput(f"{problem} only {visible} {noun} visible. Allowed: at most {visible}.")


def check_heads(model: str, config: Any, gpus: int) -> None:
    """Check that the attention heads of a model can be divided over a number of GPUs.

    Args:
        model: Name of the model in messages.
        config: Its configuration in transformers.
        gpus: The number of GPUs.

    Raises:
        BadInput: They cannot be divided evenly.
    """
    if largest_division(config, gpus) != gpus:
        text_config = config.get_text_config()
        allowed = [str(number) for number in range(1, gpus) if largest_division(config, number) == number]
        raise BadInput(
            f"--tensor-parallel {gpus} does not divide the {text_config.num_attention_heads} attention heads of "
            f"{model!r} evenly. Allowed: {', '.join(allowed)}."
        )


def largest_division(config: Any, gpus: int) -> int:
    """Return the largest number of GPUs, up to `gpus`, over which the attention heads of a model are divided evenly.

    Each GPU computes the same number of heads. If there are fewer heads of keys and values than GPUs, each of them is
    copied to the same number of GPUs.
    """
    text_config = config.get_text_config()
    heads = text_config.num_attention_heads
    key_heads = getattr(text_config, "num_key_value_heads", None) or heads

    def divides(number: int) -> bool:
        return heads % number == 0 and (key_heads % number == 0 or number % key_heads == 0)

    return next(number for number in range(gpus, 0, -1) if divides(number))
