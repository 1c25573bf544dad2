"""Hidden-state taps: read or shift the outputs of the blocks of a decoder.

Blocks are recognized by structure, not by class. The decoder layers are the module list whose length is the
configuration's number of layers. The attention block of a layer is the child whose forward takes an attention mask;
its MLP is the last of the other children with matrices. A tap reads the block's output before any norm and before the
residual is added.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harmbench_vaccine.core.errors import BadInput

from .packing import current_packing

TapPlace = Literal["attention", "mlp", "layer"]
"""The block whose output is tapped: attention block, MLP, or complete decoder layer."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the layers of the text decoder.

    Raises:
        BadInput: No module list of the configured length contains attention blocks.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    depth = config.num_hidden_layers
    get = getattr(model, "get_decoder", None)
    text = get() if get else None  # for a model with a vision tower, the part that reads text
    for module in [*(text.modules() if isinstance(text, nn.Module) else ()), *model.modules()]:
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(_attentions(layer) for layer in module):
            return module
    raise BadInput(
        f"No attention block found in {type(model).__name__}: hidden-state taps need a decoder of {depth} layers "
        "with one child that takes an attention mask."
    )


def attention_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the attention blocks in layer order, skipping layers without one (hybrid models).

    Raises:
        BadInput: No layer has an attention block, or a layer has several.
    """
    blocks: list[nn.Module] = []
    for number, layer in enumerate(decoder_layers(model)):
        attentions = _attentions(layer)
        if len(attentions) > 1:
            raise BadInput(
                f"Layer {number} of {type(model).__name__} has {len(attentions)} attention blocks; taps need one."
            )
        blocks += attentions
    return blocks


def _attentions(layer: nn.Module) -> list[nn.Module]:
    def takes_mask(module: nn.Module) -> bool:
        return "attention_mask" in inspect.signature(module.forward).parameters

    return [child for child in layer.children() if takes_mask(child)]


def mlp_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the last module of the feed-forward half of every layer: the MLP, or else the last matrix.

    Raises:
        BadInput: A layer has no such module.
    """
    blocks = []
    for number, layer in enumerate(decoder_layers(model)):
        attentions = _attentions(layer)
        candidates = [
            child
            for child in layer.children()
            if child not in attentions and any(parameter.dim() > 1 for parameter in child.parameters())
        ]
        if not candidates:
            raise BadInput(
                f"Layer {number} of {type(model).__name__} has no MLP: hidden-state taps need a child with matrices "
                "next to the attention block."
            )
        blocks.append(candidates[-1])
    return blocks


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm between the last layer and the LM head.

    Raises:
        BadInput: The model has no such norm.
    """
    layers = decoder_layers(model)
    decoder = next(module for module in model.modules() if any(child is layers for child in module.children()))
    norms = [child for child in decoder.children() if {p.dim() for p in child.parameters()} == {1}]
    if not norms:
        raise BadInput(
            f"{type(model).__name__} has no norm before its LM head: the decoder needs a child with only vectors."
        )
    return norms[-1]


def layer_numbers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[int | None]:
    """Return the decoder layer of each parameter, counted from 0; None outside the layers."""
    numbers = {
        id(parameter): number for number, layer in enumerate(decoder_layers(model)) for parameter in layer.parameters()
    }
    return [numbers.get(id(parameter)) for parameter in parameters]


class Taps:
    """Taps on the blocks of one model; the forward hooks exist only inside the context managers.

    Args:
        model: The model.
        place: The blocks to tap.
        trainable: Returns the trainable parameters; by default they are searched in the model.

    Raises:
        BadInput: The model has no such blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        place: TapPlace = "attention",
        trainable: Callable[[], Iterable[nn.Parameter]] | None = None,
    ) -> None:
        find: dict[TapPlace, Callable[[nn.Module], Sequence[nn.Module]]] = {
            "attention": attention_blocks,
            "mlp": mlp_blocks,
            "layer": lambda model: list(decoder_layers(model)),
        }
        self._trainable = trainable or model.parameters
        self.blocks = find[place](model)
        layers = decoder_layers(model)
        self._first = layers[0]
        places = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
        self.layers = [places[id(block)] for block in self.blocks]
        """The decoder layer of each block, counted from 0: a layer without attention has no block."""

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Collect the outputs of one forward pass inside the block: a list of L tensors (batch x length x width)."""
        outputs: list[Tensor] = []
        with self.changed(lambda number, output: outputs.append(output)):
            yield outputs

    @contextmanager
    def shifted(self, shifts: Sequence[Tensor]) -> Iterator[None]:
        """Add `shifts[l]` (batch x length x width) to the output of block l in every forward pass inside the block."""
        with self.changed(lambda number, output: output + shifts[number].to(output.dtype)):
            yield

    @contextmanager
    def probed(self) -> Iterator[list[Tensor]]:
        """Add zeros that require a gradient to the block outputs, to read dL/dh_l.

        After a forward pass, the list contains L leaves e_l (batch x length x width, float32) with dL/de_l = dL/dh_l.
        It is empty after the block, which frees their memory. Gradient checkpointing recomputes the forward pass with
        the same leaves. The parameters need no gradient inside the block, so that the backward pass stops at the first
        block and computes nothing else.
        """
        free = [parameter for parameter in self._trainable() if parameter.requires_grad]
        probes: dict[int, Tensor] = {}
        leaves: list[Tensor] = []

        def add(number: int, output: Tensor) -> Tensor:
            if number not in probes:
                probes[number] = torch.zeros_like(output, dtype=torch.float32, requires_grad=True)
                leaves.append(probes[number])
            return output + probes[number].to(output.dtype)

        try:
            for parameter in free:
                parameter.requires_grad_(False)
            with self.changed(add):
                yield leaves
        finally:
            probes.clear()
            leaves.clear()
            for parameter in free:
                parameter.requires_grad_(True)

    @contextmanager
    def changed(self, change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Replace the block outputs of every forward pass inside the block.

        Args:
            change: Called as `change(l, output)` with the output of block l (batch x length x width). It returns the
                new output, or None to keep the old one.
        """

        shape: list[int] = []  # rows and length of the current batch

        def enter(module: nn.Module, args: Any, named: Any) -> None:
            shape[:] = (args[0] if args else named["hidden_states"]).shape[:2]

        def hook(number: int) -> Any:
            def run(module: nn.Module, args: Any, output: Any) -> Any:
                first = output[0] if isinstance(output, tuple) else output
                states, packing = first.reshape(*shape, -1), current_packing()  # OPT flattens the tokens before its MLP
                replacement = change(number, packing.pad(states) if packing else states)
                if replacement is None:
                    return None
                replacement = (packing.pack(replacement) if packing else replacement).reshape(first.shape)
                return (replacement, *output[1:]) if isinstance(output, tuple) else replacement

            return run

        handles = [block.register_forward_hook(hook(number)) for number, block in enumerate(self.blocks)]
        handles.append(self._first.register_forward_pre_hook(enter, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
