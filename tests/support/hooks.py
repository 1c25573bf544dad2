"""Forward hooks on the attention blocks of a model, written without the taps of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers of a Llama, by name."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def projections(model: nn.Module) -> list[nn.Module]:
    """The output projection of each attention block, which is the last thing that the block does."""
    return [
        module for name, module in model.named_modules() if name.endswith(("self_attn.o_proj", "self_attn.out_proj"))
    ]


@contextmanager
def hooked(model: nn.Module, act: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
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
    """What was added to each attention output, for every forward pass: (input of the second norm) - (input of the
    layer) - (output of the projection). So it sees a shift wherever between projection and residual it is added."""
    passes: list[list[Tensor]] = []
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []

    def entering(number: int, args: Any, kwargs: Any) -> None:
        seen[number, "residual"] = args[0] if args else kwargs["hidden_states"]

    def projected(number: int, output: Tensor) -> None:
        seen[number, "raw"] = output

    def leaving(number: int, norm_input: Tensor) -> None:
        if number == 0:
            passes.append([])
        shift = norm_input.double() - seen[number, "residual"].double() - seen[number, "raw"].double()
        passes[-1].append(shift.detach())

    for number, layer in enumerate(decoder_layers(model)):
        handles += [
            layer.register_forward_pre_hook(lambda m, args, more, n=number: entering(n, args, more), with_kwargs=True),
            layer.self_attn.o_proj.register_forward_hook(lambda m, args, output, n=number: projected(n, output)),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args, n=number: leaving(n, args[0])),
        ]  # fmt: skip
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
