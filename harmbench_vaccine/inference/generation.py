"""Batched greedy generation, shared by the engines that answer prompts and by the judges that write text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from harmbench_vaccine.core.progress import Advance
from harmbench_vaccine.data.collate import left_padded_batches
from harmbench_vaccine.data.model_limits import check_readable


@dataclass(frozen=True)
class GeneratedTokens:
    """Tokens that a model generated after a prompt."""

    tokens: list[int]
    """Token ids before the stop token."""
    finished: bool
    """True if a stop token ended the sequence, False if the limit did."""
    log_probs: list[list[float]] = field(default_factory=list)
    """(generated tokens, with the stop token) x (watched tokens); empty if no token is watched."""


def cut_at_stop(ids: Sequence[int], ends: Sequence[int], log_probs: Sequence[list[float]] = ()) -> GeneratedTokens:
    """Cut generated ids at the first stop token.

    Args:
        ids: Generated token ids; padding may follow the stop token.
        ends: Ids of the stop tokens.
        log_probs: For each id, the log-probabilities of the watched tokens at its position.
    """
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    if end is None:
        return GeneratedTokens(list(ids), False, list(log_probs))
    return GeneratedTokens(list(ids[:end]), True, list(log_probs[: end + 1]))


def generate_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch: int,
    pad: int,
    ends: Sequence[int],
    advance: Advance,
    watched: Sequence[int] = (),
) -> list[GeneratedTokens]:
    """Generate from token ids with a transformers model, greedily, in batches of similar length padded on the left.

    Args:
        model: A causal language model of transformers, or a peft model around one.
        prompts: Token ids of each prompt.
        max_new_tokens: Largest number of generated tokens, with the stop token.
        batch: Largest number of prompts in a batch.
        pad: Id of the padding token.
        ends: Ids of the stop tokens.
        advance: Called with the number of prompts of each finished batch.
        watched: Tokens whose log-probabilities are returned at every position.

    Returns:
        The generated tokens of each prompt, in the order of `prompts`.

    Raises:
        HbvError: The longest prompt and its continuation have more tokens than the model reads, or a token has no
            embedding.
    """
    check_readable(model.name_or_path, model.config, prompts, max_new_tokens)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=list(ends),
        use_cache=True,
        output_logits=bool(watched),
        return_dict_in_generate=True,
    )
    device = next(model.parameters()).device
    rows: dict[int, GeneratedTokens] = {}
    with torch.inference_mode():
        for numbers, ids, mask in left_padded_batches(prompts, batch, pad):
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            steps = [logits.float().log_softmax(-1)[:, list(watched)].tolist() for logits in output.logits or ()]
            sequences = output.sequences[:, ids.shape[1] :].tolist()
            for row, (number, sequence) in enumerate(zip(numbers, sequences, strict=True)):
                rows[number] = cut_at_stop(sequence, ends, [step[row] for step in steps])
            advance(len(numbers))
    return [rows[number] for number in range(len(prompts))]
