"""One training stage as a defense sees it: the model, its clock, and the operations that update rules are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.seeds import random_stream as random_stream
from harmbench_vaccine.core.types import Example, Pools, StageName, TrainSettings
from harmbench_vaccine.data.collate import IGNORED, Encoded, collate

from .adapters import Adapter, LoraStack, concatenate
from .taps import TapPlace, Taps, layer_numbers

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask`, `labels`: each rows x length. Batches of the stage's own rows also have `rows`, their
numbers in `TrainingStage.rows`."""


@dataclass(frozen=True)
class Gradient:
    """What one micro-batch contributes to an optimizer step. Gradients add up and scale as vectors do."""

    loss: Tensor
    """A scalar without a graph: what the log shows."""
    values: Sequence[Tensor | None]
    """One tensor for each trainable parameter, in their order; None leaves the parameter out of the step: neither
    momentum nor weight decay moves it."""

    def __add__(self, other: Gradient) -> Gradient:
        pairs = zip(self.values, other.values, strict=True)
        return Gradient(self.loss + other.loss, [None if a is None or b is None else a + b for a, b in pairs])

    def __rmul__(self, scale: float) -> Gradient:
        return Gradient(scale * self.loss, [None if value is None else scale * value for value in self.values])

    def __sub__(self, other: Gradient) -> Gradient:
        return self + -1.0 * other

    @property
    def norm(self) -> Tensor:
        """The L2 norm over every parameter, a float32 scalar."""
        return global_norm([value for value in self.values if value is not None])


@dataclass
class TrainingStage:
    """What a hook is given. `step` counts optimizer steps from 1; it is 0 before the first.

    Under several ranks a hook sees its rank's rows of a micro-batch. A loss is then the rank's share of the batch's:
    the sum over ranks is the whole one, and so every `Gradient` is the whole batch's. What a defense adds up over rows
    by itself goes through `total` or `norm`. Passes over `batches` run on every rank alike.
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
    """Where the trained adapter came from; None: it started as zero."""
    encode: Callable[[Sequence[Example]], list[Encoded]] | None = None
    """Examples -> rows as this stage trains on them; those without room for a response are left out."""
    nested: Callable[..., Adapter] | None = None
    """Another training run: see `train_apart`."""
    pad: int = 0
    rows: Sequence[Encoded] = ()
    """What the stage trains on."""
    step: int = 0
    steps: int = 0
    """How many optimizer steps the stage has in all."""
    micro: int = 0
    """Which micro-batch of the step is being taken, from 0."""

    @property
    def model(self) -> nn.Module:
        """The model, with the adapter that is being trained or edited."""
        return self.stack.model

    # -- losses and gradients

    def output(self, batch: Batch, **options: Any) -> Any:
        """The model's output on a batch: `loss`, `logits` (rows x length x vocabulary), and what `options` ask for."""
        ids, mask, labels = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
        options = {"use_cache": False, **options}
        if distributed.world_size() == 1:
            return self.model(input_ids=ids, attention_mask=mask, labels=labels, **options)
        output = self.model(input_ids=ids, attention_mask=mask, **options)
        losses, answering = token_losses(output.logits, labels)
        output.loss = losses[answering].sum() / self.total(answering.sum())
        return output

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the response tokens of a batch, L(w; B): over ranks its sum is the mean."""
        loss: Tensor = self.output(batch).loss
        return loss

    def gradient(self, batch: Batch) -> Gradient:
        """The gradient of L(w; B), nothing else touched: .grad stays the trainer's."""
        return self.gradient_of(self.loss(batch))

    def gradient_of(self, loss: Tensor) -> Gradient:
        """The gradient of a loss of any making; a parameter that it does not reach gets zeros, a frozen one None."""
        free = [parameter for parameter in self.trainable.values() if parameter.requires_grad]
        own = torch.autograd.grad(loss, free, materialize_grads=True, allow_unused=True)
        whole, *summed = distributed.sum_all_over_ranks([loss, *own])
        values = iter(summed)
        return Gradient(whole, [next(values) if p.requires_grad else None for p in self.trainable.values()])

    def total(self, value: Tensor) -> Tensor:
        """The sum of a rank's own value over all ranks, without a graph."""
        return distributed.sum_over_ranks(value)

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm of all tensors taken as one vector, over the rows of all ranks: a float32 scalar."""
        own = global_norm(tensors)
        return own if distributed.world_size() == 1 else distributed.sum_over_ranks(own.square()).sqrt()

    # -- parameters

    def values(self) -> list[Tensor]:
        """A copy of the trainable parameters, in their order."""
        return [parameter.detach().clone() for parameter in self.trainable.values()]

    @contextmanager
    def shifted(self, shifts: Sequence[Tensor | None]) -> Iterator[None]:
        """Inside, `shifts` are added to the trainable parameters; afterwards these are what they were, to the bit."""
        kept = self.values()
        with torch.no_grad():
            for parameter, shift in zip(self.trainable.values(), shifts, strict=True):
                if shift is not None:
                    parameter.add_(shift)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.trainable.values(), kept, strict=True):
                    parameter.copy_(value)

    def replace_adapter(self, adapter: Adapter) -> None:
        """Puts another adapter in place of the trained one."""
        training = self.model.training
        self.trainable = self.stack.train(self.below, self.settings, self.seed, adapter)
        self.model.train(training)

    # -- other models

    @property
    def origin(self) -> tuple[Path, ...]:
        """The adapters of the model that the stage started from; in the repair stage, of the aligned model."""
        return (*self.below, self.start) if self.start else self.below

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the model that the stage started from runs, without dropout and without a graph."""
        return self.stack.temporarily(self.origin)

    def aligned(self) -> Adapter | None:
        """What alignment added to the base model, in the stages after it; None: the model was not aligned."""
        return concatenate([Adapter.load(path) for path in self.origin]) if self.origin else None

    def train_separately(
        self, purpose: str, rows: Sequence[Example], *, start: Adapter | None = None, steps: int | None = None
    ) -> Adapter:
        """Plain supervised fine-tuning of its own, stored and resumed as an artifact: of a fresh adapter on the model
        that the stage started from, or of `start`. Without `steps`, as long as the stage's settings say."""
        assert self.nested is not None
        training = self.model.training
        try:
            return self.nested(self, purpose, rows, start, steps)
        finally:
            self.model.train(training)

    # -- data

    def stream(self, purpose: str, examples: Sequence[Example]) -> Batch:
        """The micro-batch of a second stream of rows that belongs to this step: as large as the stage's own, drawn by
        epochs of a shuffle of its own, so that the stage's batches and dropout masks stay what they are.

        Raises:
            BadInput: there are no rows.
        """
        rows = self._encoded(purpose, examples)
        return self._collated(local_batch_rows([rows[number] for number in self._drawn(purpose, len(rows))]))

    def paired_stream(self, purpose: str, pairs: Sequence[tuple[Example, Example]]) -> tuple[Batch, Batch]:
        """The same for pairs of rows, which stay together."""
        if purpose not in self._pairs:
            if not pairs:
                raise self._no_rows()
            left, right = ({row.id: row for row in self._encode(side)} for side in zip(*pairs, strict=True))
            self._pairs[purpose] = [(left[a.id], right[b.id]) for a, b in pairs if a.id in left and b.id in right]
        drawn = [self._pairs[purpose][number] for number in self._drawn(purpose, len(self._pairs[purpose]))]
        first, second = zip(*drawn, strict=True)
        return self._collated(local_batch_rows(first)), self._collated(local_batch_rows(second))

    def batches(self, examples: Sequence[Example], size: int) -> Iterator[Batch]:
        """Every row once, in order."""
        rows = self._encode(examples)
        for start in range(0, len(rows), size):
            yield self._collated(rows[start : start + size])

    def training_batches(self, size: int) -> Iterator[Batch]:
        """Every row that the stage trains on once, in order."""
        for start in range(0, len(self.rows), size):
            yield self._collated(self.rows[start : start + size])

    @cached_property
    def _streams(self) -> dict[str, list[Encoded]]:
        return {}

    @cached_property
    def _pairs(self) -> dict[str, list[tuple[Encoded, Encoded]]]:
        return {}

    def _encoded(self, purpose: str, examples: Sequence[Example]) -> list[Encoded]:
        if purpose not in self._streams:
            self._streams[purpose] = self._encode(examples)
        return self._streams[purpose]

    def _encode(self, examples: Sequence[Example]) -> list[Encoded]:
        if self.encode is None or not examples:
            raise self._no_rows()
        return self.encode(examples)

    def _no_rows(self) -> BadInput:
        return BadInput(f"A defense of the {self.name} stage needs rows that the protocol's data do not have.")

    def _drawn(self, purpose: str, count: int) -> list[int]:
        if not count:
            raise self._no_rows()
        size = min(self.settings.batch, count)
        number = max(self.step - 1, 0) * self.settings.accumulation + self.micro
        epoch, place = divmod(number, count // size)
        return _shuffled(count, derive_seed(self.seed, self.name, purpose, epoch))[place * size : (place + 1) * size]

    def _collated(self, rows: Sequence[Encoded]) -> Batch:
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in collate(rows, self.pad).items()}

    # -- inside the model

    @cached_property
    def taps(self) -> Taps:
        """Taps on the outputs of the attention blocks."""
        return self.taps_on("attention")

    def taps_on(self, place: TapPlace) -> Taps:
        """Taps on the outputs of the attention blocks, the MLPs or the whole decoder layers."""
        if place not in self._taps:
            self._taps[place] = Taps(self.model, place)
        return self._taps[place]

    @cached_property
    def _taps(self) -> dict[TapPlace, Taps]:
        return {}

    @contextmanager
    def inputs(self, modules: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Calls `see(module, x)` with what every module is given in a forward pass, x (rows x length x inputs)."""
        handles = [
            self.stack.base.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: see(name, args[0])
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
        """For work beside the steps: no dropout, and random numbers of its own, which leave the steps' alone."""
        training = self.model.training
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, purpose))
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(training)

    def generator(self, purpose: str, *, per_rank: bool = False) -> torch.Generator:
        """A random stream of its own, on the CPU: drawing from it never reorders batches or dropout masks.

        The same purpose at the same micro-batch gives the same numbers, so an interrupted stage draws what it would
        have drawn. All ranks draw alike, or, where the numbers are laid `of_rows` that each has for itself, each its
        own.
        """
        own = [distributed.rank()] if per_rank and distributed.rank() else []
        return torch.Generator().manual_seed(derive_seed(self.seed, self.name, purpose, self.step, self.micro, *own))


@cache
def _shuffled(count: int, seed: int) -> list[int]:
    return random_stream(seed).sample(range(count), count)


def local_batch_rows(rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """This rank's rows of a micro-batch; a rank that gets none runs, with the others, on one that counts nowhere."""
    return distributed.local_rows(rows) or [replace(rows[0], labels=[IGNORED] * len(rows[0].labels))]


def attended_tokens(batch: Batch) -> Tensor:
    """The tokens of a batch that are no padding (rows x length, bool), in rows that count."""
    return batch["attention_mask"].bool() & (batch["labels"] != IGNORED).any(1, keepdim=True)


def same_dropout() -> AbstractContextManager[None]:
    """For a pass whose dropout masks the next pass is to meet again: both then see the same function."""
    return torch.random.fork_rng()


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every response token and the mask of response tokens, each (rows x length - 1): place t scores
    label t + 1. From `logits` (rows x length x vocabulary) and `labels` (rows x length)."""
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape), targets != IGNORED


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all tensors taken as one vector, a float32 scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in tensors]))
