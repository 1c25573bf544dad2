"""Requests to an engine: prompts with the tokens with which their answers start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_prompt

from .engine import Answer, Starts
from .generation import GeneratedTokens, cut_at_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Requests:
    """Prompts with the tokens with which their answers start, as token ids; equal requests are answered once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], starts: Starts = ()) -> None:
        """Encode prompts.

        Args:
            tokenizer: The tokenizer of the model.
            prompts: Prompts as text or as conversations.
            starts: The token ids with which each answer starts; empty: none has any.
        """
        self._tokenizer = tokenizer
        self.ends = stop_token_ids(tokenizer, prompts)
        """Ids of the stop tokens."""
        self._requests = list(zip(prompts, map(tuple, starts or [()] * len(prompts)), strict=True))
        different = dict.fromkeys(self._requests)
        self._open = [request for request in different if not set(request[1]) & set(self.ends)]
        self._ended = {
            request: Answer(_decode(tokenizer, cut_at_stop(request[1], self.ends).tokens), 0, True)
            for request in {*different} - {*self._open}
        }
        encoded = {prompt: encode_prompt(tokenizer, prompt) for prompt, _ in self._open}
        self.ids = [[*encoded[prompt], *start] for prompt, start in self._open]
        """Token ids to continue: those of each different request whose start has no stop token."""

    def answers(self, rows: Sequence[GeneratedTokens]) -> list[Answer]:
        """Return the answer to each prompt, with the text of its start; the start is not counted in its tokens.

        Args:
            rows: The tokens that the model generated after each of `ids`.
        """
        answers = dict(self._ended)
        for request, row in zip(self._open, rows, strict=True):
            text = _decode(self._tokenizer, [*request[1], *row.tokens])
            answers[request] = Answer(text, len(row.tokens) + row.finished, row.finished)
        return [answers[request] for request in self._requests]


def decoded_starts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], starts: Starts) -> list[Answer]:
    """Return the answers that consist of their starts: the model generates no token.

    Args:
        tokenizer: The tokenizer of the model.
        prompts: Prompts as text or as conversations.
        starts: The token ids of each answer.
    """
    requests = Requests(tokenizer, prompts, starts)
    return requests.answers([GeneratedTokens([], finished=False) for _ in requests.ids])


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
