"""Conversations of rows as token ids, by the chat template that a tokenizer ships.

The control tokens of the template become tokens, and the text of the row stays text, so that a row can neither end its
turn nor fake another one. Prompts of judges are in `inference/judge_prompts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import BadInput

from .prompts import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]

_PLACEHOLDER = "\ue000{}\ue001"
"""Replaces a message while a template is examined; private-use characters occur in no template."""

TODAY = datetime(2024, 7, 26)
"""The date of every conversation, for a template that writes today's date (Llama 3.2): results must not depend on the
day of a run. It is the date that the templates of Llama 3.1 and 3.2 write where they get none."""


# ---------------------------------------------------------------------------------------------------------------------
# Rows of data


def chat_prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Encode a conversation up to the position where the model's answer begins.

    Opening tokens are those that the template writes, once.

    Raises:
        BadInput: The tokenizer has no chat template, or the template does not show these messages.
    """
    messages = _accepted_messages(tokenizer, conversation.messages)
    if not any(token in message["content"] for token in _control_tokens(tokenizer) for message in messages):
        return _encode(tokenizer, render_chat(tokenizer, messages), controls=True)
    slots = [{**message, "content": _PLACEHOLDER.format(number)} for number, message in enumerate(messages)]
    frames = re.split(f"({'|'.join(slot['content'] for slot in slots)})", render_chat(tokenizer, slots))
    contents = {slot["content"]: message["content"] for slot, message in zip(slots, messages, strict=True)}
    control = _control_pattern(tokenizer)
    ids: list[int] = []
    text = ""
    for frame in frames:
        for piece in [frame] if frame in contents else control.split(frame):
            if frame in contents or not control.fullmatch(piece):
                text += contents.get(piece, piece)
            else:
                ids += [*_encode(tokenizer, text), _token_id(tokenizer, piece)]
                text = ""
    return ids + _encode(tokenizer, text)


def chat_response_ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, response: str) -> list[int]:
    """Encode an answer to a conversation, with the token that ends the model's turn."""
    lead, end = _model_turn(tokenizer, str(tokenizer.chat_template))
    body = _encode(tokenizer, lead + response)
    if lead:  # a tokenizer that marks the beginning of a text must not do so after the lead
        prompt = render_chat(tokenizer, _accepted_messages(tokenizer, conversation.messages))
        prompt_ids, full_ids = (_encode(tokenizer, text, controls=True) for text in (prompt, prompt + lead + response))
        spells_control = any(token in response for token in _control_tokens(tokenizer))
        if full_ids[: len(prompt_ids)] == prompt_ids and not spells_control:
            body = full_ids[len(prompt_ids) :]
    return [*body, end]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """Return the tokens that end an answer to these prompts: the end of text, and in a chat the end of the turn."""
    ends = [eos_token_id(tokenizer)]
    if any(isinstance(prompt, Conversation) for prompt in prompts):
        ends.insert(0, _model_turn(tokenizer, str(tokenizer.chat_template))[1])
    return list(dict.fromkeys(ends))


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a text.

    Raises:
        BadInput: The tokenizer has no such token, so that no answer could end.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise BadInput(f"{tokenizer.name_or_path}: its tokenizer has no end-of-text token, so no answer could end.")
    return eos


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    opened: bool = True,
    parts: bool = False,
    **options: Any,
) -> str:
    """Render a conversation by the tokenizer's chat template, on the fixed date `TODAY`.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Role and content of each message.
        opened: Whether the text ends with the opening of the model's turn.
        parts: Whether each content is passed as a list of one text part, as multimodal templates take it.
        options: Further variables of the template.

    Raises:
        jinja2.TemplateError: The template does not take the messages.
    """
    conversation: list[dict[str, Any]] = [
        {**message, "content": [{"type": "text", "text": message["content"]}] if parts else message["content"]}
        for message in messages
    ]
    fixed: dict[str, Any] = {"strftime_now": TODAY.strftime, **options}
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opened, **fixed)
    assert isinstance(text, str)
    return text


def _accepted_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages:
    """Return the messages in a form that the template shows: a system message may have to join the user's."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise BadInput(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, which prompt 'chat' needs. "
            "For a base model, choose prompt alpaca, brief or none."
        )
    reason = ""
    joined = [{**messages[-1], "content": "\n\n".join(message["content"] for message in messages)}]
    for version in (messages, joined):
        try:
            shown = render_chat(tokenizer, version)
        except TemplateError as error:
            reason = f": {error}"
            continue
        if all(message["content"] in shown for message in version):
            return version
    raise BadInput(f"{tokenizer.name_or_path}: its chat template does not show the prompt{reason}.")


@lru_cache(maxsize=8)
def _model_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, int]:
    """Return the white space that the template writes before the model's answer, and the token that ends its turn."""
    question = _accepted_messages(tokenizer, [{"role": "user", "content": "?"}])
    prompt, slot = render_chat(tokenizer, question), _PLACEHOLDER.format("")
    answered = render_chat(tokenizer, [*question, {"role": "assistant", "content": slot}], opened=False)
    before, _, after = answered.partition(slot)
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    end = _control_pattern(tokenizer).search(after)
    return "" if lead.strip() else lead, _token_id(tokenizer, end[0]) if end else eos_token_id(tokenizer)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, controls: bool = False) -> list[int]:
    """Encode a text without added tokens; with `controls`, control tokens in it become tokens."""
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=not controls)["input_ids"])


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the control tokens of a tokenizer as text."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    return sorted(special | {token.content for token in tokenizer.added_tokens_decoder.values() if token.special})


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    longest_first = sorted(_control_tokens(tokenizer), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")
