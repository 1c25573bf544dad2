"""Judges that think before they answer: skip what they thought, and leave room for it.

A reasoning model writes its thoughts between marks such as `<think>` and `</think>`, and then its answer. Only the
answer is read. Servers that return the thoughts in a field of their own (`reasoning_content`) send the answer alone.
"""

from __future__ import annotations

import re
from typing import Any

THINKING_TOKENS = 4096
"""Tokens that a judge may generate in addition to those of its answer, if it thinks first."""

_NAMES = r"think|thinking|thoughts?|reasoning"
_BEGIN = rf"(?:<(?:{_NAMES})>|\[think\]|◁think▷)"
_END = rf"(?:</(?:{_NAMES})>|\[/think\]|◁/think▷)"


def after_thinking(text: str) -> str:
    """Return the answer after the thoughts; empty if the thoughts do not end, because no answer was reached.

    The beginning mark may be absent: some chat templates write it into the prompt.
    """
    answer = re.split(_END, text, flags=re.IGNORECASE)[-1]
    return "" if re.search(_BEGIN, answer, re.IGNORECASE) else answer


def count_thoughts(text: str) -> int:
    """Return the number of marks that end a block of thoughts."""
    return len(re.findall(_END, text, re.IGNORECASE))


def can_think(tokenizer: Any) -> bool:
    """Return whether the chat template or the vocabulary of a tokenizer of transformers has a mark of thoughts."""
    texts = [str(tokenizer.chat_template), *tokenizer.get_added_vocab()]
    return re.search(_BEGIN, "\n".join(texts), re.IGNORECASE) is not None


def opens_thinking(prompt: str) -> bool:
    """Return whether a prompt ends with a beginning mark, so that the judge's text begins with thoughts."""
    return re.search(rf"{_BEGIN}\s*$", prompt, re.IGNORECASE) is not None
