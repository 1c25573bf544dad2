"""GGUF files of tiny Llama models, as llama.cpp writes them. The package `gguf` must be installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CONTROL, _NORMAL = 3, 1
"""Types of tokens in a GGUF file."""


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: str = "Q8_0",
    architecture: str = "llama",
    changes: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a Llama model with its byte-level tokenizer to a GGUF file.

    Args:
        path: The file.
        model: The model; the embeddings are not tied.
        tokenizer: The tokenizer.
        kind: Quantization of the matrices; "F32" for none.
        architecture: The architecture that the file names.
        changes: Name of a tensor -> other values; None leaves it out.

    Returns:
        The path.
    """
    config: Any = model.config
    file = gguf.GGUFWriter(path, architecture)
    file.add_name("a tiny model")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_rope_dimension_count(config.head_dim)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    _add_tokenizer(file, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        short = names.get_name(name, try_suffixes=(".weight",))
        assert short is not None, name
        values = (changes or {}).get(short, _in_order(name, weight.cpu().numpy(), config))
        if values is not None:
            _add_tensor(file, short, values, kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _add_tokenizer(file: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].__getitem__)
    special = set(tokenizer.all_special_tokens)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(tokens)
    file.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    file.add_token_merges([" ".join(merge) for merge in words["merges"]])
    file.add_bos_token_id(tokenizer.bos_token_id)
    file.add_eos_token_id(tokenizer.eos_token_id)
    file.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        file.add_chat_template(str(tokenizer.chat_template))


def _in_order(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Return a weight in the order of llama.cpp, which pairs neighboring rows of queries and keys for its rotation."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if projection in name:
            pairs = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
            return pairs.swapaxes(1, 2).reshape(weight.shape)
    return weight


def _add_tensor(file: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    if values.ndim == 1 or kind == "F32":
        file.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
        return
    quantization = gguf.GGMLQuantizationType[kind]
    file.add_tensor(name, gguf.quantize(values, quantization), raw_dtype=quantization)
