"""Forward hooks on the attention blocks of a model, written without the taps of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import tiny


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


def rows_of(values: Tensor, positions: Tensor | None) -> Tensor:
    """Return the rows of a forward pass, padded with zeros.

    Args:
        values: Rows x length x ...; with positions: 1 x tokens x ...
        positions: The positions of the tokens (1 x tokens): each row starts at 0.
    """
    if positions is None:
        return values
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
    return pad_sequence([values[0, start:end] for start, end in pairwise(starts)], batch_first=True)


@contextmanager
def recorded_rows(model: nn.Module) -> Iterator[list[list[list[int]]]]:
    """List for every forward pass the tokens of its rows, without padding."""
    passes: list[list[list[int]]] = []

    def record(module: nn.Module, args: Any, named: Any) -> None:
        rows = rows_of(named["input_ids"], named.get("position_ids"))
        passes.append([[token for token in row if token != tiny.PAD] for row in rows.tolist()])

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def applied_shifts(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """List for every forward pass the tensors that were added to the attention outputs (rows x length x width).

    A shift is (input of the second norm) - (input of the layer) - (output of the projection), so that it is detected
    wherever between projection and residual it is added.
    """
    passes: list[list[Tensor]] = []
    values: dict[tuple[int, str], Tensor] = {}
    positions: list[Tensor | None] = []
    handles = [
        model.register_forward_pre_hook(
            lambda module, args, named: positions.append(named.get("position_ids")), with_kwargs=True
        )
    ]

    def enter(number: int, args: Any, kwargs: Any) -> None:
        values[number, "residual"] = args[0] if args else kwargs["hidden_states"]

    def project(number: int, output: Tensor) -> None:
        values[number, "raw"] = output

    def leave(number: int, norm_input: Tensor) -> None:
        if number == 0:
            passes.append([])
        shift = norm_input.double() - values[number, "residual"].double() - values[number, "raw"].double()
        passes[-1].append(rows_of(shift.detach(), positions[-1]))

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
