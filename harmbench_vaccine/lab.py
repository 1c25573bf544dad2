"""What the stages of a process share: the store, the progress, and each model loaded once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import protocols
from .data.sources import locate
from .errors import BadInput, HbvError
from .progress import SILENT, Progress
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .generation.engine import Engine
    from .training.adapters import Stack


@dataclass(frozen=True)
class ModelState:
    """A model that a stage made: a base model and the adapters laid on it, the lowest first."""

    base: str
    dtype: str = "float32"
    adapters: tuple[Path, ...] = ()

    def on_top(self, *adapters: Path) -> ModelState:
        """The same base with other adapters."""
        return replace(self, adapters=adapters)


@dataclass
class Lab:
    """Loads a model when a stage first needs it, so that a run whose stages are all cached loads none."""

    store: Store
    progress: Progress = SILENT
    save_share: float = 0.1
    """A training stage is checkpointed whenever it is this much further."""
    _stack: Stack | None = field(default=None, repr=False)
    _tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict, repr=False)
    _base: tuple[str, str] = ("", "")

    def stack(self, state: ModelState) -> Stack:
        """The base of a model, with the adapters laid on it; another base takes its place in memory.

        Raises:
            HbvError: it cannot be loaded.
        """
        from .training.adapters import Stack

        if self._base != (state.base, state.dtype):
            self._forget()
            self._stack, self._base = Stack(_model(state)), (state.base, state.dtype)
        assert self._stack is not None
        return self._stack

    def tokenizer(self, state: ModelState) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the base of a model."""
        from transformers import AutoTokenizer

        if state.base not in self._tokenizers:
            with _loading(state.base) as location:
                self._tokenizers[state.base] = AutoTokenizer.from_pretrained(location)
        return self._tokenizers[state.base]

    def engine(self, state: ModelState) -> Engine:
        """What answers prompts with the base of a model."""
        from .generation.transformers import TransformersEngine

        return TransformersEngine(self.stack(state), self.tokenizer(state))

    def beside(self, state: ModelState) -> Stack:
        """A second model in memory, which is not kept."""
        from .training.adapters import Stack

        return Stack(_model(state))

    def merged(self, state: ModelState) -> PreTrainedModel:
        """A model of its own whose weights have the adapters in them; it takes the place of the one in memory."""
        import torch

        from .training.adapters import Adapter

        self._forget()
        model = _model(state)
        with torch.no_grad():
            for path in state.adapters:
                adapter = Adapter.load(path)
                for module in adapter.factors:
                    weight: Any = model.get_submodule(module).weight
                    weight.copy_(weight.float() + adapter.delta(module).to(weight.device))
        return model

    def _forget(self) -> None:
        self._stack, self._base = None, ("", "")


def _model(state: ModelState) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would break ours
    with _loading(state.base) as location:
        model = AutoModelForCausalLM.from_pretrained(location, dtype=getattr(torch, state.dtype), use_safetensors=True)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    placed: PreTrainedModel = model.to(device)
    return placed


@contextmanager
def _loading(base: str) -> Iterator[str]:
    try:
        yield str(locate(base) or base)
    except (OSError, ValueError) as error:
        raise HbvError(f"Model {base!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def check_model(location: str) -> None:
    """Looks whether there is a model at a location, before any work is spent on it.

    Raises:
        BadInput: it is neither a model's folder nor a model that the hub has.
    """
    path = locate(location)
    if path is not None and (path / "config.json").is_file():
        return
    if path is None:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(location)
            return
        except (OSError, ValueError) as error:
            reason = f"the hub does not give it: {str(error).splitlines()[0]}"
    else:
        reason = "it holds no config.json"
    known = protocols.models()
    close = difflib.get_close_matches(location, known, n=1, cutoff=0.4)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise BadInput(
        f"Unknown model {location!r}: {reason.rstrip('.')}.{guess} "
        f"Allowed: a model's folder, a hub id, or one of the protocols': {', '.join(known)}."
    )
