"""What the stages of a process share: the store, the progress, and each model loaded once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.sources import local_path
from harmbench_vaccine.experiment.protocol import protocol_models

from . import memory
from .loading import load_model, quantization_options, readable_load_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harmbench_vaccine.training.adapters import LoraStack

    from .engine import Backend, Engine


@dataclass(frozen=True)
class ModelSpec:
    """A model that a stage made: a base model and the adapters laid on it, the lowest first."""

    base: str
    dtype: str = "float32"
    adapters: tuple[Path, ...] = ()
    quantization: str = "none"

    def on_top(self, *adapters: Path) -> ModelSpec:
        """The same base with other adapters."""
        return replace(self, adapters=adapters)


@dataclass
class Lab:
    """Loads a model when a stage first needs it, so that a run whose stages are all cached loads none."""

    store: Store
    progress: Progress = SILENT
    save_share: float = 0.1
    """A training stage is checkpointed whenever it is this much further."""
    gradient_checkpointing: bool = False
    """Activations are computed again in the backward pass: less memory, a forward pass more a step."""
    shard: bool = False
    """The base is spread over the ranks."""
    _stack: LoraStack | None = field(default=None, repr=False)
    _tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict, repr=False)
    _base: ModelSpec | None = None
    _engine: Engine | None = field(default=None, repr=False)
    _answers: ModelSpec | None = None

    def stack(self, state: ModelSpec) -> LoraStack:
        """The base of a model, with the adapters laid on it; another base takes its place in memory.

        Raises:
            HbvError: it cannot be loaded.
        """
        from harmbench_vaccine.training.adapters import LoraStack

        memory.acquire("training", self._forget)
        other = self._base != state.on_top()
        if self.shard:  # a judge on rank 0's GPU made that rank forget: then all load it, for their parts must fit
            other = distributed.from_rank0(lambda: other)
        if other:
            self._forget()
            self._stack, self._base = LoraStack(self._model(state), self.progress.note), state.on_top()
        assert self._stack is not None
        return self._stack

    def tokenizer(self, state: ModelSpec) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the base of a model."""
        from transformers import AutoTokenizer

        if state.base not in self._tokenizers:
            with readable_load_errors(state.base) as place:
                self._tokenizers[state.base] = AutoTokenizer.from_pretrained(**place)
        return self._tokenizers[state.base]

    def engine(self, state: ModelSpec, backend: Backend = "transformers") -> Engine:
        """What answers prompts with the base of a model. One vLLM engine is kept; another base takes its place."""
        from .transformers_engine import TransformersEngine

        odd = state.quantization != "none" or self.shard
        if backend == "vllm" and odd:
            self.progress.note("vLLM serves no base that the harness quantizes or shards: transformers answers.")
        if backend == "transformers" or odd:
            return TransformersEngine(self.stack(state), self.tokenizer(state))
        from .vllm_engine import VllmEngine

        base = state.on_top()
        if self._engine is None or self._answers != base:
            memory.evict("engine")

            def merge(adapters: Sequence[Path], folder: Path) -> None:
                self.merged(base.on_top(*adapters)).save_pretrained(folder)

            tokenizer = self.tokenizer(state)
            self._engine = VllmEngine(state.base, tokenizer, state.dtype, merge, otherwise=lambda: self.engine(base))
            self._answers = base
        return self._engine

    def close(self) -> None:
        """Ends the processes of vLLM's that run, and lets go of a judge."""
        memory.evict("engine", "classifier", "judge", "judge engine")
        self._engine = self._answers = None

    def beside(self, state: ModelSpec) -> LoraStack:
        """A second model in memory, which is not kept."""
        from harmbench_vaccine.training.adapters import LoraStack

        return LoraStack(self._model(state), self.progress.note)

    def merged(self, state: ModelSpec) -> PreTrainedModel:
        """A model of its own whose weights have the adapters in them; it takes the place of the one in memory."""
        import torch

        from harmbench_vaccine.training.adapters import Adapter

        memory.acquire("training", self._forget)
        self._forget()
        if state.quantization != "none" or self.shard:
            raise HbvError(
                f"Adapters cannot be merged into a base that is {'sharded' if self.shard else 'quantized'}: "
                "its weights are not whole."
            )
        model = self._model(state)
        with torch.no_grad():
            for path in state.adapters:
                adapter = Adapter.load(path)
                for module in adapter.factors:
                    weight: Any = model.get_submodule(module).weight
                    weight.copy_(weight.float() + adapter.delta(module).to(weight.device))
        return model

    def _model(self, state: ModelSpec) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, state.dtype)
        options = quantization_options(state.quantization, dtype)
        model: PreTrainedModel = load_model(AutoModelForCausalLM, state.base, dtype=dtype, **options)
        if self.gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise BadInput(f"{type(model).__name__} knows no gradient checkpointing.")
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.shard:
            from harmbench_vaccine.training.sharding import shard

            return shard(model)
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        return model if options else model.to(device)  # bitsandbytes has placed what it quantized

    def _forget(self) -> None:
        self._stack = self._base = None


def check_model(location: str) -> None:
    """Looks whether there is a model at a location, before any work is spent on it.

    Raises:
        BadInput: it is neither a model's folder nor a model that the hub has.
    """
    path = local_path(location)
    if path is not None and (path / "config.json").is_file():
        return
    if path is None:
        from transformers import AutoConfig

        try:
            with readable_load_errors(location) as place:
                AutoConfig.from_pretrained(**place)
            return
        except HbvError as error:
            sentence = str(error)
            if "is gated" in sentence:  # there is no doubt which one is meant
                raise
    else:
        sentence = f"Model {location!r} holds no config.json."
    known = protocol_models()
    close = difflib.get_close_matches(location, known, n=1, cutoff=0.4)
    guess = f" Did you mean {close[0]!r}?" if close and close[0] != location else ""
    raise BadInput(
        f"{sentence}{guess} Allowed: a model's folder, a hub id, or one of the protocols': {', '.join(known)}."
    )
