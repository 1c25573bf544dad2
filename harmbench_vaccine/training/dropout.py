"""The dropout masks of LoRA layers, which two passes of a step can share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from harmbench_vaccine.core.device import forked_rng

from .packing import current_packing

_Draw = tuple[bytes, torch.Size, torch.dtype, float]
"""The random state before a mask, the mask's shape and dtype, and the rate."""


class _MaskMemory:
    """The masks of the passes inside `same_dropout`, on a CPU.

    Drawing masks is a third of a small model's step there: torch draws one number after the other, on one core. The
    same random state, shape and rate give the same mask, so that a later pass takes it from here.
    """

    def __init__(self) -> None:
        self.masks: dict[_Draw, tuple[Tensor, Tensor]] = {}
        """Draw -> the mask (bool, to save memory) and the random state after it."""
        self.records = False
        self.start = b""
        """The random state before the first of these masks."""


_memory = _MaskMemory()


def draw_mask(x: Tensor, rate: float) -> Tensor:
    """Draw the mask of dropout: 0 with probability `rate`, else 1. It uses the random numbers of torch's dropout.

    Args:
        x: The input that the mask multiplies.
        rate: Probability of 0.

    Returns:
        The mask, with the shape of x: in its dtype on a CPU, where a product with bool is slow; else bool.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate)
    if not (_memory.records or _memory.masks):
        return _draw(x, rate)
    draw = _random_state(), x.shape, x.dtype, rate
    if draw in _memory.masks:
        mask, after = _memory.masks[draw]
        torch.set_rng_state(after)
        return mask.to(x.dtype)
    mask = _draw(x, rate)
    if _memory.records:
        _memory.masks[draw] = mask.bool(), torch.get_rng_state()
    return mask


@contextmanager
def same_dropout() -> Iterator[None]:
    """Restore the random state after the block, so that the next forward pass draws the same dropout masks.

    On a CPU, the masks stay in memory until `forget_masks`, or until a block that begins at another random state.
    """
    state, outer = _random_state(), _memory.records
    if state != _memory.start:
        forget_masks()
    _memory.start, _memory.records = state, True
    try:
        with forked_rng():
            yield
    finally:
        _memory.records = outer


def forget_masks() -> None:
    """Free the masks of `same_dropout`."""
    _memory.masks.clear()


def _draw(x: Tensor, rate: float) -> Tensor:
    packing = current_packing()
    if packing is None:
        return torch.empty_like(x).bernoulli_(1 - rate)
    return packing.pack(x.new_empty(*packing.shape, x.shape[-1]).bernoulli_(1 - rate))  # as for padded rows


def _random_state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()
