"""Generation by vLLM with adapters on a base model, in a process of its own.

One engine serves every stack of adapters on a base model: the adapter is switched between calls, and a stack is served
as one adapter (factors concatenated along the rank). Where vLLM refuses an adapter, the engine serves weights with the
adapter merged in. Where vLLM refuses the model or all of its adapters, transformers answers. Both cases are reported.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.training.adapters import Adapter, concatenate

from .engine import Answer, Engine, Starts
from .generation import GeneratedTokens
from .requests import Requests
from .vllm_process import EngineRefused
from .vllm_runner import EngineShape, VllmRunner

MIN_RANK = 16
"""Rank that an engine has room for at least, so that the next adapter seldom needs another engine."""

AdapterPaths = tuple[Path, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class ServedAdapter:
    """A stack of adapters in the form that vLLM loads."""

    number: int
    """Number of the adapter in requests; 0 is the base model."""
    path: Path
    rank: int
    room: int
    """Rank to leave room for: a second adapter as large as the largest of the stack may follow."""


class VllmEngine:
    """A vLLM engine for one base model under any adapters.

    The process starts at the first call. It starts again, larger, for an adapter of higher rank or for a longer text
    than it has room for.
    """

    def __init__(
        self,
        runner: VllmRunner,
        tokenizer: PreTrainedTokenizerBase,
        merge: Callable[[Sequence[Path], Path], None],
        fallback: Callable[[], Engine],
    ) -> None:
        """Prepare an engine; nothing is started.

        Args:
            runner: Runs the process; its name is the folder or hub id of the base model.
            tokenizer: The tokenizer of the base model.
            merge: `merge(adapters, folder)` writes the model with the adapters merged into its weights.
            fallback: Returns the engine that answers where vLLM refuses the model.
        """
        self.answered_by = "vllm"
        self._model, self._tokenizer = runner.name, tokenizer
        self._merge, self._fallback = merge, fallback
        self._runner = runner
        self._served: dict[AdapterPaths, ServedAdapter] = {(): ServedAdapter(0, Path(), 0, MIN_RANK)}
        self._refused: set[AdapterPaths] = set()
        self._merged: AdapterPaths = ()

    def generate(
        self,
        adapters: Sequence[Path],
        prompts: Sequence[str],
        max_new_tokens: int,
        progress: Progress = SILENT,
        starts: Starts = (),
    ) -> list[Answer]:
        """Generate greedy answers, in the order of `prompts`; equal requests are answered once.

        Raises:
            HbvError: The process died, or the memory does not suffice.
        """
        requests = Requests(self._tokenizer, prompts, starts)
        ids = requests.ids
        if not ids:
            return requests.answers([])
        if self._runner.refusal:
            return self._use_fallback(adapters, prompts, max_new_tokens, progress, starts)

        def request() -> list[GeneratedTokens]:
            with progress.bar("answer", len(ids)) as advance:
                return self._runner.generate(ids, max_new_tokens, requests.ends, advance)

        try:
            rows = self._with_adapters(tuple(adapters), max(map(len, ids)) + max_new_tokens, progress, request)
        except EngineRefused as refusal:
            whole = f"the adapters of {self._model}" if refusal.what == "adapters" else self._model
            note = f"vLLM does not serve {whole}: {refusal.reason}. transformers answers instead."
            self._runner.note_once(note, progress)
            return self._use_fallback(adapters, prompts, max_new_tokens, progress, starts)
        return requests.answers(rows)

    def close(self) -> None:
        """End the process, which frees its memory; a later call of `generate` starts it again."""
        self._runner.close()

    def _with_adapters(self, adapters: AdapterPaths, length: int, progress: Progress, request: Callable[[], T]) -> T:
        """Send a request to an engine that serves the adapters, as one adapter or merged into the weights."""
        if adapters not in self._refused:
            try:
                served = self._served_adapter(adapters)
                shape = EngineShape(self._model, served.rank, length)
                answers = self._runner.run(
                    shape, served.room, progress, partial(self._select, served.number, served.path, request)
                )
                self.answered_by = "vllm"
                return answers
            except EngineRefused as refusal:
                if refusal.what != "adapter":
                    raise
                self._refused.add(adapters)
                if adapters:
                    progress.note(f"vLLM does not take the adapter: {refusal.reason}. It answers by merged weights.")
        shape = EngineShape(self._merged_model(adapters), 0, length)
        answers = self._runner.run(shape, 0, progress, partial(self._select, 0, Path(), request))
        self.answered_by = "vllm, merged weights" if adapters else "vllm"
        return answers

    def _select(self, number: int, path: Path, request: Callable[[], T]) -> T:
        self._runner.request("adapter", number=number, path=str(path))
        return request()

    def _served_adapter(self, adapters: AdapterPaths) -> ServedAdapter:
        if adapters not in self._served:
            stack, number = [Adapter.load(path) for path in adapters], len(self._served)
            joined, path = concatenate(stack), adapters[0]
            if len(stack) > 1:
                path = self._runner.folder / f"adapter{number}"
                joined.save(path)
            room = max(joined.rank, 2 * max(adapter.rank for adapter in stack))
            self._served[adapters] = ServedAdapter(number, path, joined.rank, room)
        return self._served[adapters]

    def _merged_model(self, adapters: AdapterPaths) -> str:
        """Return the folder of the model with the adapters merged into its weights; only the latest is kept."""
        if not adapters:
            return self._model
        folder = self._runner.folder / f"merged{self._served[adapters].number}"
        if self._merged != adapters:
            self.close()  # merging needs its memory
            for previous in self._runner.folder.glob("merged*"):
                shutil.rmtree(previous)
            self._merge(adapters, folder)
            self._merged = adapters
        return str(folder)

    def _use_fallback(
        self, adapters: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress, starts: Starts
    ) -> list[Answer]:
        self.close()
        engine = self._fallback()
        self.answered_by = engine.answered_by
        return engine.generate(adapters, prompts, max_new_tokens, progress, starts)
