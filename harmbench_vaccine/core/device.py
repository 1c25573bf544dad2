"""The device that models run on. `--device` or `HBV_DEVICE` chooses it, and no other module decides.

The choice is stored in `HBV_DEVICE`, which processes that this one starts inherit.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .errors import BadInput, unknown_name
from .torch_build import is_cpu_build

if TYPE_CHECKING:
    from torch.nn import Module

ModelT = TypeVar("ModelT", bound="Module")
VARIABLE = "HBV_DEVICE"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GPU = re.compile(r"cuda:(\d{1,3})", re.ASCII)
_OTHER_GPU_NAME = re.compile(r"(gpu|nvidia)(:\d{1,3})?", re.ASCII | re.IGNORECASE)

_choice: tuple[str, str] | None = None
"""The GPU that this process chose, such as "cuda:1", and the `CUDA_VISIBLE_DEVICES` that shows only this GPU."""

Device = Literal["cpu", "cuda"]


def device() -> Device:
    """Return the device of all models in this process: the chosen one, or else a GPU if one is available.

    Raises:
        BadInput: `HBV_DEVICE` is unknown or not available.
    """
    name = os.environ.get(VARIABLE, "")
    if not name:
        if "torch" not in sys.modules and is_cpu_build():  # to import torch takes a second
            return "cpu"
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return select_device(name)


def select_device(name: str) -> Device:
    """Choose the device of this process and of those that it starts, before it uses a GPU.

    To choose the same device again changes nothing.

    Args:
        name: "cpu", which hides all GPUs: libraries would use some memory of each. "cuda". "cuda:N" for one of the
            visible GPUs, which hides the others.

    Raises:
        BadInput: The device is unknown or not available.
    """
    if name == "mps":
        raise BadInput(
            "Device 'mps' (Apple GPUs) is not supported: it has no float64, in which drift is measured, and its random "
            "state is not part of checkpoints. Allowed: cpu, which is enough for the testbed."
        )
    if _choice is not None and _choice == (name, os.environ.get(_VISIBLE)):  # now the only visible GPU, as cuda:0
        return "cuda"
    gpu = _GPU.fullmatch(name)
    if name != "cpu" and name not in (names := available_devices()):
        allowed = f"Allowed on this machine: {', '.join(names)}."
        if name == "cuda" or gpu:
            raise BadInput(f"Device {name!r} is not available. {allowed}")
        if other := _OTHER_GPU_NAME.fullmatch(name):
            raise BadInput(f"Unknown device {name!r}. Did you mean 'cuda{other[2] or ''}'? {allowed}")
        raise unknown_name("device", name, names)
    if name == "cpu":
        os.environ[_VISIBLE] = ""
    if gpu:
        _show_only(name, int(gpu[1]))
    kind: Device = "cpu" if name == "cpu" else "cuda"
    os.environ[VARIABLE] = kind
    return kind


def place_model(model: ModelT) -> ModelT:
    """Move a model to the device of this process, in place, before a hook or an adapter uses it.

    Weights that have a place of their own stay there: quantized or sharded ones, and those without storage (`meta`).

    Returns:
        The same model.
    """
    weight: Any = next(model.parameters(), None)
    has_own_place = weight is None or weight.is_meta or hasattr(weight, "device_mesh")  # of a sharded weight
    return model if has_own_place or getattr(model, "quantization_method", None) else model.to(device())


def forked_rng() -> AbstractContextManager[None]:
    """Restore the random states of the CPU and of the device after the block; other GPUs are not touched."""
    import torch

    return torch.random.fork_rng([torch.cuda.current_device()] if device() == "cuda" else [])


@contextmanager
def restored_random_states() -> Iterator[None]:
    """Restore the random states of Python, numpy, the CPU and all GPUs after the block.

    GPUs that the program had not used before are seeded with the seed of the CPU, as at their first use.
    """
    import random

    import numpy as np
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus is None:
            torch.cuda.manual_seed_all(torch.initial_seed())
        else:
            torch.cuda.set_rng_state_all(gpus)


def available_devices() -> list[str]:
    """Return the devices of this machine that can be chosen, as far as `CUDA_VISIBLE_DEVICES` shows them."""
    import torch

    count = torch.cuda.device_count()  # unlike `is_available`, it leaves `CUDA_VISIBLE_DEVICES` open to changes
    return ["cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]


def _show_only(name: str, number: int) -> None:
    """Hide all visible GPUs but one from this process and from those that it starts.

    Raises:
        BadInput: This process has read the list of GPUs already.
    """
    import torch

    global _choice
    before = os.environ.get(_VISIBLE)
    visible = [gpu for gpu in (before or "").split(",") if gpu]
    only = visible[number] if visible else str(number)
    os.environ[_VISIBLE] = only
    if torch.cuda.is_initialized() or torch.cuda.device_count() != 1:
        if before is None:
            del os.environ[_VISIBLE]
        else:
            os.environ[_VISIBLE] = before
        raise BadInput(
            f"Device {name!r} cannot be chosen in a process that uses GPUs already: start it with {_VISIBLE}={only}."
        )
    _choice = name, only
