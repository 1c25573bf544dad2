"""The rows of a training stage: data streams next to its own batches, and rows as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.seeds import derive_seed, random_stream
from harmbench_vaccine.core.types import Example, StageName, TrainSettings
from harmbench_vaccine.data.collate import IGNORED, Encoded, collate

from .gradient import Batch

Encode = Callable[[Sequence[Example]], list[Encoded]]
"""Examples -> token rows of a stage; examples without room for a response are skipped."""


def no_encode(examples: Sequence[Example]) -> list[Encoded]:
    """Raise RuntimeError: the stage was created without `encode`."""
    raise RuntimeError("This TrainingStage cannot encode examples: pass `encode` when creating it.")


class RowStreams:
    """The part of `TrainingStage` that draws and converts rows."""

    name: StageName
    seed: int
    settings: TrainSettings
    rows: Sequence[Encoded]
    encode: Encode
    pad: int
    step: int
    micro: int

    @property
    def model(self) -> nn.Module:
        """The model of the stage."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def stream(self, purpose: str, examples: Sequence[Example]) -> Batch:
        """Return the micro-batch of a second data stream for the current step.

        It has the size of the stage's micro-batches. A separate shuffle per epoch draws it, so the stage's batches and
        dropout masks do not change.

        Args:
            purpose: Name of the stream; its random numbers depend on it.
            examples: The rows of the stream.

        Raises:
            BadInput: `examples` is empty.
        """
        rows = self.encoded(purpose, examples)
        return self.collated(local_batch_rows([rows[number] for number in self._draw(purpose, len(rows))]))

    def encoded(self, purpose: str, examples: Sequence[Example]) -> Sequence[Encoded]:
        """Return the rows of a stream as tokens; they are encoded once.

        Args:
            purpose: Name of the stream.
            examples: The rows of the stream, at the first call.

        Raises:
            BadInput: `examples` is empty.
        """
        if purpose not in self._streams:
            self._streams[purpose] = self._encode(examples)
        return self._streams[purpose]

    def paired_stream(self, purpose: str, pairs: Sequence[tuple[Example, Example]]) -> tuple[Batch, Batch]:
        """Return the micro-batches of two data streams whose rows form pairs; see `stream`."""
        if purpose not in self._pairs:
            if not pairs:
                raise self._no_rows()
            left, right = ({row.id: row for row in self._encode(side)} for side in zip(*pairs, strict=True))
            self._pairs[purpose] = [(left[a.id], right[b.id]) for a, b in pairs if a.id in left and b.id in right]
        batch = [self._pairs[purpose][number] for number in self._draw(purpose, len(self._pairs[purpose]))]
        first, second = zip(*batch, strict=True)
        return self.collated(local_batch_rows(first)), self.collated(local_batch_rows(second))

    def batches(self, examples: Sequence[Example], size: int) -> Iterator[Batch]:
        """Yield every example once, in order, in batches of `size` rows."""
        rows = self._encode(examples)
        for start in range(0, len(rows), size):
            yield self.collated(rows[start : start + size])

    def training_batches(self, size: int) -> Iterator[Batch]:
        """Yield every training row of the stage once, in order, in batches of `size` rows."""
        for start in range(0, len(self.rows), size):
            yield self.collated(self.rows[start : start + size])

    @cached_property
    def _streams(self) -> dict[str, list[Encoded]]:
        return {}

    @cached_property
    def _pairs(self) -> dict[str, list[tuple[Encoded, Encoded]]]:
        return {}

    @cached_property
    def _shuffles(self) -> dict[tuple[int, int], list[int]]:
        return {}

    def _encode(self, examples: Sequence[Example]) -> list[Encoded]:
        if not examples:
            raise self._no_rows()
        return self.encode(examples)

    def _no_rows(self) -> BadInput:
        return BadInput(
            f"A defense of the {self.name} stage needs rows that the protocol's data do not contain: "
            "choose a protocol with such rows, or another defense."
        )

    def _draw(self, purpose: str, count: int) -> list[int]:
        if not count:
            raise self._no_rows()
        size = min(self.settings.batch, count)
        number = max(self.step - 1, 0) * self.settings.accumulation + self.micro
        epoch, place = divmod(number, count // size)
        shuffle = (count, derive_seed(self.seed, self.name, purpose, epoch))
        if shuffle not in self._shuffles:  # every micro-batch of an epoch uses the same shuffle
            self._shuffles[shuffle] = random_stream(shuffle[1]).sample(range(count), count)
        return self._shuffles[shuffle][place * size : (place + 1) * size]

    def collated(self, rows: Sequence[Encoded]) -> Batch:
        """Return rows as a batch on the device of the model."""
        return {name: value.to(self.device) for name, value in collate(rows, self.pad).items()}


def local_batch_rows(rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """Return this rank's rows of a micro-batch.

    All ranks must run the model together, so a rank without rows gets one row without labels, which does not count.
    """
    return distributed.local_rows(rows) or [replace(rows[0], labels=[IGNORED] * len(rows[0].labels))]
