"""A linear layer with LoRA adapters as one autograd function: y = W x + b + sum over adapters of scale * B A drop(x).

peft computes the same by 8 operations per adapter, in the dtype of the adapter (float32): with a bfloat16 base it casts
every input. Here the products have the dtype of x, are summed in float32, and are added to W x in place. Dropout masks
are those of peft. Layers that are not plain linear layers (quantized, GPT-2's Conv1D) keep peft's computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from harmbench_vaccine.core.types import TRAINED_ADAPTER

from .dropout import draw_mask


class LoraLinear(Linear):
    """peft's LoRA layer of an `nn.Linear`, with a forward and a backward pass of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[tuple[tuple[str, ...], torch.dtype], tuple[Tensor, Tensor]] = {}
        """Names of the latest frozen adapters, and the data type of x -> the adapters as one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the layer under its active adapters (... x outputs)."""
        base: Any = self.base_layer
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        is_plain = type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks)
        if args or kwargs or self.merged or self.lora_variant or not is_plain:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        if not names:
            return base(x)
        if not (torch.is_grad_enabled() or self.training):
            a, b = self._joined(tuple(names), x.dtype)
            rows = x.reshape(-1, x.shape[-1])
            y = nn.functional.linear(rows, base.weight, base.bias).addmm_(rows @ a, b)
            return y.view(*x.shape[:-1], y.shape[-1])
        masks, scales, factors = [], [], []
        for name in names:
            dropout = self.lora_dropout[name]
            rate = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
            masks.append(draw_mask(x, rate).reshape(-1, x.shape[-1]) if rate else None)
            scales.append(self.scaling[name] / (1 - rate))
            factors += [self.lora_A[name].weight, self.lora_B[name].weight]
        result: Tensor = _LoraProduct.apply(x, base.weight, base.bias, masks, scales, *factors)
        return result

    def _joined(self, names: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return adapters as one: A^T (inputs x ranks) and scale * B^T (ranks x outputs). Frozen ones are kept."""
        if (names, dtype) not in self._kept:
            factors = [(self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]) for name in names]
            a, b = (
                torch.cat(parts, dim).to(dtype) for parts, dim in zip(zip(*factors, strict=True), (0, 1), strict=True)
            )
            joined = a.T.contiguous(), b.T.contiguous()
            if TRAINED_ADAPTER in names:
                return joined
            self._kept = {(names, dtype): joined}
        return self._kept[names, dtype]


class _LoraProduct(torch.autograd.Function):
    """Inputs: x (... x inputs), W (outputs x inputs), b, and A (rank x inputs), B (outputs x rank) of every adapter.

    W and b are frozen. With g = dL/dy and, of each adapter, d = drop(x), z = scale * A d:

        u = scale * B^T g,   dA = u d^T,   dB = g z^T,   dx = W^T g + sum of drop(A^T u)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        masks: Sequence[Tensor | None],
        scales: Sequence[float],
        *factors: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, weight, bias)
        lows = []
        for mask, scale, a, b in zip(masks, scales, factors[::2], factors[1::2], strict=True):
            dropped = rows if mask is None else rows * mask
            lows.append(_scaled_product(scale, dropped, a.to(rows.dtype).T))
            y.addmm_(lows[-1], b.to(rows.dtype).T)
        ctx.save_for_backward(rows, weight, *masks, *lows, *factors)
        ctx.scales = scales
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, weight, *saved = ctx.saved_tensors
        count = len(ctx.scales)
        masks, lows, factors = saved[:count], saved[count : 2 * count], saved[2 * count :]
        needs_x, needs_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = g @ weight if needs_x else None
        derivatives: list[Tensor | None] = []
        for number, (mask, low, scale) in enumerate(zip(masks, lows, ctx.scales, strict=True)):
            a, b = factors[2 * number : 2 * number + 2]
            needs_a, needs_b = needs_factors[2 * number : 2 * number + 2]
            dlow = _scaled_product(scale, g, b.to(g.dtype))
            derivatives.append(_product(dlow, rows if mask is None else rows * mask, a) if needs_a else None)
            derivatives.append(_product(g, low, b) if needs_b else None)
            if dx is None:
                continue
            if mask is None:
                dx.addmm_(dlow, a.to(g.dtype))
            elif mask.dtype == dx.dtype:
                dx.addcmul_(dlow @ a.to(g.dtype), mask)
            else:
                dx.add_((dlow @ a.to(g.dtype)) * mask)
        if dx is not None:
            dx = dx.view(*gradient.shape[:-1], dx.shape[-1])
        return dx, None, None, None, None, *derivatives


def _scaled_product(scale: float, left: Tensor, right: Tensor) -> Tensor:
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)  # beta = 0 ignores the first argument


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Return left^T right, summed in float32, with the dtype of `like`."""
    if left.is_cuda and left.dtype != like.dtype:
        return torch.mm(left.T, right, out_dtype=like.dtype)
    return left.T.to(like.dtype) @ right.to(like.dtype)
