"""The object that the hooks of a defense receive: model, step counters, and the operations of update rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.device import forked_rng
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, Pools, StageName, TrainSettings, Verdict
from harmbench_vaccine.data.collate import IGNORED, Encoded

from .adapters import ADAPTED_PREFIX, Adapter, LoraStack, concatenate
from .dropout import same_dropout
from .gradient import (
    Batch,
    Gradient,
    global_norm,
    logits_at,
    response_mask,
    response_weights,
    row_means,
    token_losses,
    weighted,
)
from .packing import FEWEST_PADS, Packing, can_pack, current_packing, packed
from .stage_rows import Encode, RowStreams, local_batch_rows, no_encode
from .taps import TapPlace, Taps, layer_numbers

__all__ = [
    "Batch",
    "Gradient",
    "TrainingStage",
    "attended_tokens",
    "global_norm",
    "local_batch_rows",
    "response_mask",
    "response_weights",
    "row_means",
    "same_dropout",
    "token_losses",
    "weighted",
]


@dataclass(frozen=True)
class SeparateRun:
    """A request for plain supervised fine-tuning, separate from the steps of a stage."""

    purpose: str
    """Name of the run; its random numbers depend on it."""
    rows: Sequence[Example]
    """The training examples."""
    start: Adapter | None = None
    """The adapter to continue from; None: a new adapter."""
    steps: int | None = None
    """Number of optimizer steps; None: the epochs of the stage's settings."""
    on_base: bool = False
    """True: on the base model instead of the model that the stage started from."""


def _no_nested(stage: TrainingStage, run: SeparateRun) -> Adapter:
    raise RuntimeError("This TrainingStage cannot run nested training: pass `nested` when creating it.")


def no_judge(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Raise RuntimeError: no defense of the stage declares a judge."""
    raise RuntimeError("No defense of this TrainingStage declares a judge: return its name from `Defense.guard`.")


def _no_decode(ids: Sequence[int]) -> str:
    raise RuntimeError("This TrainingStage cannot decode tokens: pass `decode` when creating it.")


@dataclass
class TrainingStage(RowStreams):
    """A training stage: the argument of every hook.

    With several ranks, a hook sees only the rows of its rank. A loss is then this rank's share: the sum over ranks is
    the loss of the micro-batch, and every `Gradient` is the gradient of the complete micro-batch. If a defense sums
    over rows itself, it passes the sum through `sum_over_ranks` or `norm`. Passes over `batches` run in full on every
    rank.
    """

    name: StageName
    stack: LoraStack
    trainable: Mapping[str, nn.Parameter]
    seed: int
    settings: TrainSettings = field(default_factory=lambda: TrainSettings(lr=0.0, epochs=0.0, batch=1))
    pools: Pools = field(default_factory=Pools)
    below: tuple[Path, ...] = ()
    """The frozen adapters under the trained one."""
    start: Path | None = None
    """The adapter that training continues from; None: training starts from a zero adapter."""
    encode: Encode = no_encode
    """Converts examples to token rows as this stage trains on them."""
    nested: Callable[[TrainingStage, SeparateRun], Adapter] = _no_nested
    """Runs the training of `train_separately`."""
    judge: Callable[[Sequence[tuple[str, str]]], list[Verdict]] = no_judge
    """The judge that a defense of the stage declares (`Defense.guard`); its readings are cached."""
    decode: Callable[[Sequence[int]], str] = _no_decode
    """Converts token ids to text."""
    keeps_order: bool = False
    """True: every epoch has the rows in their order, instead of a new shuffle."""
    pad: int = 0
    """Id of the padding token."""
    rows: Sequence[Encoded] = ()
    """The rows that the stage trains on."""
    step: int = 0
    """The current optimizer step, from 1; 0 before the first."""
    steps: int = 0
    """The number of optimizer steps of the stage."""
    micro: int = 0
    """The current micro-batch of the step, from 0."""

    @property
    def model(self) -> nn.Module:
        """The model with the adapter that is being trained or edited."""
        return self.stack.model

    # -- losses and gradients

    def output(self, batch: Batch, **options: Any) -> Any:
        """Run the model on a batch whose rows are padded on the right.

        Args:
            batch: The batch; its labels, and its weights if it has any, define `loss`.
            **options: Arguments of the model's forward pass, such as `output_hidden_states=True`.

        Returns:
            The model's output, with `loss` (see `loss`), and with `logits` at the positions of `response_mask`
            (response tokens x vocabulary).
        """
        ids, base = batch["input_ids"], self.stack.base
        rows, positions = response_mask(batch).nonzero(as_tuple=True)
        places = rows * ids.shape[1] + positions
        packing = Packing(batch["attention_mask"]) if can_pack(base) and not options else None
        if packing and packing.share >= FEWEST_PADS:
            with packed(base, packing), logits_at(base, packing.numbers[places]):
                output = self.model(input_ids=packing.pack(ids), position_ids=packing.positions, use_cache=False)
        else:  # without a mask: a token attends only to tokens before it, so never to padding on its right
            with logits_at(base, places):
                output = self.model(input_ids=ids, use_cache=False, **options)
        losses = token_losses(output.logits, batch)
        if "weights" in batch:
            losses = losses * response_weights(batch)
        output.loss = losses.sum() / self.sum_over_ranks(losses.new_full((), len(losses)))
        return output

    def loss(self, batch: Batch) -> Tensor:
        """Return L(w; B), the mean cross-entropy over the response tokens of a batch.

        With several ranks this is the rank's share: the sum over ranks is the mean.
        """
        loss: Tensor = self.output(batch).loss
        return loss

    def gradient(self, batch: Batch) -> Gradient:
        """Return the gradient of L(w; B). It does not change the `.grad` of the parameters, which the trainer uses."""
        return self.gradient_of(self.loss(batch))

    def gradient_of(self, loss: Tensor) -> Gradient:
        """Return the gradient of any loss, summed over ranks.

        Args:
            loss: A scalar with a graph.

        Returns:
            The gradient: zeros for a parameter that the loss does not depend on, None for a frozen one.
        """
        free = [parameter for parameter in self.trainable.values() if parameter.requires_grad]
        local = torch.autograd.grad(loss, free, materialize_grads=True, allow_unused=True)
        total_loss, *sums = distributed.sum_all_over_ranks([loss, *local])
        values = iter(sums)
        return Gradient(total_loss, [next(values) if p.requires_grad else None for p in self.trainable.values()])

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a value over all ranks, without a graph."""
        return distributed.sum_over_ranks(value)

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of all tensors as one vector, over the rows of all ranks: a float32 scalar."""
        local = global_norm(tensors)
        return local if distributed.world_size() == 1 else distributed.sum_over_ranks(local.square()).sqrt()

    # -- parameters

    @property
    def factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Module -> (A, B) of the adapter that is being trained: trainable parameters; empty in full fine-tuning."""
        factors = {}
        for name, parameter in self.trainable.items():
            if ".lora_A." in name:
                b = self.trainable[name.replace(".lora_A.", ".lora_B.")]
                factors[name.removeprefix(ADAPTED_PREFIX).partition(".lora_A.")[0]] = (parameter, b)
        return factors

    def values(self) -> list[Tensor]:
        """Return a copy of the trainable parameters, in their order."""
        return [parameter.detach().clone() for parameter in self.trainable.values()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the exact values of the trainable parameters after the block."""
        original = self.values()
        try:
            yield
        finally:
            self.set_values(original)

    @contextmanager
    def shifted(self, shifts: Sequence[Tensor | None]) -> Iterator[None]:
        """Add `shifts` to the trainable parameters inside the block, then restore the exact values.

        Args:
            shifts: One tensor per trainable parameter, in their order; None: no shift.
        """
        with self.restored():
            with torch.no_grad():
                for parameter, shift in zip(self.trainable.values(), shifts, strict=True):
                    if shift is not None:
                        parameter.add_(shift)
            yield

    @contextmanager
    def moved_to(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Set the trainable parameters to `values` inside the block, then restore the exact earlier values."""
        with self.restored():
            self.set_values(values)
            yield

    @torch.no_grad()
    def set_values(self, values: Sequence[Tensor]) -> None:
        """Set the trainable parameters to copies of `values`, one tensor per parameter, in their order."""
        for parameter, value in zip(self.trainable.values(), values, strict=True):
            parameter.copy_(value)

    def replace_adapter(self, adapter: Adapter) -> None:
        """Replace the trained adapter by a copy of `adapter`."""
        training = self.model.training
        self.trainable = self.stack.train(self.below, self.settings, self.seed, adapter)
        self.model.train(training)

    # -- other models

    @property
    def origin(self) -> tuple[Path, ...]:
        """The adapters of the model that the stage started from: in the repair stage, of the aligned model."""
        return (*self.below, self.start) if self.start else self.below

    def reference(self) -> AbstractContextManager[None]:
        """Run the model that the stage started from inside the block, without dropout and without a graph."""
        return self.stack.temporarily(self.origin)

    def alignment_adapter(self) -> Adapter | None:
        """Return the adapter that alignment added to the base model, or None if the model is not aligned."""
        return concatenate([Adapter.load(path) for path in self.origin]) if self.origin else None

    def train_separately(
        self,
        purpose: str,
        rows: Sequence[Example],
        *,
        start: Adapter | None = None,
        steps: int | None = None,
        on_base: bool = False,
    ) -> Adapter:
        """Run plain supervised fine-tuning as a separate run, which is stored and resumed as an artifact.

        Args:
            purpose: Name of the run; its random numbers depend on it.
            rows: The training examples.
            start: The adapter to continue from; None: a new adapter on the model that the stage started from.
            steps: Number of optimizer steps; None: the epochs of the stage's settings.
            on_base: Train a new adapter on the base model instead of the model that the stage started from.

        Returns:
            The trained adapter. The stage's adapter does not change.

        Raises:
            BadInput: `rows` is empty.
            RuntimeError: The stage was created without `nested`.
        """
        if not rows:
            raise self._no_rows()
        training = self.model.training
        try:
            return self.nested(self, SeparateRun(purpose, rows, start, steps, on_base))
        finally:
            self.model.train(training)

    # -- inside the model

    @cached_property
    def taps(self) -> Taps:
        """Taps on the outputs of the attention blocks."""
        return self.taps_on("attention")

    def taps_on(self, place: TapPlace) -> Taps:
        """Return taps on the outputs of the attention blocks, the MLPs or the decoder layers."""
        if place not in self._taps:
            self._taps[place] = Taps(self.model, place, lambda: self.trainable.values())
        return self._taps[place]

    @cached_property
    def _taps(self) -> dict[TapPlace, Taps]:
        return {}

    @contextmanager
    def module_inputs(self, modules: Iterable[str], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `callback(module, x)` with the input of each module in every forward pass inside the block.

        Args:
            modules: Names of modules of the base model.
            callback: Receives the module's name and its input x (rows x length x inputs).
        """

        def read(name: str, x: Tensor) -> None:
            packing = current_packing()
            callback(name, packing.pad(x) if packing else x)

        handles = [
            self.stack.base.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: read(name, args[0])
            )
            for name in modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @cached_property
    def layers(self) -> list[int | None]:
        """The decoder layer of each trainable parameter, counted from 0; None outside the layers."""
        return layer_numbers(self.model, list(self.trainable.values()))

    # -- randomness

    @contextmanager
    def isolated(self, purpose: str) -> Iterator[None]:
        """Run work outside the optimizer steps: without dropout and with separate random numbers.

        The random numbers of the steps do not change.

        Args:
            purpose: Name of the work; its random numbers depend on it.
        """
        training = self.model.training
        with forked_rng():
            torch.manual_seed(derive_seed(self.seed, purpose))
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(training)

    def generator(self, purpose: str, *, per_rank: bool = False) -> torch.Generator:
        """Return a separate random generator on the CPU: drawing from it does not change batches or dropout masks.

        The same purpose in the same micro-batch gives the same numbers, also after an interruption.

        Args:
            purpose: Name of the generator; its numbers depend on it.
            per_rank: False: the same numbers on all ranks. True: different numbers on each rank, for noise on rows,
                because each rank has other rows.
        """
        rank = [distributed.rank()] if per_rank and distributed.rank() else []
        return torch.Generator().manual_seed(derive_seed(self.seed, self.name, purpose, self.step, self.micro, *rank))


def attended_tokens(batch: Batch) -> Tensor:
    """Return the mask of tokens that are not padding, in rows with labels (rows x length, bool)."""
    return batch["attention_mask"].bool() & (batch["labels"] != IGNORED).any(1, keepdim=True)
