"""Prompts of judges whose model ships no chat template: a file with a slot for the question and one for the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.chat import break_control_tokens, full_prompt_ids


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
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadInput(f"Template {file!r} of scorer {scorer!r} cannot be read: {reason}.") from error
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


def fill_template(template: str, values: dict[str, str]) -> str:
    """Replace each `{slot}` of a template once; a value that spells a slot stays as it is."""
    pattern = re.compile("|".join(re.escape(f"{{{slot}}}") for slot in values))
    return pattern.sub(lambda match: values[match[0][1:-1]], template)
