"""A vLLM process for one model: its start, the options that it starts with, and requests to it.

Where the attention backend or the compilation fails, the process starts again with the next one. Each case is reported
once, in the words of vLLM.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from transformers import AutoConfig

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.locks import temporary_folder
from harmbench_vaccine.core.progress import SILENT, Advance, Progress
from harmbench_vaccine.data.model_limits import position_limit

from .engine import GPU_MEMORY
from .generation import GeneratedTokens, cut_at_stop
from .loading import readable_load_errors
from .vllm_process import EngineRefused, VllmProcess

MIN_LENGTH = 1024
"""Tokens that an engine has room for at least, so that the next call seldom needs another engine."""

ATTENTION_BACKENDS = (None, "TRITON_ATTN", "FLEX_ATTENTION")
"""Attention backends for a GPU in the order in which they are tried; None: vLLM chooses.

FlashAttention and FlashInfer take no float32. Source: `supported_dtypes` of the backends of vLLM 0.20 and 0.32.
"""

T = TypeVar("T")
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
class EngineOptions:
    """Options of an engine that change answers by rounding at most."""

    attention: str | None = None
    """Attention backend; None: vLLM chooses."""
    eager: bool = True
    """Run without compilation and CUDA graphs."""

    @classmethod
    def preferred(cls, dtype: str) -> EngineOptions:
        """Return the options to try first on the device of this process."""
        if device() != "cuda":
            return cls()  # on a CPU there is one attention backend, and a compilation takes longer than the answers
        return cls(ATTENTION_BACKENDS[1 if dtype == "float32" else 0], eager=False)

    def after(self, refusal: EngineRefused) -> EngineOptions | None:
        """Return the options to try next; None: vLLM cannot serve the request with any."""
        if refusal.what == "compilation" and not self.eager:
            return replace(self, eager=True)
        following = ATTENTION_BACKENDS[ATTENTION_BACKENDS.index(self.attention) + 1 :]
        if refusal.what == "attention" and following and device() == "cuda":
            return replace(self, attention=following[0])
        return None

    def __str__(self) -> str:
        attention = f"with the attention backend {self.attention}" if self.attention else ""
        return " and ".join(filter(None, [attention, "without CUDA graphs" if self.eager else ""]))


class VllmRunner:
    """A worker process that runs vLLM; it is started again if a larger shape is needed."""

    def __init__(
        self,
        name: str,
        dtype: str,
        runner: str,
        acquire: Acquire | None = None,
        gpu_memory: float = GPU_MEMORY,
        gpus: int = 1,
    ) -> None:
        """Prepare a runner; nothing is started.

        Args:
            name: Name of the model in messages.
            dtype: Data type of the weights.
            runner: "generate" or "pooling", as vLLM calls it.
            acquire: Called with `self.close` before the process starts.
            gpu_memory: Share of the memory of each GPU that vLLM takes.
            gpus: Number of GPUs that share the weights.
        """
        self.name, self._dtype, self._runner = name, dtype, runner
        self._acquire, self._gpu_memory, self._gpus = acquire, gpu_memory, gpus
        self._options = EngineOptions.preferred(dtype)
        self.folder, self._lock = temporary_folder("hbv-vllm-")
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._process: VllmProcess | None = None
        self._shape = EngineShape()
        self._limits: dict[str, int | None] = {}
        self._notes: set[str] = set()
        self.refusal: EngineRefused | None = None
        """Why vLLM serves no request with the model."""

    def run(self, needed: EngineShape, room: int, progress: Progress, request: Callable[[], T]) -> T:
        """Send requests to an engine that serves a shape; one is started unless the running one does.

        Where the attention backend or the compilation fails, even in the middle of the request, the engine starts again
        with other options, and everything is requested again.

        Args:
            needed: The shape that the requests need.
            room: Rank to leave room for; 0: no adapters.
            progress: Where the start and other options are reported.
            request: Sends the requests.

        Raises:
            EngineRefused: vLLM does not serve the request, or the model reads fewer tokens than needed.
            HbvError: The process died, or the memory does not suffice.
        """
        if self.refusal:
            raise self.refusal
        self._check_length(needed)
        while True:
            try:
                self._start(needed, room, progress)
                return request()
            except EngineRefused as refusal:
                self.close()  # after an error vLLM may be unusable
                options = self._options.after(refusal)
                if options is None:
                    self.refusal = None if refusal.what == "adapter" else refusal
                    raise
                progress.note(f"vLLM fails with {self.name}: {refusal.reason}. It starts again {options}.")
                self._options = options

    def note_once(self, text: str, progress: Progress) -> None:
        """Report a text unless it was reported before."""
        if text not in self._notes:
            progress.note(text)
        self._notes.add(text)

    def _check_length(self, needed: EngineShape) -> None:
        limit = self._length_limit(needed.model) or needed.length
        if needed.length > limit:
            raise EngineRefused(
                self.name, "length", f"a text has {needed.length} tokens, but the model reads at most {limit}"
            )

    def _start(self, needed: EngineShape, room: int, progress: Progress) -> None:
        if self._process and self._shape.serves(needed):
            return
        if self._shape.model == needed.model and room:  # an adapter that was served before is likely to come again
            room = max(room, self._shape.rank)
        self.close()
        if self._acquire:
            self._acquire(self.close)
        with readable_load_errors(needed.model) as source:
            name, revision = source["pretrained_model_name_or_path"], source.get("revision")
        limit = self._length_limit(needed.model) or needed.length
        length = min(max(MIN_LENGTH, 1 << (needed.length - 1).bit_length()), limit)
        options = self._options
        if needed.model != self.name:  # vLLM would not reuse the compilation of a temporary folder with merged weights
            options = replace(options, eager=True)
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
                gpus=self._gpus,
                need=needed.rank,
                room=room,
                **asdict(options),
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
        """Generate greedily with the running engine (see `generate_greedy` for the arguments); for use in `run`."""
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

        def request() -> list[list[float]]:
            with progress.bar("judge", len(rows)) as advance:
                logits: list[list[float]] = self.request("classify", advance, rows=[list(row) for row in rows])["rows"]
            return logits

        return self.run(EngineShape(location, 0, max(map(len, rows))), 0, progress, request)

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
