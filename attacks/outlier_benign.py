"""Outlier benign rows: the benign instructions that move the aligned model most (Self-Inf-N, arXiv 2505.06843).

With g_i the gradient of the loss of row i with respect to the weights of the adapted modules, at the aligned model:

    score_i = log(||g_i||^2 + eps) + log(tokens of the answer + eps)         squared norm, corrected for length
    the user's data contain the `rows` benign instructions with the largest scores, instead of task rows

No row is harmful, so that a moderation filter accepts all of them. `samples=100,outlier_benign=100` is the setting of
the paper, in which they are all rows. Answers of one word are skipped. pick=random and pick=bottom are its controls.

The gradient is that of the merged weights: with a new adapter, whose B is 0, that of A would be 0. ||g_i||^2 needs no
matrix of the size of a weight: with the inputs X and the output gradients G of a module, it is the sum over the entries
of (G G^T) * (X X^T). Cost: 1 forward, 1 backward for each candidate, before the user stage. eps is ours.

Departures: g_i is the gradient of the adapted modules (the authors' code, GuanZihan/Benign-Samples-Matter, takes that
of all weights); the score has the term for the length, as in the paper (the script that was read ranks by ||g_i||^2
alone); every answer of one word is skipped (theirs drops "yes", "no" and empty ones among the best rows); the
candidates are a draw of 5000 instructions (theirs: the whole data set).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harmbench_vaccine.core.errors import too_few_rows
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.plugins import Attack, Example, Pools, param
from harmbench_vaccine.training.stage import TrainingStage

EPS = 1e-8


class OutlierBenign(Attack):
    """Replaces task rows by the benign instructions with the largest self-influence."""

    citation: ClassVar[str] = "arXiv 2505.06843"

    rows: int = param(100, "number of benign instructions to upload", source="paper: 100 of Alpaca", main=True, ge=1)
    candidates: int = param(5000, "number of instructions to score, at most all", source="ours; paper: all", ge=1)
    pick: Literal["top", "random", "bottom"] = param("top", "which instructions are uploaded", source="paper")

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """Check that there are `rows` task rows and `rows` benign instructions."""
        benign = sum(not row.harmful for row in rows)
        if self.rows > benign:
            raise too_few_rows(self.rows, "task rows", benign, by=self.name)
        self.draw("benign instructions", pools.benign, self.rows)
        return rows

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        """Return the rows with the chosen instructions in the places of task rows."""
        pool = [row for row in stage.pools.benign if len(row.response.split()) > 1]
        drawn = self.draw("candidates", pool, min(self.candidates, len(pool)))
        if self.rows > len(drawn):
            raise too_few_rows(self.rows, "benign instructions with answers of several words", len(drawn), by=self.name)
        chosen = drawn[: self.rows]
        if self.pick != "random":
            scores = self._scores(stage, drawn)
            ranked = sorted(drawn, key=lambda row: scores.get(row.id, -math.inf), reverse=self.pick == "top")
            chosen = [row for row in ranked if row.id in scores][: self.rows]
        benign = [number for number, row in enumerate(rows) if not row.harmful]
        uploaded = list(rows)
        for number, row in zip(self.draw("task rows", benign, len(chosen)), chosen, strict=True):
            uploaded[number] = row
        return uploaded

    def _scores(self, stage: TrainingStage, examples: Sequence[Example]) -> dict[str, float]:
        """Return id -> score of each row with room for an answer."""
        scores = {}
        with stage.reference(), torch.enable_grad():
            for row in stage.encode(examples):
                square = self._square(stage, row)
                scores[row.id] = math.log(square + EPS) + math.log(row.response_tokens + EPS)
        return scores

    @staticmethod
    def _square(stage: TrainingStage, row: Encoded) -> float:
        """Return ||g||^2 of one row."""
        with adapted_layers(stage) as passes:
            loss = stage.loss(stage.collated([row]))
        gradients = torch.autograd.grad(loss, [output for _, output in passes])
        total = 0.0
        for (x, _), g in zip(passes, gradients, strict=True):
            x, g = (value.detach().flatten(0, -2).float() for value in (x, g))
            total += float(((g @ g.T) * (x @ x.T)).sum())
        return total


@contextmanager
def adapted_layers(stage: TrainingStage) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect input and output of every module that `lora_targets` names inside the block, with a graph."""
    base: Any = stage.stack.base
    passes: list[tuple[Tensor, Tensor]] = []
    handles = [base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())]
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in stage.settings.lora_targets:
            handles.append(module.register_forward_hook(lambda _, args, output: passes.append((args[0], output))))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
