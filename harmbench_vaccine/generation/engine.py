"""What answers prompts: one interface, so that a cell does not know which engine it is answered by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..progress import SILENT, Progress


@dataclass(frozen=True)
class Answer:
    """A greedy answer."""

    text: str
    tokens: int
    """Tokens generated, the end token included."""
    finished: bool
    """It ended by itself, not at the limit."""


class Engine(Protocol):
    """Greedy generation by one base model with any stack of adapters on it."""

    def generate(
        self, adapters: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress = SILENT
    ) -> list[Answer]:
        """An answer to each prompt, in their order; the prompts of one call are batched as the engine sees fit."""
        ...
