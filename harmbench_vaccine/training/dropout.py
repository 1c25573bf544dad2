"""The dropout masks of LoRA layers, which two passes of a step can share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from harmbench_vaccine.core.device import forked_rng

from .packing import current_packing

_Draw = tuple[bytes, tuple[int, ...], torch.dtype, float]
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
        The mask, with the shape of x: bool to save memory, but float32 on a CPU, where a product with bool is slow.
    """
    dtype = x.dtype if x.dtype.itemsize > 2 and not x.is_cuda else torch.bool
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=dtype).bernoulli_(1 - rate)
    packing = current_packing()
    if packing and x.shape[:-1].numel() == len(packing.places):  # not the LM head, which reads response tokens only
        return packing.pack(_padded_mask((*packing.shape, x.shape[-1]), dtype, rate)).view(x.shape)
    return _padded_mask(tuple(x.shape), dtype, rate)


def _padded_mask(shape: tuple[int, ...], dtype: torch.dtype, rate: float) -> Tensor:
    """Return the mask of a layer of the padded batch, from the memory if it was drawn before.

    The last pass, which is outside of `same_dropout`, takes the masks out of the memory.
    """
    if not (_memory.records or _memory.masks):
        return _draw(shape, dtype, rate)
    draw = _random_state(), shape, dtype, rate
    if draw in _memory.masks:
        mask, after = _memory.masks[draw] if _memory.records else _memory.masks.pop(draw)
        torch.set_rng_state(after)
        return mask.to(dtype)
    mask = _draw(shape, dtype, rate)
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


def _draw(shape: tuple[int, ...], dtype: torch.dtype, rate: float) -> Tensor:
    return torch.empty(shape, dtype=dtype).bernoulli_(1 - rate)


def _random_state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()
