"""The one record that every stage trains on or asks about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """An instruction with its response, as plain text: prompt formats are applied later.

    `id` names the source row (`harmful:17`), so that a result can say what was drawn; `target` is what a task
    compares an answer with; `harmful` marks rows that an attacker mixed in (never shown to the trainer); `preface`
    is text that stands before the whole prompt of this row, as a system message would.
    """

    id: str
    instruction: str
    response: str = ""
    input: str = ""
    target: str = ""
    harmful: bool = False
    preface: str = ""
