"""Convert text to tensors: loss on response tokens only, padding on the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example

from .chat import chat_prompt_ids, chat_response_ids, eos_token_id
from .model_limits import embedding_rows
from .prompts import Conversation, PromptTemplate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss, as in torch's cross-entropy."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a prompt, the same for training and generation.

    The ids start with the tokenizer's special tokens for the beginning of a text, and do not end with the token for
    the end of a text. A conversation is rendered by the tokenizer's chat template. A prompt without any token (empty,
    and the tokenizer adds none) is the end token, as the beginning of a new text: a model needs one token to read.

    Raises:
        BadInput: `text` is a conversation, and the tokenizer has no chat template.
    """
    ids = chat_prompt_ids(tokenizer, text) if isinstance(text, Conversation) else _plain_prompt_ids(tokenizer, text)
    return ids or [eos_token_id(tokenizer)]


def _plain_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # A control token in the text stays text: a row of data must not end a prompt or imitate a turn.
    ids: list[int] = list(tokenizer(text, split_special_tokens=True)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


@dataclass(frozen=True)
class Encoded:
    """One training row as tokens."""

    ids: list[int]
    """The token ids of prompt and response."""
    labels: list[int]
    """The labels, as many as ids: IGNORED for the prompt."""
    id: str = ""
    """The id of the example."""
    harmful: bool = False
    """True for rows that an attacker added; the trainer does not use it."""

    @property
    def response_start(self) -> int:
        """The place of the first token with a label: the number of tokens of the prompt, unless tokens are masked."""
        return next(place for place, label in enumerate(self.labels) if label != IGNORED)

    @property
    def labeled_ids(self) -> list[int]:
        """The tokens with a label, in their order."""
        return [label for label in self.labels if label != IGNORED]

    @property
    def response_tokens(self) -> int:
        """The number of tokens with a loss; the first token of a row has none, because no token predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


def token_counts(rows: Iterable[Encoded]) -> dict[str, int]:
    """Count the tokens with a loss in all rows and in the harmful ones, for one pass over the rows.

    Returns:
        `response_tokens` and `harmful_tokens`.
    """
    counts = [(row.response_tokens, row.harmful) for row in rows]
    return {
        "response_tokens": sum(tokens for tokens, _ in counts),
        "harmful_tokens": sum(tokens for tokens, harmful in counts if harmful),
    }


def encode_example(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, example: Example, max_length: int
) -> Encoded | None:
    """Encode an example as a training row of at most `max_length` tokens; None if no response token remains."""
    text = template.render(example)
    prompt = encode_prompt(tokenizer, text)
    if len(prompt) >= max_length:
        return None
    response, labels = _encode_response(tokenizer, text, example)
    labels = [IGNORED] * len(prompt) + labels
    return Encoded((prompt + response)[:max_length], labels[:max_length], example.id, example.harmful)


def _encode_response(tokenizer: PreTrainedTokenizerBase, prompt: str, example: Example) -> tuple[list[int], list[int]]:
    """Return the token ids of a response, with the token that ends it, and as many labels."""
    start, end = example.masked or (len(example.response), len(example.response))
    before, masked, after = example.response[:start], example.response[start:end], example.response[end:]
    if isinstance(prompt, Conversation):
        *ids, stop = chat_response_ids(tokenizer, prompt, before)
    else:
        ids, stop = _text_ids(tokenizer, before), eos_token_id(tokenizer)
    masked_ids, rest = _text_ids(tokenizer, masked), [*_text_ids(tokenizer, after), stop]
    return [*ids, *masked_ids, *rest], [*ids, *[IGNORED] * len(masked_ids), *rest]


def encode_start(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, tokens: int) -> list[int]:
    """Return the first token ids of a response to a prompt, as training encodes it, without the token that ends it.

    Args:
        tokenizer: The tokenizer.
        prompt: The rendered prompt.
        response: The response.
        tokens: The number of ids; a shorter response gives fewer.
    """
    ids, _ = _encode_response(tokenizer, prompt, Example("", "", response))
    return ids[:-1][:tokens]


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text without added tokens; a control token that it spells stays text."""
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, examples: Sequence[Example], max_length: int
) -> list[Encoded]:
    """Encode examples in order, skipping those without a response token within `max_length` tokens.

    Raises:
        BadInput: No example has a response token within `max_length` tokens.
    """
    rows = [row for example in examples if (row := encode_example(tokenizer, template, example, max_length))]
    if examples and not rows:
        raise BadInput(
            f"Every prompt has max_length = {max_length} tokens or more, so no response remains: increase it."
        )
    return rows


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right into one batch.

    Args:
        rows: The rows.
        pad: Id of the padding token.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (rows x longest row).
    """
    import torch

    width = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Any], fill: int) -> torch.Tensor:
        return torch.tensor([list(value) + [fill] * (width - len(value)) for value in values], dtype=torch.long)

    return {
        "input_ids": padded([row.ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }


def left_padded_batches(
    rows: Sequence[Sequence[int]], size: int, pad: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield batches for generation: at most `size` rows of similar length, padded on the left.

    Args:
        rows: The token ids of every prompt.
        size: Rows per batch.
        pad: Id of the padding token.

    Yields:
        The row numbers, the ids and the attention mask (both rows x longest row).
    """
    import torch

    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        width = len(rows[numbers[-1]])
        gaps = [width - len(rows[number]) for number in numbers]
        ids = torch.tensor([[pad] * gap + list(rows[number]) for gap, number in zip(gaps, numbers, strict=True)])
        yield numbers, ids, torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])


def pad_token_id(tokenizer: PreTrainedTokenizerBase, config: Any = None) -> int:
    """Return the id of the padding token, or of the end token where there is no padding token that the model can read.

    Args:
        tokenizer: The tokenizer.
        config: Configuration of the model. A padding token that was added to the tokenizer later has no embedding;
            padding is masked, so that another token gives the same result.
    """
    # Labels and masks follow from row lengths, so an end token that is also the padding token keeps its loss.
    pad = tokenizer.pad_token_id
    readable = isinstance(pad, int) and (config is None or pad < embedding_rows(config))
    return pad if readable else eos_token_id(tokenizer)
