"""Limits of a model that its configuration states: the rows of its embedding, and the tokens that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from harmbench_vaccine.core.errors import HbvError

_POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names of the largest number of positions; transformers maps older names (`n_positions`) to the first."""

_COUNTED_FROM_PADDING = frozenset(
    {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}
)
"""Model types whose first position is the one after the id of the padding token, so that they read fewer tokens."""


def embedding_rows(config: Any) -> int:
    """Return the number of token ids that a model has an embedding for."""
    return int(config.get_text_config(decoder=True).vocab_size)


def position_limit(config: Any) -> int | None:
    """Return the largest number of tokens that a model reads, or None if its configuration states no limit.

    Learned positions (OPT, GPT-2) end there. Rotary positions go on, but the model was not trained on them, and vLLM
    refuses them. So the limit holds for both.
    """
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in _POSITIONS)
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    return limit - text.pad_token_id - 1 if limit and text.model_type in _COUNTED_FROM_PADDING else limit


def check_readable(model: str, config: Any, rows: Sequence[Sequence[int]], new_tokens: int = 0) -> None:
    """Check that a model reads the longest row with the tokens to generate, and has an embedding for every token.

    Raises:
        HbvError: The model cannot read a row.
    """
    limit, tokens = position_limit(config), max(map(len, rows), default=0) + new_tokens
    if limit and tokens > limit:
        raise HbvError(
            f"{model}: a text has {tokens} tokens, but the model reads at most {limit}. Choose a model that reads "
            "more, or allow shorter answers."
        )
    largest, count = max((max(row, default=0) for row in rows), default=0), embedding_rows(config)
    if largest >= count:
        raise HbvError(
            f"{model}: a text has token id {largest}, but the model has embeddings only of the ids below {count}. Use "
            "the tokenizer that the model was trained with."
        )


def tokens_outside(tokenizer: Any, config: Any) -> dict[int, str]:
    """Return the tokens of a tokenizer that a model has no embedding for: id -> token."""
    rows = embedding_rows(config)
    return {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}


def first_outside(ids: Iterable[int], outside: dict[int, str]) -> str | None:
    """Return the first token without an embedding among token ids, or None."""
    return next((outside[number] for number in ids if number in outside), None)
