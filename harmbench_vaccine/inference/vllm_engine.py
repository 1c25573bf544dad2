"""Generation and classification by vLLM, in a process of its own.

One engine serves every stack of adapters on a base model: adapters are switched from one call to the next, and a stack
is served as the one adapter that it is (factors concatenated along the rank). What vLLM does not serve is served
another way, and said: an adapter that it refuses by weights that have it merged in, a model that it refuses by
transformers.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import SILENT, Advance, Progress
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_prompt
from harmbench_vaccine.training.adapters import Adapter, concatenate

from . import memory
from .engine import Answer, Engine
from .loading import readable_load_errors
from .transformers_engine import read
from .vllm_process import EngineRefused, VllmProcess

SHORTEST, LOWEST = 1024, 16
"""Tokens and rank that an engine has room for at least, so that the next call seldom needs another engine."""

AdapterPaths = tuple[Path, ...]


@dataclass(frozen=True)
class EngineShape:
    """What an engine is started with: a model's location; the rank of the largest adapter that it takes, 0 for none;
    the longest sequence in tokens, prompt and answer."""

    model: str = ""
    rank: int = 0
    length: int = 0

    def serves(self, wanted: EngineShape) -> bool:
        """True if no other engine is needed."""
        return self.model == wanted.model and self.rank >= wanted.rank and self.length >= wanted.length


@dataclass(frozen=True)
class ServedAdapter:
    """A stack of adapters as vLLM takes it: one folder under a number; number 0 is the bare model."""

    number: int
    path: Path
    rank: int
    room: int
    """The rank to leave room for: a second adapter as large as the stack's largest may follow."""


class VllmRunner:
    """A worker process that is started, and started again when another shape is needed."""

    def __init__(self, name: str, dtype: str, runner: str, holder: str = "engine") -> None:
        """`holder` is who it claims the GPU as."""
        self.name, self._dtype, self._runner, self._holder = name, dtype, runner, holder
        self.folder = Path(tempfile.mkdtemp(prefix="hbv-vllm-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._process: VllmProcess | None = None
        self._shape = EngineShape()

    def start(self, wanted: EngineShape, room: int, progress: Progress) -> None:
        """An engine that serves this shape, with room for a rank; the one that runs, if it does.

        Raises:
            Refused: vLLM does not serve it, or the limit of the model is below the length.
            HbvError: the process died.
        """
        if self._process and self._shape.serves(wanted):
            return
        limit = _limit(wanted.model) or wanted.length
        if wanted.length > limit:
            raise EngineRefused(
                self.name, "length", f"a text takes {wanted.length} tokens, and the model reads {limit}"
            )
        if self._shape.model == wanted.model and room:  # what it served before is likely to come again
            room = max(room, self._shape.rank)
        self.close()
        memory.acquire(self._holder, self.close)
        with readable_load_errors(wanted.model) as place:
            name, revision = place["pretrained_model_name_or_path"], place.get("revision")
        length = min(max(SHORTEST, 1 << (wanted.length - 1).bit_length()), limit)
        with progress.bar("vLLM starts", 1) as advance:
            self._process = VllmProcess(self.name, self.folder)
            started = self.ask(
                "start", model=name, revision=revision, dtype=self._dtype, length=length, memory=memory.share,
                runner=self._runner, need=wanted.rank, room=room,
            )  # fmt: skip
            advance(1)
        self._shape = EngineShape(wanted.model, started["rank"], length)

    def ask(self, do: str, advance: Advance | None = None, **values: Any) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            Refused: vLLM does not serve it.
            HbvError: the process died.
        """
        assert self._process is not None
        try:
            return self._process.ask(do, advance, **values)
        except EngineRefused as refusal:
            if refusal.what != "memory":
                raise
            raise HbvError(
                f"vLLM has too little memory for {self.name!r}: {refusal.reason}. "
                "--gpu-memory gives it another share of the GPU's; on a CPU, VLLM_CPU_KVCACHE_SPACE gives it GiB."
            ) from refusal

    def close(self) -> None:
        """Ends the process, which gives back its memory."""
        if self._process:
            self._process.close()
        self._process, self._shape = None, EngineShape()


class VllmEngine:
    """Greedy answers of a base model under any adapters.

    The engine starts at the first call. It starts again, larger, for an adapter of higher rank or for a longer text
    than it has room for.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        dtype: str,
        merge: Callable[[Sequence[Path], Path], None],
        otherwise: Callable[[], Engine],
    ) -> None:
        """`merge(adapters, folder)` writes the model with the adapters in its weights; `otherwise` gives the engine
        that serves what vLLM does not."""
        self.answered_by = "vllm"
        self._model, self._tokenizer = model, tokenizer
        self._merge, self._otherwise = merge, otherwise
        self._running = VllmRunner(model, dtype, "generate")
        self._served: dict[AdapterPaths, ServedAdapter] = {(): ServedAdapter(0, Path(), 0, LOWEST)}
        self._refused: set[AdapterPaths] = set()
        self._merged: AdapterPaths = ()
        self._hopeless = False

    def generate(
        self, adapters: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress = SILENT
    ) -> list[Answer]:
        """Greedy answers, in the order of `prompts`; equal prompts are answered once.

        Raises:
            HbvError: the engine died, or there is too little memory for it.
        """
        encoded = {prompt: encode_prompt(self._tokenizer, prompt) for prompt in prompts}
        if not encoded:
            return []
        ends = stop_token_ids(self._tokenizer, prompts)
        try:
            if self._hopeless:
                return self._hand_over(adapters, prompts, max_new_tokens, progress)
            self._use(tuple(adapters), max(map(len, encoded.values())) + max_new_tokens, progress)
        except EngineRefused as refusal:
            progress.note(f"vLLM does not serve {self._model}: {refusal.reason}. transformers answers in its place.")
            self._hopeless = refusal.what == "model"
            return self._hand_over(adapters, prompts, max_new_tokens, progress)
        with progress.bar("answer", len(encoded)) as advance:
            rows = self._running.ask(
                "generate", advance, prompts=list(encoded.values()), max_new_tokens=max_new_tokens, ends=ends
            )["rows"]
        answers = dict(zip(encoded, (read(self._tokenizer, row, ends) for row in rows), strict=True))
        return [answers[prompt] for prompt in prompts]

    def close(self) -> None:
        """Ends the engine's process, which gives back its memory; a later call starts it again."""
        self._running.close()

    def _use(self, adapters: AdapterPaths, length: int, progress: Progress) -> None:
        """Makes the engine ready to answer with these adapters, laid on the model or merged in."""
        if adapters not in self._refused:
            try:
                served = self._serve(adapters)
                self._running.start(EngineShape(self._model, served.rank, length), served.room, progress)
                self._running.ask("adapter", number=served.number, path=str(served.path))
                self.answered_by = "vllm"
                return
            except EngineRefused as refusal:
                if refusal.what != "adapter":
                    raise
                self._refused.add(adapters)
                if adapters:
                    progress.note(f"vLLM does not take the adapter: {refusal.reason}. It answers by merged weights.")
        self._running.start(EngineShape(self._merge_in(adapters), 0, length), 0, progress)
        self._running.ask("adapter", number=0, path="")
        self.answered_by = "vllm, merged weights" if adapters else "vllm"

    def _serve(self, adapters: AdapterPaths) -> ServedAdapter:
        if adapters not in self._served:
            loaded, number = [Adapter.load(path) for path in adapters], len(self._served)
            whole, path = concatenate(loaded), adapters[0]
            if len(loaded) > 1:
                path = self._running.folder / f"adapter{number}"
                whole.save(path)
            room = max(whole.rank, 2 * max(adapter.rank for adapter in loaded))
            self._served[adapters] = ServedAdapter(number, path, whole.rank, room)
        return self._served[adapters]

    def _merge_in(self, adapters: AdapterPaths) -> str:
        """The folder of the model with these adapters in its weights; one is kept at a time."""
        if not adapters:
            return self._model
        folder = self._running.folder / f"merged{self._served[adapters].number}"
        if self._merged != adapters:
            self.close()  # merging needs its memory
            for old in self._running.folder.glob("merged*"):
                shutil.rmtree(old)
            self._merge(adapters, folder)
            self._merged = adapters
        return str(folder)

    def _hand_over(self, adapters: Sequence[Path], *asked: Any) -> list[Answer]:
        self.close()
        other = self._otherwise()
        self.answered_by = other.answered_by
        return other.generate(adapters, *asked)


def vllm_logits(
    location: str, rows: Sequence[Sequence[int]], dtype: str = "auto", progress: Progress = SILENT
) -> list[list[float]]:
    """Raw logits (rows x labels) of a sequence classifier, without softmax or sigmoid.

    A row is the token ids of a text, cut and closed as the classifier wants it;
    `dtype` "auto" is the one that the model's configuration names. The engine keeps running for the next call, until
    `release`; another classifier takes its place.

    Raises:
        Refused: vLLM does not serve the model, or a row is longer than the model reads.
        HbvError: the engine died, or there is too little memory for it.
    """
    if not rows:
        return []
    if dtype == "auto":
        dtype = str(_config(location).dtype or "float32").removeprefix("torch.")
    if (location, dtype) not in _classifiers:
        close_classifier()
        _classifiers[location, dtype] = VllmRunner(location, dtype, "pooling", "classifier")
    running = _classifiers[location, dtype]
    running.start(EngineShape(location, 0, max(map(len, rows))), 0, progress)
    with progress.bar("score: judge", len(rows)) as advance:
        found: list[list[float]] = running.ask("classify", advance, rows=[list(row) for row in rows])["rows"]
    return found


def close_classifier() -> None:
    """Ends the classifier's engine, if one runs."""
    for running in _classifiers.values():
        running.close()
    _classifiers.clear()


_classifiers: dict[tuple[str, str], VllmRunner] = {}
"""The one that runs."""


@lru_cache(maxsize=8)
def _config(model: str) -> Any:
    with readable_load_errors(model) as place:
        return AutoConfig.from_pretrained(**place)


def _limit(model: str) -> int | None:
    """Tokens that a model reads at most, if it says so."""
    limit: int | None = getattr(_config(model).get_text_config(), "max_position_embeddings", None)
    return limit
