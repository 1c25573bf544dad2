"""Forward hooks on the attention blocks of a model, written without the taps of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a Llama, by their names."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def projections(model: nn.Module) -> list[nn.Module]:
    """Return the output projection of each attention block, which is its last module."""
    names = ("self_attn.o_proj", "self_attn.out_proj", "attn.c_proj")
    return [module for name, module in model.named_modules() if name.endswith(names)]


@contextmanager
def hooked(model: nn.Module, act: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `act(l, h_l)` on the output of the projection of attention block l, and replace the output by the result."""
    handles = [
        projection.register_forward_hook(lambda module, args, output, number=number: act(number, output))
        for number, projection in enumerate(projections(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def applied_shifts(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """List for every forward pass the tensors that were added to the attention outputs.

    A shift is (input of the second norm) - (input of the layer) - (output of the projection), so that it is detected
    wherever between projection and residual it is added.
    """
    passes: list[list[Tensor]] = []
    values: dict[tuple[int, str], Tensor] = {}
    handles = []

    def enter(number: int, args: Any, kwargs: Any) -> None:
        values[number, "residual"] = args[0] if args else kwargs["hidden_states"]

    def project(number: int, output: Tensor) -> None:
        values[number, "raw"] = output

    def leave(number: int, norm_input: Tensor) -> None:
        if number == 0:
            passes.append([])
        shift = norm_input.double() - values[number, "residual"].double() - values[number, "raw"].double()
        passes[-1].append(shift.detach())

    for number, layer in enumerate(decoder_layers(model)):
        handles += [
            layer.register_forward_pre_hook(lambda m, args, more, n=number: enter(n, args, more), with_kwargs=True),
            layer.self_attn.o_proj.register_forward_hook(lambda m, args, output, n=number: project(n, output)),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args, n=number: leave(n, args[0])),
        ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
