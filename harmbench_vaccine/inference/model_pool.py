"""Keep one of {training model, vLLM engine, judge} in the memory of a GPU; on a CPU, keep one of each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.device import device, place_model
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.sources import model_folder

from .engine import GPU_MEMORY, Backend, Engine
from .loading import (
    JudgeHead,
    load_judge,
    load_model,
    load_tokenizer_and_config,
    quantization_options,
)
from .sharded_loading import load_sharded
from .tensor_parallel import largest_division

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harmbench_vaccine.training.adapters import LoraStack

    from .classifiers import Classify
    from .generators import Generator
    from .vllm_runner import VllmRunner

Occupant = Literal["training", "engine", "judge", "judge engine", "judge classifier"]
"""Kinds of models in memory: the model in training, the vLLM engine of answers, a judge of transformers, and the vLLM
engines of a judge that writes and of a judge that classifies."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that a stage produced: a base model and the adapters on it."""

    base: str
    dtype: str = "float32"
    adapters: tuple[Path, ...] = ()
    """Adapter folders, the lowest first."""
    quantization: str = "none"

    def on_top(self, *adapters: Path) -> ModelSpec:
        """Return the same base with other adapters."""
        return replace(self, adapters=adapters)


class ModelPool:
    """The models in memory, each loaded when it is first needed.

    On a GPU each kind of model may need all the memory that another kind leaves free, so a model that is about to be
    loaded evicts the others. On a CPU nothing is evicted: one model of each kind stays loaded. `close` unloads all.
    """

    def __init__(
        self,
        progress: Progress = SILENT,
        gradient_checkpointing: bool = False,
        shard: bool = False,
        gpu_memory: float = GPU_MEMORY,
        tensor_parallel: int = 1,
    ) -> None:
        """Create an empty pool.

        Args:
            progress: Where the start of engines and fallbacks are reported.
            gradient_checkpointing: Compute activations again in the backward pass: less memory, one more forward pass
                per step.
            shard: Spread the base model over the ranks.
            gpu_memory: Share of the memory of each GPU that a vLLM engine takes.
            tensor_parallel: Number of GPUs that share the weights of a vLLM engine.
        """
        self.progress = progress
        self.gradient_checkpointing = gradient_checkpointing
        self.shard = shard
        self.gpu_memory = gpu_memory
        self.tensor_parallel = tensor_parallel
        self._evictions: dict[Occupant, Callable[[], None]] = {}
        self._tokenizers: dict[str, tuple[PreTrainedTokenizerBase, Any]] = {}
        self._stack: tuple[ModelSpec, LoraStack] | None = None
        self._engine: tuple[ModelSpec, Engine] | None = None
        self._judge: tuple[tuple[str, JudgeHead, str], tuple[Any, Any]] | None = None
        self._runners: dict[Occupant, tuple[tuple[str, str], VllmRunner]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelPool:
        """Return the pool itself: a copy of a plug-in shares its models."""
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # Memory

    @staticmethod
    def one_at_a_time() -> bool:
        """Return True if models have to take turns in memory: a GPU exists."""
        return device() == "cuda"

    def acquire(self, occupant: Occupant, evict: Callable[[], None]) -> None:
        """Announce that a model is about to be loaded; on a GPU, evict every other one first.

        Args:
            occupant: Kind of the model.
            evict: Unloads it.
        """
        if self.one_at_a_time():
            import torch

            self.evict(*(key for key, callback in self._evictions.items() if key != occupant or callback != evict))
            gc.collect()  # the modules of a model refer to each other in circles
            torch.cuda.empty_cache()
        self._evictions[occupant] = evict

    def evict(self, *occupants: Occupant) -> None:
        """Unload models of these kinds; kinds that are not in memory are skipped."""
        for occupant in occupants:
            if callback := self._evictions.pop(occupant, None):
                callback()

    def close(self) -> None:
        """Unload every model and end every vLLM process. The pool can be used again."""
        self.evict(*self._evictions)
        self._engine = None
        self._runners.clear()

    # -----------------------------------------------------------------------------------------------------------------
    # Models in training, and what answers with them

    def stack(self, spec: ModelSpec) -> LoraStack:
        """Return the base of a model, ready to carry adapters; another base is unloaded.

        Raises:
            HbvError: The base cannot be loaded.
        """
        from harmbench_vaccine.training.adapters import LoraStack

        self.acquire("training", self._unload_stack)
        base = spec.on_top()
        outdated = self._stack is None or self._stack[0] != base
        if self.shard:  # a judge on the GPU of rank 0 evicts the base there: then all ranks load it, so that parts fit
            outdated = distributed.from_rank0(lambda: outdated)
        if outdated:
            self._unload_stack()
            self._stack = base, LoraStack(self._load_base(spec), self.progress.note)
        assert self._stack is not None
        return self._stack[1]

    def second_stack(self, spec: ModelSpec) -> LoraStack:
        """Load a second base next to the one in memory; the pool does not keep it."""
        from harmbench_vaccine.training.adapters import LoraStack

        return LoraStack(self._load_base(spec), self.progress.note)

    def tokenizer(self, spec: ModelSpec) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the base of a model."""
        return self.tokenizer_and_config(spec.base)[0]

    def tokenizer_and_config(self, base: str) -> tuple[PreTrainedTokenizerBase, Any]:
        """Return the tokenizer and the configuration of a base model; its weights are not loaded."""
        if base not in self._tokenizers:
            self._tokenizers[base] = load_tokenizer_and_config(base, "Model")
        return self._tokenizers[base]

    def merged(self, spec: ModelSpec) -> PreTrainedModel:
        """Load a model with its adapters merged into the weights; the base in memory is unloaded.

        Raises:
            HbvError: The base is quantized or sharded.
        """
        from harmbench_vaccine.training.adapters import Adapter
        from harmbench_vaccine.training.merging import merge_adapter

        self.acquire("training", self._unload_stack)
        self._unload_stack()
        if spec.quantization != "none" or self.shard:
            raise HbvError(
                f"Adapters cannot be merged into a {'sharded' if self.shard else 'quantized'} base: its full weights "
                "are not in memory."
            )
        model = self._load_base(spec)
        for path in spec.adapters:
            merge_adapter(model, Adapter.load(path))
        return model

    def engine(self, spec: ModelSpec, backend: Backend = "transformers") -> Engine:
        """Return the engine that answers with the base of a model; a vLLM engine for another base is ended."""
        from .transformers_engine import TransformersEngine

        unsupported = spec.quantization != "none" or self.shard
        if backend == "vllm" and unsupported:
            self.progress.note("vLLM does not serve quantized or sharded base models: transformers answers.")
        if backend == "transformers" or unsupported:
            return TransformersEngine(self.stack(spec), self.tokenizer(spec))
        from .vllm_engine import VllmEngine
        from .vllm_runner import VllmRunner

        base = spec.on_top()
        if self._engine is None or self._engine[0] != base:
            self.evict("engine")

            def merge(adapters: Sequence[Path], folder: Path) -> None:
                self.merged(base.on_top(*adapters)).save_pretrained(folder)

            acquire = partial(self.acquire, "engine")
            runner = VllmRunner(spec.base, spec.dtype, "generate", acquire, self.gpu_memory, self.tensor_parallel)
            self._engine = base, VllmEngine(runner, self.tokenizer(spec), merge, lambda: self.engine(base))
        return self._engine[1]

    # -----------------------------------------------------------------------------------------------------------------
    # Judges

    def judge_generator(self, location: str, backend: str = "transformers", batch: int = 16) -> Generator:
        """Return a judge that writes text; transformers runs it if vLLM refuses it.

        Args:
            location: Folder or hub id.
            backend: "transformers" or "vllm".
            batch: Largest number of prompts in a batch of transformers.

        Raises:
            HbvError: The judge cannot be loaded.
        """
        from .generators import TransformersGenerator, VllmGenerator

        if backend != "vllm":
            return TransformersGenerator(*self._load_judge(location, "generator"), batch)
        model = str(model_folder(location) or location)
        _, config = load_tokenizer_and_config(location)
        dtype = str(config.get_text_config().dtype or "float32").removeprefix("torch.")
        runner = self._judge_runner("judge engine", model, dtype, "generate")
        return VllmGenerator(location, runner, lambda: self.judge_generator(location, "transformers", batch))

    def judge_classifier(
        self, location: str, backend: str = "transformers", dtype: str = "float32", batch: int = 32
    ) -> Classify:
        """Return a judge that classifies; transformers runs it if vLLM refuses it.

        Args:
            location: Folder or hub id.
            backend: "transformers" or "vllm".
            dtype: Data type of the weights.
            batch: Largest number of texts in a batch of transformers.

        Raises:
            HbvError: The judge cannot be loaded.
        """
        from .classifiers import TransformersClassifier

        if backend != "vllm":
            return TransformersClassifier(self._load_judge(location, "classifier", dtype)[1], batch)
        from .vllm_process import EngineRefused

        model = str(model_folder(location) or location)
        runner = self._judge_runner("judge classifier", model, dtype, "pooling")

        def classify(texts: Sequence[list[int]], progress: Progress = SILENT) -> list[list[float]]:
            try:
                return runner.classify(model, texts, progress)
            except EngineRefused as refusal:
                note = f"vLLM does not serve {location}: {refusal.reason}. transformers runs it instead."
                runner.note_once(note, progress)
                return self.judge_classifier(location, "transformers", dtype, batch)(texts, progress)

        return classify

    def _load_judge(self, location: str, head: JudgeHead, dtype: str = "auto") -> tuple[Any, Any]:
        """Return the tokenizer and the model of a judge of transformers; another judge is unloaded."""
        key = (location, head, dtype)
        self.acquire("judge", self._unload_judge)
        if self._judge is None or self._judge[0] != key:
            self._unload_judge()
            self._judge = key, load_judge(location, head, dtype)
        return self._judge[1]

    def _judge_runner(self, occupant: Occupant, model: str, dtype: str, runner: str) -> VllmRunner:
        """Return the vLLM process of a judge, not started yet; the process of another judge is ended."""
        from .vllm_runner import VllmRunner

        key = (model, dtype)
        if occupant not in self._runners or self._runners[occupant][0] != key:
            self.evict(occupant)
            acquire = partial(self.acquire, occupant)
            gpus = self.tensor_parallel
            if gpus > 1:
                gpus = largest_division(load_tokenizer_and_config(model)[1], gpus)
            self._runners[occupant] = key, VllmRunner(model, dtype, runner, acquire, self.gpu_memory, gpus)
        return self._runners[occupant][1]

    # -----------------------------------------------------------------------------------------------------------------

    def _load_base(self, spec: ModelSpec) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, spec.dtype)
        options = quantization_options(spec.quantization, dtype)
        model: PreTrainedModel
        if self.shard:
            model = load_sharded(spec.base, dtype)
        else:
            model = load_model(AutoModelForCausalLM, spec.base, dtype=dtype, **options)
        if self.gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise BadInput(f"{type(model).__name__} does not support gradient checkpointing.")
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return place_model(model)

    def _unload_stack(self) -> None:
        self._stack = None

    def _unload_judge(self) -> None:
        import torch

        self._judge = None
        gc.collect()
        if self.one_at_a_time():
            torch.cuda.empty_cache()
