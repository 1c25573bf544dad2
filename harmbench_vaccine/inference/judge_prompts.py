"""Prompts of judges: what a judge reads, as token ids.

A judge has a chat template (`judge_prompt_ids`), or its prompt is a text with a slot for the question and one for the
answer (`filled_prompt_ids`). A question or an answer may spell control tokens, such as `</s>` or `[/INST]`. One rule
holds for every judge with a model: a space is put inside each of them (`break_control_tokens`), so that what is judged
can neither end its turn nor open another. All other text is shown as it is, also an empty answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.data.chat import Messages, render_chat
from harmbench_vaccine.data.text_files import read_text

_CONTROL_FORMATS = (
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|</?think>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>"
)
"""Control tokens of the common chat formats. Some of Llama 2's are not tokens, and a server's are not known."""

# ---------------------------------------------------------------------------------------------------------------------
# Control tokens


def break_control_tokens(text: str, tokenizer: Any = None) -> str:
    """Put a space inside every control token that a text spells.

    Args:
        text: A question or an answer.
        tokenizer: Tokenizer of the judge; None: only the tokens of the common chat formats are known.
    """
    longest_first = sorted(_control_tokens(tokenizer), key=len, reverse=True) if tokenizer is not None else []
    pattern = re.compile("|".join([*map(re.escape, longest_first), _CONTROL_FORMATS]))
    while pattern.search(text):  # what is left of a token may spell a shorter one
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def _control_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens, and the tokens in brackets that the chat template writes, as text."""
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {token.content for token in added if token.special}
    tokens |= {token.content for token in added if token.content[0] in "<[" and token.content in template}
    return {token for token in tokens if len(token) > 1 and not token[0].isspace()}


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates


def judge_prompt_ids(tokenizer: Any, messages: Messages, **options: Any) -> list[int]:
    """Encode a conversation by the chat template of a judge, up to the position where the judge's text begins.

    The ids are those of `tokenizer.apply_chat_template`. Multimodal templates (Llama Guard 4, Llama Guard 3 1B) take a
    list of parts instead of a text; a probe finds out which form shows the messages.

    Args:
        tokenizer: Tokenizer of the judge.
        messages: Role and content of each message.
        options: Further variables of the template.

    Raises:
        HbvError: The tokenizer has no chat template, or the template does not show the messages.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise HbvError(f"{name}: its tokenizer has no chat template, which this judge needs. Choose a chat model.")
    probes = [{**message, "content": f"\ue000probe {number}\ue001"} for number, message in enumerate(messages)]
    texts = [*(probe["content"] for probe in probes), *(value for value in options.values() if isinstance(value, str))]
    shown = [{**message, "content": break_control_tokens(message["content"], tokenizer)} for message in messages]
    reason = ""
    for parts in (False, True):
        try:
            rendered = render_chat(tokenizer, probes, parts=parts, **options)
            if all(text in rendered for text in texts) and "{'type'" not in rendered:  # no printed list of parts
                prompt = render_chat(tokenizer, shown, parts=parts, **options)
                return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        except Exception as error:  # jinja's own kinds, and any that a template raises
            reason = f": {error}"
    raise HbvError(f"{name}: its chat template does not show the text to judge{reason}. Choose another model.")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts with slots


def load_template(scorer: str, file: str, slots: tuple[str, ...], content: str) -> str:
    """Load the text of a template, with every character of it.

    Args:
        scorer: Name of the scorer in messages.
        file: Path of the template.
        slots: Names that the template must contain in braces.
        content: What the file has to contain, for the message where no file is named.

    Raises:
        BadInput: No file is named, it cannot be read, or it lacks one of the slots.
    """
    names = ", ".join(f"{{{slot}}}" for slot in slots)
    if not file:
        raise BadInput(
            f"Scorer {scorer!r} needs its prompt: --scorer {scorer}:template=FILE, with {content} and {names} in it."
        )
    text = read_text(user_path(file))
    if missing := [slot for slot in slots if f"{{{slot}}}" not in text]:
        raise BadInput(f"Template {file!r} of scorer {scorer!r} has no {{{missing[0]}}}; it needs {names}.")
    return text


def filled_prompt_ids(
    tokenizer: Any, template: str, slots: tuple[str, str], pairs: Sequence[tuple[str, str]]
) -> list[list[int]]:
    """Encode the template with each (question, answer) in its two slots."""
    values = [
        {slot: break_control_tokens(text, tokenizer) for slot, text in zip(slots, pair, strict=True)} for pair in pairs
    ]
    return [full_prompt_ids(tokenizer, fill_template(template, value)) for value in values]


def full_prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode a complete prompt: its control tokens become tokens, with one opening token and no closing one."""
    opened = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    ids: list[int] = list(tokenizer(text, add_special_tokens=not opened)["input_ids"])
    if not opened and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def fill_template(template: str, values: dict[str, str]) -> str:
    """Replace each `{slot}` of a template once; a value that spells a slot stays as it is."""
    pattern = re.compile("|".join(re.escape(f"{{{slot}}}") for slot in values))
    return pattern.sub(lambda match: values[match[0][1:-1]], template)
