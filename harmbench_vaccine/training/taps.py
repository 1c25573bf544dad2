"""Hidden-state taps: read, and shift, the outputs of the blocks of a decoder.

Blocks are found by structure, not by class: a decoder layer is an element of the module list that is as long as the
configuration says, its attention block is the child whose forward takes an attention mask, and its MLP is the last
other child with matrices. The tap stands at the block's own output, before any norm and before the residual is added.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harmbench_vaccine.core.errors import BadInput

TapPlace = Literal["attention", "mlp", "layer"]
"""Whose output is tapped: the attention block's, the MLP's, or the whole decoder layer's."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The text decoder's layers.

    Raises:
        BadInput: no module list of the configuration's length has attention blocks in it.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    depth = config.num_hidden_layers
    get = getattr(model, "get_decoder", None)
    text = get() if get else None  # of a model with a vision tower, the part that reads text
    for module in [*(text.modules() if isinstance(text, nn.Module) else ()), *model.modules()]:
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(_attentions(layer) for layer in module):
            return module
    raise BadInput(
        f"No attention block found in {type(model).__name__}: hidden-state taps need a decoder of {depth} layers "
        "with one child that takes an attention mask."
    )


def attention_blocks(model: nn.Module) -> list[nn.Module]:
    """The attention blocks, from first layer to last (layers without one, as in hybrid models, are passed over).

    Raises:
        BadInput: there is none, or a layer has several.
    """
    blocks: list[nn.Module] = []
    for number, layer in enumerate(decoder_layers(model)):
        found = _attentions(layer)
        if len(found) > 1:
            raise BadInput(
                f"Layer {number} of {type(model).__name__} has {len(found)} attention blocks; taps need one."
            )
        blocks += found
    return blocks


def _attentions(layer: nn.Module) -> list[nn.Module]:
    def takes_mask(module: nn.Module) -> bool:
        return "attention_mask" in inspect.signature(module.forward).parameters

    return [child for child in layer.children() if takes_mask(child)]


def mlp_blocks(model: nn.Module) -> list[nn.Module]:
    """What ends the feed-forward half of every layer: its MLP, or, where that is no module of its own, its last matrix.

    Raises:
        BadInput: a layer has none.
    """
    blocks = []
    for number, layer in enumerate(decoder_layers(model)):
        attentions = _attentions(layer)
        found = [
            child
            for child in layer.children()
            if child not in attentions and any(parameter.dim() > 1 for parameter in child.parameters())
        ]
        if not found:
            raise BadInput(f"Layer {number} of {type(model).__name__} has no MLP that hidden-state taps could find.")
        blocks.append(found[-1])
    return blocks


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the LM head.

    Raises:
        BadInput: there is none.
    """
    layers = decoder_layers(model)
    decoder = next(module for module in model.modules() if any(child is layers for child in module.children()))
    norms = [child for child in decoder.children() if {p.dim() for p in child.parameters()} == {1}]
    if not norms:
        raise BadInput(f"{type(model).__name__} has no norm before its LM head.")
    return norms[-1]


def layer_numbers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[int | None]:
    """The decoder layer of each parameter, counted from 0; None outside the layers."""
    numbers = {
        id(parameter): number for number, layer in enumerate(decoder_layers(model)) for parameter in layer.parameters()
    }
    return [numbers.get(id(parameter)) for parameter in parameters]


class Taps:
    """Taps on the blocks of one model; hooks are in place only inside the context managers."""

    def __init__(self, model: nn.Module, place: TapPlace = "attention") -> None:
        find: dict[TapPlace, Callable[[nn.Module], Sequence[nn.Module]]] = {
            "attention": attention_blocks, "mlp": mlp_blocks, "layer": lambda model: list(decoder_layers(model)),
        }  # fmt: skip
        self.blocks = find[place](model)
        layers = decoder_layers(model)
        self._first = layers[0]
        places = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
        self.layers = [places[id(block)] for block in self.blocks]
        """The decoder layer of each block, counted from 0: a layer without attention has no block."""

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Collects the outputs of one forward pass: a list of L tensors (batch x length x width)."""
        outputs: list[Tensor] = []
        with self.changed(lambda number, output: outputs.append(output)):
            yield outputs

    @contextmanager
    def shifted(self, shifts: Sequence[Tensor]) -> Iterator[None]:
        """Adds `shifts[l]` (batch x length x width) to the output of block l in every forward pass inside."""
        with self.changed(lambda number, output: output + shifts[number].to(output.dtype)):
            yield

    @contextmanager
    def probed(self) -> Iterator[list[Tensor]]:
        """Adds zeros that require a gradient: after a forward pass, the list holds L leaves e_l
        (batch x length x width, float32) with dL/de_l = dL/dh_l. Under gradient checkpointing the recomputed
        forward meets the same leaves."""
        probes: dict[int, Tensor] = {}
        leaves: list[Tensor] = []

        def add(number: int, output: Tensor) -> Tensor:
            if number not in probes:
                probes[number] = torch.zeros_like(output, dtype=torch.float32, requires_grad=True)
                leaves.append(probes[number])
            return output + probes[number].to(output.dtype)

        with self.changed(add):
            yield leaves

    @contextmanager
    def changed(self, change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Runs `change(l, output)` on the output of block l (batch x length x width); what it returns takes the
        output's place, None leaves it."""

        shape: list[int] = []  # rows and length of the batch

        def enter(module: nn.Module, args: Any, named: Any) -> None:
            shape[:] = (args[0] if args else named["hidden_states"]).shape[:2]

        def hook(number: int) -> Any:
            def run(module: nn.Module, args: Any, output: Any) -> Any:
                first = output[0] if isinstance(output, tuple) else output
                changed = change(number, first.reshape(*shape, -1))  # OPT's MLP is given all tokens in one row
                if changed is None:
                    return None
                changed = changed.reshape(first.shape)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return run

        handles = [block.register_forward_hook(hook(number)) for number, block in enumerate(self.blocks)]
        handles.append(self._first.register_forward_pre_hook(enter, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
