"""Batched greedy generation, shared by the engines that answer prompts and by the judges that write text.

`model.generate` of transformers computes every row of a batch until the longest answer ends. Here, a row that ended
leaves the batch, and its keys and values leave the cache. The inputs of each step are those of
`model.prepare_inputs_for_generation`, so that a model of any architecture gets what `model.generate` gives it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from harmbench_vaccine.core.progress import Advance
from harmbench_vaccine.data.collate import left_padded_batches
from harmbench_vaccine.data.model_limits import check_readable

from .batch_size import rows_that_fit

_CACHES = ("past_key_values", "cache_params")
"""Names of a model's cache in its inputs and outputs: keys and values, or states of linear attention."""
_SHORTEST_PREFIX = 8
"""Tokens of a common prefix from which it is read once: a separate pass takes as long as a step."""


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
    batch: int | None = None,
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
        batch: Largest number of prompts in a batch; by default, as many as `rows_that_fit` returns.
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
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft changes its layers in place
    size = batch or rows_that_fit(decoder, max(map(len, prompts), default=0) + max_new_tokens)
    rows: dict[int, GeneratedTokens] = {}
    with torch.inference_mode():
        for numbers, ids, mask in left_padded_batches(prompts, size, pad):
            generated = _Generation(decoder, ids.to(decoder.device), mask.to(decoder.device), ends, watched)
            generated.read_prefix(_common_prefix([prompts[number] for number in numbers]))
            for _ in range(max_new_tokens):
                if not generated.step():
                    break
            for number, tokens, log_probs in zip(numbers, generated.tokens, generated.log_probs, strict=True):
                rows[number] = cut_at_stop(tokens, ends, log_probs)
            advance(len(numbers))
    return [rows[number] for number in range(len(prompts))]


def next_probabilities(model: Any, texts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Compute the probabilities of the token after each text.

    Args:
        model: A causal language model of transformers, or a peft model around one.
        texts: Token ids of each text.
        pad: Id of the padding token.

    Returns:
        (texts x vocabulary), float32, on the CPU.
    """
    check_readable(model.name_or_path, model.config, texts, 1)
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    size = rows_that_fit(decoder, max(map(len, texts), default=0) + 1)
    rows: dict[int, Tensor] = {}
    with torch.inference_mode():
        for numbers, ids, mask in left_padded_batches(texts, size, pad):
            generated = _Generation(decoder, ids.to(decoder.device), mask.to(decoder.device), [], [])
            rows |= zip(numbers, generated.next_logits().float().softmax(-1).cpu(), strict=True)
    return torch.stack([rows[number] for number in range(len(texts))])


def _common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))]


class _Generation:
    """The state of one batch: its unfinished rows with their cache, and the tokens of all rows."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, ends: Sequence[int], watched: Sequence[int]) -> None:
        self.tokens: list[list[int]] = [[] for _ in ids]
        self.log_probs: list[list[list[float]]] = [[] for _ in ids]
        self._model, self._ids, self._mask = model, ids, mask
        self._padded = not bool(mask.all())
        self._ends, self._watched = torch.tensor(ends, device=ids.device), list(watched)
        self._unfinished = list(range(len(ids)))
        self._caches: dict[str, Any] = {}
        self._cached = 0  # positions
        accepted = inspect.signature(model.forward).parameters
        self._has_positions, self._has_cache = "position_ids" in accepted, "past_key_values" in accepted
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def read_prefix(self, prefix: Sequence[int]) -> None:
        """Read the first tokens of all rows once, where they are the same and every layer attends to all positions.

        The padding of a row is then between the prefix and the rest of the row. A window of attention would count it.

        Args:
            prefix: The longest common prefix of the rows.
        """
        count = min(len(prefix), int(self._mask.sum(1).min()) - 1)  # a row keeps a token, which gives the next one
        cache = DynamicCache(config=self._model.config)
        attends_to_all = self._has_cache and all(type(layer) is DynamicLayer for layer in cache.layers)
        if len(self._ids) == 1 or count < _SHORTEST_PREFIX or not attends_to_all:
            return
        first = torch.tensor([prefix[:count]], device=self._ids.device)
        self._model(input_ids=first, past_key_values=cache, use_cache=True, **self._options)
        cache.batch_repeat_interleave(len(self._ids))
        rest = self._mask * (self._mask.cumsum(-1) > count)  # 1 for the tokens after the prefix
        self._ids = torch.cat([first.expand(len(rest), -1), self._ids[:, count:]], 1)
        self._mask = torch.cat([torch.ones_like(rest[:, :count]), rest[:, count:]], 1)
        self._caches, self._cached = {"past_key_values": cache}, count

    def step(self) -> bool:
        """Append the most likely token to every unfinished row; return whether a row is unfinished afterwards."""
        logits = self.next_logits()
        best = logits.argmax(-1)
        for row, token in zip(self._unfinished, best.tolist(), strict=True):
            self.tokens[row].append(token)
        if self._watched:
            watched = logits.float().log_softmax(-1)[:, self._watched].tolist()
            for row, log_probs in zip(self._unfinished, watched, strict=True):
                self.log_probs[row].append(log_probs)
        self._cached = self._ids.shape[1]
        self._ids = torch.cat([self._ids, best[:, None]], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(best)[:, None]], 1)
        self._keep(torch.isin(best, self._ends, invert=True).nonzero()[:, 0])
        return bool(self._unfinished)

    def next_logits(self) -> Tensor:
        """Run the model on the tokens that are not in the cache; return the logits after them (rows x vocabulary)."""
        output = self._model(**self._inputs(), return_dict=True)
        self._caches = {name: output[name] for name in _CACHES if output.get(name) is not None}
        logits: Tensor = output.logits[:, -1]
        return logits

    def _inputs(self) -> dict[str, Any]:
        options = dict(self._options)
        if self._padded:  # without a mask, attention takes faster kernels
            options["attention_mask"] = self._mask
        if self._has_positions:
            options["position_ids"] = (self._mask.cumsum(-1) - 1).clamp(min=0)
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            self._ids,
            next_sequence_length=self._ids.shape[1] - self._cached if self._caches else None,
            is_first_iteration=not self._caches,
            use_cache=True,
            **self._caches,
            **options,
        )
        return inputs

    def _keep(self, places: Tensor) -> None:
        """Remove all rows but those at these places of the batch."""
        if len(places) == len(self._unfinished):
            return
        self._unfinished = [self._unfinished[place] for place in places.tolist()]
        self._ids, self._mask = self._ids[places], self._mask[places]
        if self._unfinished:
            for cache in self._caches.values():
                cache.reorder_cache(places)
