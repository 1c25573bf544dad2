"""The number of rows that transformers generates at a time, and the memory that they need."""

from __future__ import annotations

from typing import Any

MOST_ROWS = {"cpu": 128, "cuda": 256}
"""Rows after which a larger batch is not faster: on a CPU, the keys and values of more rows exceed its caches."""
SHARE = 0.5
"""Share of the free memory that a batch may take."""


def rows_that_fit(model: Any, length: int) -> int:
    """Return the number of rows in a batch: a power of two, so that it rarely depends on what else is in memory.

    A row takes the keys and values of all layers, the activations of one layer while the prompts are read (its
    attention and its MLP), and the logits of one position in float32 with their logarithms.

    Args:
        model: A causal language model of transformers, on its device.
        length: Tokens of the longest prompt with its answer.
    """
    text = model.config.get_text_config(decoder=True)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    activations = (4 * text.hidden_size + 3 * inner) * model.dtype.itemsize * length
    row = cache_bytes(model.config, str(model.dtype).removeprefix("torch."), 1, length) + activations
    fitting = int(SHARE * _free_memory(model.device) / (row + 8 * text.vocab_size))
    return min(MOST_ROWS[model.device.type], 1 << max(fitting.bit_length() - 1, 0))


def cache_bytes(config: Any, dtype: str, rows: int, length: int) -> int:
    """Return the bytes of the keys and values that attention keeps of `rows` texts of `length` tokens.

        2 x layers x heads of keys x size of a head x bytes per number x rows x length

    Source: Kwon et al., arXiv 2309.06180, section 3 (800 KB per token of OPT-13B in 16 bits). With grouped queries,
    several heads of queries share one head of keys (Ainslie et al., arXiv 2305.13245). Layers with a sliding window
    keep less than this of a text that is longer than the window. A model without attention heads keeps none.

    Args:
        config: Configuration of the model.
        dtype: Data type of keys and values, that of the weights.
        rows: Number of texts in a batch.
        length: Tokens of a text, prompt and answer together.
    """
    import torch

    text = config.get_text_config(decoder=True)
    queries = getattr(text, "num_attention_heads", 0)
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // max(queries, 1)
    return int(2 * text.num_hidden_layers * heads * size * getattr(torch, dtype).itemsize * rows * length)


def _free_memory(device: Any) -> int:
    """Return the free bytes of a device, with those that PyTorch has reserved and does not use."""
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(psutil.virtual_memory().available)
