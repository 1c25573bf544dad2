"""What the stages of a process share: the store, the progress, and each model loaded once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.sources import locate
from .errors import HbvError
from .progress import SILENT, Progress
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .generation.engine import Engine
    from .training.adapters import Stack


@dataclass(frozen=True)
class ModelState:
    """A model that a stage made: a base model and the adapters laid on it, the lowest first."""

    base: str
    adapters: tuple[Path, ...] = ()


@dataclass
class Lab:
    """Loads a model when a stage first needs it, so that a run whose stages are all cached loads none."""

    store: Store
    progress: Progress = SILENT
    save_share: float = 0.1
    """A training stage is checkpointed whenever it is this much further."""
    _stack: Stack | None = field(default=None, repr=False)
    _tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    _base: str = ""

    def stack(self, base: str) -> Stack:
        """The base model of that location, with its adapters; another base takes its place in memory.

        Raises:
            HbvError: it cannot be loaded.
        """
        if self._base != base:
            self._load(base)
        assert self._stack is not None
        return self._stack

    def tokenizer(self, base: str) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to a base model."""
        if self._base != base:
            self._load(base)
        assert self._tokenizer is not None
        return self._tokenizer

    def engine(self, base: str) -> Engine:
        """What answers prompts with that base model."""
        from .generation.transformers import TransformersEngine

        return TransformersEngine(self.stack(base), self.tokenizer(base))

    def _load(self, base: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from .training.adapters import Stack

        self._stack = self._tokenizer = None
        location = str(locate(base) or base)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(location)
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
        except (OSError, ValueError) as error:
            raise HbvError(f"Model {base!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        self._stack = Stack(model.to(device))
        self._base = base
