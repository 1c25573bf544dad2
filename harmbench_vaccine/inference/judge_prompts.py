"""Prompts of judges whose model ships no chat template: files with a place for the question and one for the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput

from .generators import break_control_tokens, full_prompt_ids


def load_template(scorer: str, file: str, places: tuple[str, ...], wanted: str) -> str:
    """The text of a template, every character of it.

    Raises:
        BadInput: no file is named (`wanted` says what it would hold), it cannot be read, or it lacks one of `places`.
    """
    named = ", ".join(f"{{{place}}}" for place in places)
    if not file:
        raise BadInput(
            f"Scorer {scorer!r} needs its prompt: --scorer {scorer}:template=FILE, with {wanted} and {named} in it."
        )
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadInput(f"Template {file!r} of scorer {scorer!r} cannot be read: {reason}.") from error
    if missing := [place for place in places if f"{{{place}}}" not in text]:
        raise BadInput(f"Template {file!r} of scorer {scorer!r} has no {{{missing[0]}}}; it needs {named}.")
    return text


def filled_prompt_ids(
    tokenizer: Any, template: str, places: tuple[str, str], pairs: Sequence[tuple[str, str]]
) -> list[list[int]]:
    """The token ids of the template with each (question, answer) in its two places."""
    shown = [
        {place: break_control_tokens(text, tokenizer) for place, text in zip(places, pair, strict=True)}
        for pair in pairs
    ]
    return [full_prompt_ids(tokenizer, fill_template(template, values)) for values in shown]


def fill_template(template: str, values: dict[str, str]) -> str:
    """The template with each `{place}` replaced once: a value that spells a place stays as it is."""
    marks = re.compile("|".join(re.escape(f"{{{place}}}") for place in values))
    return marks.sub(lambda mark: values[mark[0][1:-1]], template)
