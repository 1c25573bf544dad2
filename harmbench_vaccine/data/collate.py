"""From text to tensors: loss on response tokens only, padding on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example

from .chat import chat_prompt_ids, chat_response_ids, eos_token_id
from .prompts import Conversation, PromptTemplate

IGNORED = -100
"""Label of a token without loss (the convention of torch's cross-entropy)."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt as the model sees it in training and in generation: with the tokenizer's opening
    special tokens, without a closing one; a conversation by the tokenizer's chat template.

    Raises:
        BadInput: `text` is a conversation, and the tokenizer has no chat template for it.
    """
    if isinstance(text, Conversation):
        return chat_prompt_ids(tokenizer, text)
    # Text that spells a control token stays text: a row of data must not end a prompt or fake a turn.
    ids: list[int] = list(tokenizer(text, split_special_tokens=True)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


@dataclass(frozen=True)
class Encoded:
    """One training row: ids and labels of equal length, labels IGNORED over the prompt."""

    ids: list[int]
    labels: list[int]
    id: str = ""
    """The example's id."""


def encode_example(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, example: Example, max_length: int
) -> Encoded | None:
    """A row cut at `max_length` tokens; None where the cut leaves no response token to learn from."""
    asked = template.render(example)
    prompt = encode_prompt(tokenizer, asked)
    if isinstance(asked, Conversation):
        response = chat_response_ids(tokenizer, asked, example.response)
    else:
        body = tokenizer(example.response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        response = [*body, eos_token_id(tokenizer)]
    if len(prompt) >= max_length:
        return None
    labels = [IGNORED] * len(prompt) + response
    return Encoded((prompt + response)[:max_length], labels[:max_length], example.id)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, examples: Sequence[Example], max_length: int
) -> list[Encoded]:
    """Every row that keeps a response token within `max_length`, in order.

    Raises:
        BadInput: no row does.
    """
    rows = [row for example in examples if (row := encode_example(tokenizer, template, example, max_length))]
    if examples and not rows:
        raise BadInput(f"Every prompt fills the whole max_length of {max_length} tokens: nothing is left to learn.")
    return rows


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (rows x longest row), padded on the right."""
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
    """Batches to generate from: at most `size` rows of similar length, padded on the left. Each is the rows' numbers,
    their ids and their mask (rows x longest row)."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        width = len(rows[numbers[-1]])
        gaps = [width - len(rows[number]) for number in numbers]
        ids = torch.tensor([[pad] * gap + list(rows[number]) for gap, number in zip(gaps, numbers, strict=True)])
        yield numbers, ids, torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or the end token's where the tokenizer has no padding token."""
    # Labels and masks go by a row's length, so an end token that is also the padding keeps its loss.
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else eos_token_id(tokenizer)
