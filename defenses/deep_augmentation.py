"""Deep augmentation: refuse also after the beginning of a harmful answer. Qi et al., ICLR 2025, arXiv 2406.05946.

`triples` triples (harmful prompt x, harmful answer h, refusal r) join the alignment rows. At each visit of a triple, a
coin with probability p decides what the model is trained on:

    heads:  x + the first k tokens of h + r       k ~ U{1, ..., min(longest, |h|)}; labels on r only; |h|: tokens
    tails:  x + r

The loss is the mean over all response tokens of a batch, so the alignment rows act as the anchor of the paper; with
ordinary instructions among them (`align.instructions`) they are that anchor. Cost of a step: 1 forward, 1 backward.

Departures from the authors' code (Unispac/shallow-vs-deep-alignment): the anchor is the protocol's rows (theirs is a
second batch from Alpaca, four times as large as that of triples); the optimizer settings are the protocol's; the
response of a row is found by its labels (theirs searches for token ids of a template, and a row without them has no
loss); the token that ends h is not part of h, because r follows in the middle of an answer; k is at most the room that
`max_length` leaves, so that r is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr

from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.plugins import Defense, Example, Pools, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, TrainingStage


class DeepAugmentation(Defense):
    """Alignment on refusals that follow the beginning of a harmful answer."""

    citation: ClassVar[str] = "arXiv 2406.05946"
    data: ClassVar[tuple[str, ...]] = ("paired safe and harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"triples": 0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("triples")

    triples: int = param(256, "number of triples", source="paper, section 3.1", main=True, ge=0)
    p: float = param(0.5, "probability of a harmful beginning", source="paper, section 3.1", ge=0, le=1)
    longest: int = param(100, "largest number of tokens of the harmful beginning", source="paper, section 3.1", ge=1)

    _harmful: dict[str, list[int]] = PrivateAttr(default_factory=dict)

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the alignment rows with the refusals of the triples, shuffled."""
        if not self.triples:
            return rows
        triples = self.draw("pairs", pools.paired, self.triples)
        mixed = [*rows, *(replace(refusal, id=_triple_id(refusal)) for refusal, _ in triples)]
        self.random("mix").shuffle(mixed)
        return mixed

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        """Return the batch with the harmful beginnings of this visit."""
        if not self.triples:
            return batch
        if not self._harmful:
            self._harmful = self._harmful_answers(stage)
        generator = stage.generator("beginnings")
        rows = [stage.rows[number] for number in batch["rows"].tolist()]
        visited = [self._visited(row, stage.settings.max_length, generator) for row in rows]
        return {**stage.collated(visited), "rows": batch["rows"]}

    def _visited(self, row: Encoded, max_length: int, generator: torch.Generator) -> Encoded:
        heads, place = torch.rand(2, generator=generator).tolist()
        answer = self._harmful.get(row.id, [])
        longest = min(self.longest, len(answer), max_length - len(row.ids))
        if heads >= self.p or longest < 1:
            return row
        beginning = answer[: 1 + int(place * longest)]
        start = row.response_start
        return replace(
            row,
            ids=[*row.ids[:start], *beginning, *row.ids[start:]],
            labels=[*row.labels[:start], *[IGNORED] * len(beginning), *row.labels[start:]],
        )

    def _harmful_answers(self, stage: TrainingStage) -> dict[str, list[int]]:
        """Return id of a triple -> the tokens of its harmful answer, without the token that ends it."""
        harmful = {row.id: row for row in stage.encode(stage.pools.harmful)}
        answers = {}
        for refusal, example in stage.pools.paired:
            if example.id in harmful:
                row = harmful[example.id]
                answers[_triple_id(refusal)] = row.labeled_ids[:-1]
        return answers


def _triple_id(refusal: Example) -> str:
    return f"deep_augmentation:{refusal.id}"
