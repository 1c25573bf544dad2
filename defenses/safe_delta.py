"""Safe Delta: take a part of the user's update, and compensate for it. Lu et al., ICML 2025, arXiv 2505.12038.

With W the aligned weights of a module, W_u those after the user stage, and x the module's inputs of the aligned model
on N safe rows:

    H = 2/N sum over rows and tokens of x x^T,   H <- H + 0.01 mean(diag H) I
    U = upper Cholesky factor of H^-1,  u_m = U_mm

For each block of columns, the entries (i, m) are sorted by 1 / u_m^2. The last 15% are not taken. The others are taken
in this order while the running sum of (W_u - W)_im^2 / u_m^2 is at most

    s * (mean of 1 / u_m^2 over the block) * outputs of W / 4096 * columns of the block / 4096

Column by column, a taken entry is q = W_u, another one q = W, and later columns are compensated, as in SparseGPT:
W_{m+1..} <- W_{m+1..} - (W_m - q) / u_m * U_{m, m+1..}, also before the next block is sorted. The new W replaces W_u.
s = 0 gives the aligned model. No value of s gives the user's model, because 15% are never taken.

Cost: one forward pass of the N rows for each layer, a Cholesky factor of inputs x inputs for each module. In a block,
all entries of a column are taken, or none, except in one column: the rank of the result is at most the rank of the
user's update plus the number of blocks. A smaller `rank` gives the best approximation of this rank.

Departures: safe rows are the defender's refusals (theirs: answers of the model, in four templates); entries of one
column are taken row by row (theirs: in any order); columns are compensated one at a time (theirs: four at a time,
without the terms between them); the limit scales with the columns of a block (theirs: a constant for each block); for
an input that is always 0, the diagonal of H is the damping (theirs: 1).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.taps import decoder_layers

BLOCK, NEVER_TAKEN, REFERENCE = 2048, 0.15, 4096
"""Columns of a block, share of its entries that are not taken, and width of the matrices that s refers to."""


class SafeDelta(Defense):
    """The part of the user's update that costs little safety, with a compensation."""

    citation: ClassVar[str] = "arXiv 2505.12038"
    stages: ClassVar[tuple[StageName, ...]] = ("repair",)
    needs_adapter: ClassVar[bool] = True
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "1F of the safe rows for each layer"
    memory: ClassVar[str] = "one matrix of inputs x inputs for each module of a layer"
    data: ClassVar[tuple[str, ...]] = ("refusals",)
    grid: ClassVar[TuningGrid | None] = TuningGrid("s")

    s: float = param(0.1, "limit of the safety cost", source="authors' run_safedelta.py", main=True, ge=0)
    rows: int = param(128, "N, number of safe rows", source="authors' run_safedelta.py", ge=1)
    damping: float = param(0.01, "share of mean(diag H) that is added", source="authors' safedelta_runner.py", gt=0)
    rank: int | None = param(None, "largest rank of the result; none: exact", source="ours", ge=1)

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the part of the update, exactly or as its best approximation of the rank `rank`."""
        pairs = stage.pools.paired
        drawn = self.draw("safe rows", pairs, max(1, min(self.rows, len(pairs))))
        rows, factors = stage.encode([refusal for refusal, _ in drawn]), {}
        exact = adapter.rank + max(math.ceil(a.shape[1] / BLOCK) for a, _ in adapter.factors.values())
        rank = min(self.rank or exact, exact)
        for modules in _by_layer(stage.stack.base, adapter):
            for module, second_moment in self._second_moments(stage, rows, modules).items():
                inverse = inverse_factor(second_moment, self.damping)
                a, b = (factor.to(inverse) for factor in adapter.factors[module])  # float64: errors have full rank
                mixtures = torch.randn(a.shape[1], exact, generator=stage.generator(module)).to(inverse)
                a, b = factorized(partial_update(adapter.scale * b @ a, inverse, self.s), mixtures, rank)
                factors[module] = a.float().cpu(), b.float().cpu()
        return Adapter(factors, 1.0)

    def _second_moments(self, stage: TrainingStage, rows: list[Encoded], modules: list[str]) -> dict[str, Tensor]:
        """Return H of each module (inputs x inputs), float64."""
        sums: dict[str, Tensor] = {}
        for start in range(0, len(rows), stage.settings.batch):
            batch = stage.collated(rows[start : start + stage.settings.batch])
            mask = batch["attention_mask"].bool()

            def add(module: str, x: Tensor, mask: Tensor = mask) -> None:
                x = x.reshape(*mask.shape, -1)[mask].double()
                sums[module] = sums.get(module, 0) + 2 / len(rows) * x.T @ x

            with torch.no_grad(), stage.reference(), stage.module_inputs(modules, add):
                stage.output(batch)
        return sums


def _by_layer(base: nn.Module, adapter: Adapter) -> list[list[str]]:
    """Return the modules of an adapter in groups, one for each decoder layer: their H are in memory together."""
    numbers = {id(module): number for number, layer in enumerate(decoder_layers(base)) for module in layer.modules()}
    groups: dict[int, list[str]] = {}
    for name in adapter.factors:
        groups.setdefault(numbers.get(id(base.get_submodule(name)), -1), []).append(name)
    return list(groups.values())


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular with H^-1 = U^T U, for the damped H (inputs x inputs)."""
    damped = second_moment + damping * second_moment.diagonal().mean() * torch.eye(len(second_moment)).to(second_moment)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def partial_update(update: Tensor, factor: Tensor, s: float) -> Tensor:
    """Return the difference between the new and the aligned weights of a module (outputs x inputs).

    Args:
        update: The user's update W_u - W (outputs x inputs).
        factor: U (inputs x inputs).
        s: Limit of the safety cost.
    """
    new, diagonal = torch.zeros_like(update), factor.diagonal()
    for start in range(0, update.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, update.shape[1]))
        u, inner, current, target = diagonal[block], factor[block, block], new[:, block].clone(), update[:, block]
        limit = s * (1 / u.square()).mean() * len(update) / REFERENCE * len(u) / REFERENCE
        order = (1 / u.square()).argsort(stable=True)
        costs = ((target - current) / u).square()[:, order].T.flatten()  # column by column
        taken = costs.cumsum(0) <= limit
        taken[len(taken) - int(NEVER_TAKEN * len(taken)) :] = False
        mask, errors = torch.empty_like(target, dtype=torch.bool), torch.empty_like(current)
        mask[:, order] = taken.view(len(u), -1).T
        for column in range(len(u)):
            chosen = torch.where(mask[:, column], target[:, column], current[:, column])
            errors[:, column] = (current[:, column] - chosen) / u[column]
            current[:, column] = chosen
            current[:, column + 1 :] -= errors[:, column, None] * inner[column, column + 1 :]
        new[:, block] = current
        new[:, block.stop :] -= errors @ factor[block, block.stop :]
    return new


def factorized(delta: Tensor, mixtures: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return LoRA factors A (rank x inputs) and B (outputs x rank) of a matrix, or of its best approximation.

    Args:
        delta: The matrix (outputs x inputs).
        mixtures: Random weights of its columns (inputs x R): R is at least its rank, so that R mixtures span them all.
        rank: Rank of the factors, at most R.
    """
    basis = torch.linalg.qr(delta @ mixtures).Q
    left, values, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    a, b, missing = right[:rank], (basis @ left * values)[:, :rank], max(rank - len(right), 0)
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
