"""The models that a defense compares while an answer is generated, and vectors added to their hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from harmbench_vaccine.data.collate import pad_token_id
from harmbench_vaccine.training.taps import Taps

from .generation import next_probabilities
from .model_pool import ModelPool, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harmbench_vaccine.training.adapters import LoraStack


class AnswerModels:
    """The model that answers, and the aligned model that the user stage started from."""

    def __init__(
        self,
        pool: ModelPool,
        answering: ModelSpec,
        aligned: ModelSpec,
        ends: Sequence[int],
        steering: Mapping[int, Tensor],
    ) -> None:
        """Name the models; they are loaded when they are first used.

        Args:
            pool: The models in memory. Where the two models differ in their base, a second base is loaded.
            answering: The model that answers.
            aligned: The aligned model.
            ends: Ids of the stop tokens.
            steering: Decoder layer -> the vector that is added to its output, in both models; empty: none.
        """
        self._pool, self._specs = pool, {"answering": answering, "aligned": aligned}
        self._steering = steering
        self.ends = list(ends)
        """Ids of the tokens that end an answer."""

    def probabilities(self, model: Literal["answering", "aligned"], texts: Sequence[Sequence[int]]) -> Tensor:
        """Compute the probabilities of the token after each text.

        Args:
            model: The model to run.
            texts: Token ids of each text: a prompt, and the first tokens of its answer.

        Returns:
            (texts x vocabulary), float32, on the CPU.
        """
        spec = self._specs[model]
        shared = spec.on_top() == self._specs["answering"].on_top()
        stack = self._pool.stack(spec) if shared else self._second_stack
        pad = pad_token_id(self._pool.tokenizer(spec), stack.base.config)
        running = stack.use(spec.adapters)
        with steered(running, self._steering):
            return next_probabilities(running, texts, pad)

    @cached_property
    def _second_stack(self) -> LoraStack:
        return self._pool.second_stack(self._specs["aligned"])


def steered(model: nn.Module, vectors: Mapping[int, Tensor]) -> AbstractContextManager[None]:
    """Add vectors to the residual stream at every position of every forward pass inside the block.

    Args:
        model: The model.
        vectors: Decoder layer, from 0 -> the vector that is added to its output (width); empty: none.
    """
    if not vectors:
        return nullcontext()

    def add(layer: int, output: Tensor) -> Tensor | None:
        return output + vectors[layer].to(output) if layer in vectors else None

    return Taps(model, "layer").changed(add)
