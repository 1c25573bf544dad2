"""Run the rows of a batch without their padding: as one row, whose tokens attend only to those of their own row.

Everything in a decoder but attention works on one token at a time, so the result is the same and padding costs nothing.
Attention pads queries, keys and values again, because one causal product for all rows is faster than a mask over all
tokens. Taps and logits keep the shapes of the padded batch, and on a CPU dropout keeps its masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

FEWEST_PADS = 0.05
"""Share of padding from which a batch is packed; below, padding costs less than packing."""
_ATTENTION = "rows of a packed batch"


class Packing:
    """The places of the tokens of a batch (rows x length) in one row without padding.

    Args:
        mask: The attention mask (rows x length).
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        tokens = mask.flatten() != 0
        self.places = tokens.nonzero().squeeze(1)
        """For each token, its place in the flattened padded batch."""
        self.numbers = tokens.cumsum(0) - 1
        """For each place, the number of its token; at padding, of the token before."""
        self.positions = (self.places % self.shape[1]).unsqueeze(0)
        """For each token, its position in its row (1 x tokens)."""

    @property
    def share(self) -> float:
        """The share of padding."""
        return 1 - len(self.places) / len(self.numbers)

    def pack(self, values: Tensor) -> Tensor:
        """Return the values of the tokens: (rows x length x ...) -> (1 x tokens x ...)."""
        return values.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def pad(self, values: Tensor) -> Tensor:
        """Return the values with zeros at padding: (1 x tokens x ...) -> (rows x length x ...)."""
        padded = values.new_zeros(len(self.numbers), *values.shape[2:])
        return padded.index_copy(0, self.places, values.squeeze(0)).view(*self.shape, *values.shape[2:])


_packing: Packing | None = None


def current_packing() -> Packing | None:
    """Return the packing of the batch that the model runs on, or None if it runs on padded rows."""
    return _packing


@contextmanager
def packed(model: Any, packing: Packing) -> Iterator[None]:
    """Let the attention of a model treat its input, inside the block, as the packed rows of a batch.

    Args:
        model: A model for which `can_pack` is true.
        packing: The packing of the batch.
    """
    from transformers import AttentionInterface

    global _packing
    AttentionInterface.register(_ATTENTION, _attend)
    before, _packing = _packing, packing
    attention = model.config._attn_implementation
    model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        _packing = before


def can_pack(model: Any) -> bool:
    """Return whether only the attention of a model mixes tokens, by torch's kernel over all tokens before.

    Other attention (sliding windows, eager implementations), other positions than those of OPT and of rotary
    embeddings, and recurrent layers need padded rows. So does a model that computes its activations again in the
    backward pass, which runs after the block of `packed`.
    """
    config = model.config.get_text_config(decoder=True)
    return (
        config._attn_implementation == "sdpa"
        and bool(getattr(model, "_supports_attention_backend", False))
        and not getattr(model, "is_gradient_checkpointing", False)
        and bool(getattr(config, "rope_parameters", None) or config.model_type == "opt")
        and not getattr(config, "sliding_window", None)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within each row of the packed batch; the tensors are (1 x heads x tokens x head size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert _packing is not None
    query, key, value = (_packing.pad(tensor.transpose(1, 2)).transpose(1, 2) for tensor in (query, key, value))
    attended, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return _packing.pack(attended), None
