"""Generation and classification by vLLM, in a process of its own.

One engine serves every stack of adapters on a base model: the adapter is switched between calls, and a stack is served
as one adapter (factors concatenated along the rank). Where vLLM refuses an adapter, the engine serves weights with the
adapter merged in. Where vLLM refuses the model, transformers answers. Both cases are reported.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.locks import temporary_folder
from harmbench_vaccine.core.progress import SILENT, Advance, Progress
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_prompt
from harmbench_vaccine.data.model_limits import position_limit
from harmbench_vaccine.training.adapters import Adapter, concatenate

from .engine import GPU_MEMORY, Answer, Engine, decode_answer
from .generation import GeneratedTokens, cut_at_stop
from .loading import readable_load_errors
from .vllm_process import EngineRefused, VllmProcess

MIN_LENGTH, MIN_RANK = 1024, 16
"""Tokens and rank that an engine has room for at least, so that the next call seldom needs another engine."""

AdapterPaths = tuple[Path, ...]
Acquire = Callable[[Callable[[], None]], None]
"""Called with an evict callback before memory is taken; it may evict other models."""


@dataclass(frozen=True)
class EngineShape:
    """The size that an engine is started with."""

    model: str = ""
    """Location of the model."""
    rank: int = 0
    """Rank of the largest adapter; 0: no adapters."""
    length: int = 0
    """Longest sequence in tokens, prompt and answer together."""

    def serves(self, needed: EngineShape) -> bool:
        """Return True if an engine of this shape also serves `needed`."""
        return self.model == needed.model and self.rank >= needed.rank and self.length >= needed.length


@dataclass(frozen=True)
class ServedAdapter:
    """A stack of adapters in the form that vLLM loads."""

    number: int
    """Number of the adapter in requests; 0 is the base model."""
    path: Path
    rank: int
    room: int
    """Rank to leave room for: a second adapter as large as the largest of the stack may follow."""


class VllmRunner:
    """A worker process that runs vLLM; it is started again if a larger shape is needed."""

    def __init__(
        self, name: str, dtype: str, runner: str, acquire: Acquire | None = None, gpu_memory: float = GPU_MEMORY
    ) -> None:
        """Prepare a runner; nothing is started.

        Args:
            name: Name of the model in messages.
            dtype: Data type of the weights.
            runner: "generate" or "pooling", as vLLM calls it.
            acquire: Called with `self.close` before the process starts.
            gpu_memory: Share of the GPU's memory that vLLM takes.
        """
        self.name, self._dtype, self._runner = name, dtype, runner
        self._acquire, self._gpu_memory = acquire, gpu_memory
        self.folder, self._lock = temporary_folder("hbv-vllm-")
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._process: VllmProcess | None = None
        self._shape = EngineShape()
        self._limits: dict[str, int | None] = {}

    def start(self, needed: EngineShape, room: int, progress: Progress) -> None:
        """Start an engine that serves a shape, unless the running one does.

        Args:
            needed: The shape that the next request needs.
            room: Rank to leave room for; 0: no adapters.
            progress: Where the start is reported.

        Raises:
            EngineRefused: vLLM does not serve the model, or the model reads fewer tokens than needed.
            HbvError: The process died.
        """
        if self._process and self._shape.serves(needed):
            return
        limit = self._length_limit(needed.model) or needed.length
        if needed.length > limit:
            raise EngineRefused(
                self.name, "length", f"a text has {needed.length} tokens, but the model reads at most {limit}"
            )
        if self._shape.model == needed.model and room:  # an adapter that was served before is likely to come again
            room = max(room, self._shape.rank)
        self.close()
        if self._acquire:
            self._acquire(self.close)
        with readable_load_errors(needed.model) as source:
            name, revision = source["pretrained_model_name_or_path"], source.get("revision")
        length = min(max(MIN_LENGTH, 1 << (needed.length - 1).bit_length()), limit)
        with progress.bar("vLLM starts", 1) as advance:
            self._process = VllmProcess(self.name, self.folder)
            reply = self.request(
                "start",
                model=name,
                revision=revision,
                dtype=self._dtype,
                length=length,
                memory=self._gpu_memory,
                runner=self._runner,
                need=needed.rank,
                room=room,
            )
            advance(1)
        self._shape = EngineShape(needed.model, reply["rank"], length)

    def request(self, do: str, advance: Advance | None = None, **values: Any) -> dict[str, Any]:
        """Send a request to the worker and return its reply.

        Raises:
            EngineRefused: vLLM does not serve the request.
            HbvError: The process died, or the memory does not suffice.
        """
        assert self._process is not None
        try:
            return self._process.request(do, advance, **values)
        except EngineRefused as refusal:
            if refusal.what != "memory":
                raise
            raise HbvError(
                f"vLLM has too little memory for {self.name!r}: {refusal.reason}. On a GPU, set another share with "
                "--gpu-memory; on a CPU, set the environment variable VLLM_CPU_KVCACHE_SPACE (GiB)."
            ) from refusal

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        ends: Sequence[int],
        advance: Advance,
        watched: Sequence[int] = (),
    ) -> list[GeneratedTokens]:
        """Generate greedily with the running engine (see `generate_greedy` for the arguments)."""
        reply = self.request(
            "generate",
            advance,
            prompts=[list(ids) for ids in prompts],
            max_new_tokens=max_new_tokens,
            ends=list(ends),
            watched=list(watched) or None,
        )
        log_probs = reply["watched"] if watched else [[] for _ in prompts]
        return [cut_at_stop(row, ends, steps) for row, steps in zip(reply["rows"], log_probs, strict=True)]

    def classify(self, location: str, rows: Sequence[Sequence[int]], progress: Progress = SILENT) -> list[list[float]]:
        """Compute the raw logits of a sequence classifier, without softmax or sigmoid.

        Args:
            location: Folder or hub id of the classifier.
            rows: Token ids of each text, cut and closed as the classifier expects.
            progress: Where the number of classified rows is reported.

        Returns:
            Logits (rows x labels).

        Raises:
            EngineRefused: vLLM does not serve the model, or a row is longer than the model reads.
            HbvError: The process died, or the memory does not suffice.
        """
        if not rows:
            return []
        self.start(EngineShape(location, 0, max(map(len, rows))), 0, progress)
        with progress.bar("judge", len(rows)) as advance:
            logits: list[list[float]] = self.request("classify", advance, rows=[list(row) for row in rows])["rows"]
        return logits

    def close(self) -> None:
        """End the process, which frees its memory."""
        if self._process:
            self._process.close()
        self._process, self._shape = None, EngineShape()

    def _length_limit(self, model: str) -> int | None:
        """Return the largest number of tokens that a model reads, or None if its configuration has no limit."""
        if model not in self._limits:
            with readable_load_errors(model) as source:
                self._limits[model] = position_limit(AutoConfig.from_pretrained(**source))
        return self._limits[model]


class VllmEngine:
    """A vLLM engine for one base model under any adapters.

    The process starts at the first call. It starts again, larger, for an adapter of higher rank or for a longer text
    than it has room for.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        dtype: str,
        merge: Callable[[Sequence[Path], Path], None],
        fallback: Callable[[], Engine],
        acquire: Acquire | None = None,
        gpu_memory: float = GPU_MEMORY,
    ) -> None:
        """Prepare an engine; nothing is started.

        Args:
            model: Folder or hub id of the base model.
            tokenizer: Its tokenizer.
            dtype: Data type of the weights.
            merge: `merge(adapters, folder)` writes the model with the adapters merged into its weights.
            fallback: Returns the engine that answers where vLLM refuses the model.
            acquire: Called with an evict callback before the process starts.
            gpu_memory: Share of the GPU's memory that vLLM takes.
        """
        self.answered_by = "vllm"
        self._model, self._tokenizer = model, tokenizer
        self._merge, self._fallback = merge, fallback
        self._runner = VllmRunner(model, dtype, "generate", acquire, gpu_memory)
        self._served: dict[AdapterPaths, ServedAdapter] = {(): ServedAdapter(0, Path(), 0, MIN_RANK)}
        self._refused: set[AdapterPaths] = set()
        self._merged: AdapterPaths = ()
        self._unsupported = False

    def generate(
        self, adapters: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress = SILENT
    ) -> list[Answer]:
        """Generate greedy answers, in the order of `prompts`; equal prompts are answered once.

        Raises:
            HbvError: The process died, or the memory does not suffice.
        """
        encoded = {prompt: encode_prompt(self._tokenizer, prompt) for prompt in prompts}
        if not encoded:
            return []
        ends = stop_token_ids(self._tokenizer, prompts)
        try:
            if self._unsupported:
                return self._use_fallback(adapters, prompts, max_new_tokens, progress)
            self._prepare(tuple(adapters), max(map(len, encoded.values())) + max_new_tokens, progress)
        except EngineRefused as refusal:
            progress.note(f"vLLM does not serve {self._model}: {refusal.reason}. transformers answers instead.")
            self._unsupported = refusal.what == "model"
            return self._use_fallback(adapters, prompts, max_new_tokens, progress)
        with progress.bar("answer", len(encoded)) as advance:
            rows = self._runner.generate(list(encoded.values()), max_new_tokens, ends, advance)
        answers = {prompt: decode_answer(self._tokenizer, row) for prompt, row in zip(encoded, rows, strict=True)}
        return [answers[prompt] for prompt in prompts]

    def close(self) -> None:
        """End the process, which frees its memory; a later call of `generate` starts it again."""
        self._runner.close()

    def _prepare(self, adapters: AdapterPaths, length: int, progress: Progress) -> None:
        """Start the engine if needed and select the adapters, as one adapter or merged into the weights."""
        if adapters not in self._refused:
            try:
                served = self._served_adapter(adapters)
                self._runner.start(EngineShape(self._model, served.rank, length), served.room, progress)
                self._runner.request("adapter", number=served.number, path=str(served.path))
                self.answered_by = "vllm"
                return
            except EngineRefused as refusal:
                if refusal.what != "adapter":
                    raise
                self._refused.add(adapters)
                if adapters:
                    progress.note(f"vLLM does not take the adapter: {refusal.reason}. It answers by merged weights.")
        self._runner.start(EngineShape(self._merged_model(adapters), 0, length), 0, progress)
        self._runner.request("adapter", number=0, path="")
        self.answered_by = "vllm, merged weights" if adapters else "vllm"

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
        self, adapters: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress
    ) -> list[Answer]:
        self.close()
        engine = self._fallback()
        self.answered_by = engine.answered_by
        return engine.generate(adapters, prompts, max_new_tokens, progress)
