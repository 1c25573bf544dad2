"""A conversation as tokens: by the chat template that a model's tokenizer ships.

The template's control tokens become tokens; what a row says stays text, even where it spells such a token, so that no
row can end its turn or fake another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from harmbench_vaccine.core.errors import BadInput

from .prompts import Conversation

_SLOT = "\ue000{}\ue001"
"""Stands for a message while the template is looked at; private-use characters occur in no template."""


def chat_prompt_ids(tokenizer: PreTrainedTokenizerBase, said: Conversation) -> list[int]:
    """The tokens up to where the model's answer begins: opening tokens are those that the template writes, once.

    Raises:
        BadInput: the tokenizer has no chat template, or it does not show these messages.
    """
    messages = _accepted(tokenizer, said.messages)
    if not any(token in message["content"] for token in _controls(tokenizer) for message in messages):
        return _ids(tokenizer, _shown(tokenizer, messages), controls=True)
    slots = [{**message, "content": _SLOT.format(place)} for place, message in enumerate(messages)]
    frames = re.split(f"({'|'.join(slot['content'] for slot in slots)})", _shown(tokenizer, slots))
    contents = {slot["content"]: message["content"] for slot, message in zip(slots, messages, strict=True)}
    control = _control(tokenizer)
    ids: list[int] = []
    text = ""
    for frame in frames:
        for piece in [frame] if frame in contents else control.split(frame):
            if frame in contents or not control.fullmatch(piece):
                text += contents.get(piece, piece)
            else:
                ids += [*_ids(tokenizer, text), _id(tokenizer, piece)]
                text = ""
    return ids + _ids(tokenizer, text)


def chat_response_ids(tokenizer: PreTrainedTokenizerBase, said: Conversation, response: str) -> list[int]:
    """The tokens of an answer to these messages, with the one that ends the model's turn."""
    lead, end = _turn(tokenizer, str(tokenizer.chat_template))
    body = _ids(tokenizer, lead + response)
    if lead:  # a tokenizer that marks the beginning of a text must not see one behind the lead
        prompt = _shown(tokenizer, _accepted(tokenizer, said.messages))
        before, whole = (_ids(tokenizer, text, controls=True) for text in (prompt, prompt + lead + response))
        if whole[: len(before)] == before and not any(token in response for token in _controls(tokenizer)):
            body = whole[len(before) :]
    return [*body, end]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """The tokens that end an answer to these prompts: the end of text, and the end of the model's turn in a chat."""
    ends = [eos_token_id(tokenizer)]
    if any(isinstance(prompt, Conversation) for prompt in prompts):
        ends.insert(0, _turn(tokenizer, str(tokenizer.chat_template))[1])
    return list(dict.fromkeys(ends))


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.

    Raises:
        BadInput: the tokenizer has none, so that no answer could end.
    """
    found = tokenizer.eos_token_id
    if not isinstance(found, int):
        raise BadInput(f"{tokenizer.name_or_path}: its tokenizer has no end-of-text token, so no answer could end.")
    return found


# ---------------------------------------------------------------------------------------------------------------------


def _accepted(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages as the template takes them: a system message goes before the user's where it takes none."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise BadInput(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, which prompt 'chat' needs; "
            "a base model takes prompt alpaca, brief or none."
        )
    told = ""
    joined = [{**messages[-1], "content": "\n\n".join(message["content"] for message in messages)}]
    for version in (messages, joined):
        try:
            shown = _shown(tokenizer, version)
        except TemplateError as error:
            told = f": {error}"
            continue
        if all(message["content"] in shown for message in version):
            return version
    raise BadInput(f"{tokenizer.name_or_path}: its chat template does not show what is asked{told}.")


def _shown(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opened: bool = True) -> str:
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    assert isinstance(shown, str)
    return shown


@lru_cache(maxsize=8)
def _turn(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, int]:
    """What the template writes around the model's turn: the white space before it, and the token that ends it."""
    asked = _accepted(tokenizer, [{"role": "user", "content": "?"}])
    prompt, slot = _shown(tokenizer, asked), _SLOT.format("")
    before, _, after = _shown(tokenizer, [*asked, {"role": "assistant", "content": slot}], False).partition(slot)
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    end = _control(tokenizer).search(after)
    return "" if lead.strip() else lead, _id(tokenizer, end[0]) if end else eos_token_id(tokenizer)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, controls: bool = False) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=not controls)["input_ids"])


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _controls(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The control tokens as they are spelled."""
    named = {str(token) for token in tokenizer.all_special_tokens}
    return sorted(named | {token.content for token in tokenizer.added_tokens_decoder.values() if token.special})


def _control(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    longest_first = sorted(_controls(tokenizer), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")
