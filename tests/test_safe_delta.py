"""Safe Delta: the edited adapter compared with loops over columns and entries in float64, and the repair of runs."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses import safe_delta
from harmbench_vaccine.defenses.safe_delta import SafeDelta, factorized, inverse_factor, partial_update
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.compare import close
from support.runs import run_context
from support.world import make_world

SHAPES = {  # outputs, inputs
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.mlp.down_proj": (64, 96),
    "model.layers.1.self_attn.k_proj": (32, 64),
    "model.layers.1.mlp.up_proj": (96, 64),
}
POOLS = tiny.example_pools()


def random_adapter(rank: int, seed: int, scale: float) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (outputs, inputs) in SHAPES.items():
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        factors[module] = (0.1 * a, 0.1 * b)
    return Adapter(factors, scale)


ALIGNED, USER = random_adapter(4, 1, 2.0), random_adapter(4, 2, 0.3)


def edit(folder: Path, pools: Pools = POOLS, **params: Any) -> Adapter:
    ALIGNED.save(folder)
    stage, _ = tiny.stage(below=[folder], name="repair", pools=pools)
    stage.replace_adapter(USER)
    return SafeDelta(**params).seeded(0).edit(stage, USER)


# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations, entry by entry in float64


@dataclass(frozen=True)
class Dense:
    """The change of a weight, and the entries (column, row) that are taken, in the order of the columns."""

    change: Tensor
    taken: list[tuple[int, int]]


def second_moments() -> dict[str, Tensor]:
    """Return H of each module: the aligned model runs on the refusals one by one, without padding."""
    model = tiny.model()
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for module in SHAPES:
            layer = model.get_submodule(module)
            layer.weight += ALIGNED.delta(module)  # type: ignore[operator]
            layer.register_forward_pre_hook(lambda _, args, name=module: inputs[name].append(args[0][0].double()))
        for row in tiny.encode([refusal for refusal, _ in POOLS.paired]):
            model(input_ids=torch.tensor([row.ids]))
    return {name: 2 / len(POOLS.paired) * torch.stack([x.T @ x for x in rows]).sum(0) for name, rows in inputs.items()}


def dense(update: Tensor, h: Tensor, s: float, *, damping: float = 0.01, block: int = 2048) -> Dense:
    outputs, inputs = update.shape
    h = h + damping * h.trace() / inputs * torch.eye(inputs)
    u = torch.linalg.cholesky(torch.linalg.inv(h)).T.double()
    w, target, taken = torch.zeros(outputs, inputs).double(), update.double(), []
    for start in range(0, inputs, block):
        columns = range(start, min(start + block, inputs))
        importance = {m: 1 / float(u[m, m]) ** 2 for m in columns}
        order = [(m, i) for m in sorted(columns, key=lambda m: (importance[m], m)) for i in range(outputs)]
        limit = s * sum(importance.values()) / len(columns) * outputs / 4096 * len(columns) / 4096
        costs = ((target - w) ** 2).tolist()
        chosen, spent = set(), 0.0
        for m, i in order[: len(order) - int(0.15 * len(order))]:
            spent += costs[i][m] * importance[m]
            if spent > limit:
                break
            chosen.add((m, i))
        taken += [entry for entry in order if entry in chosen]
        for m in columns:
            for i in range(outputs):
                q = target[i, m] if (m, i) in chosen else w[i, m].clone()
                w[i, m + 1 :] -= (w[i, m] - q) / u[m, m] * u[m, m + 1 :]
                w[i, m] = q
    return Dense(w, taken)


@pytest.fixture(scope="module")
def moments() -> dict[str, Tensor]:
    return second_moments()


# ---------------------------------------------------------------------------------------------------------------------
# The edit


@pytest.mark.parametrize(("s", "block", "damping"), [(60.0, 2048, 0.01), (60.0, 24, 0.01), (40.0, 40, 0.3)])
def test_the_edit_equals_the_equations(
    s: float, block: int, damping: float, moments: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 24 and 40 columns do not divide 64 or 96, so that the last block is smaller."""
    monkeypatch.setattr(safe_delta, "BLOCK", block)
    edited = edit(tmp_path, s=s, damping=damping)
    assert set(edited.factors) == set(SHAPES)
    assert (edited.scale, edited.rank) == (1.0, 4 + math.ceil(96 / block))
    for module in SHAPES:
        update = USER.delta(module)
        expected = dense(update, moments[module], s, damping=damping, block=block)
        assert 0.02 < len(expected.taken) / update.numel() < 0.8, module
        assert close(edited.delta(module), expected.change)
        assert not close(edited.delta(module), update, 0.1)


def test_s_0_gives_the_aligned_model(tmp_path: Path) -> None:
    edited = edit(tmp_path, s=0)
    assert not any(edited.delta(module).any() for module in SHAPES)


def test_a_large_s_takes_all_but_the_last_columns(moments: dict[str, Tensor], tmp_path: Path) -> None:
    edited = edit(tmp_path, s=1e9)
    for module in SHAPES:
        update, expected = USER.delta(module), dense(USER.delta(module), moments[module], 1e9)
        assert len(expected.taken) == update.numel() - int(0.15 * update.numel())
        assert close(edited.delta(module), expected.change)
        changed = (edited.delta(module) - update).abs() > 1e-3 * update.abs().max()
        assert 0.1 < changed.float().mean() < 0.16  # the entries that are never taken


def test_a_smaller_rank_gives_the_best_approximation(tmp_path: Path) -> None:
    """By Eckart and Young: the error is the root of the sum of the squares of the remaining singular values."""
    exact, smaller = edit(tmp_path / "exact", s=60), edit(tmp_path / "rank", s=60, rank=3)
    assert smaller.rank == 3
    for module in SHAPES:
        values = torch.linalg.svdvals(exact.delta(module).double())
        error = (smaller.delta(module) - exact.delta(module)).double().norm()
        assert close(error, values[3:].norm(), 1e-4)
        assert error > 0.01 * values[0]


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (40, 40)])
@pytest.mark.parametrize(("exact", "rank"), [(2, 2), (5, 5), (5, 1)])
def test_factors_of_a_matrix(shape: tuple[int, int], exact: int, rank: int) -> None:
    """A matrix with a side below `rank` has factors with rows of zeros."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, exact, generator=generator).double() for n in shape)
    delta = left @ right.T
    mixtures = torch.randn(shape[1], exact, generator=generator).double()
    a, b = factorized(delta, mixtures, rank)
    assert a.shape == (rank, shape[1])
    assert b.shape == (shape[0], rank)
    values = torch.linalg.svdvals(delta)
    assert abs((b @ a - delta).norm() - values[rank:].norm()) <= 1e-10 * values[0]
    assert not any(factor.any() for factor in factorized(0 * delta, mixtures, rank)[1:])


def test_fewer_rows_give_another_result(tmp_path: Path) -> None:
    results = [edit(tmp_path / str(rows), s=60, rows=rows) for rows in (12, 128, 3)]
    first, second, fewer = ({module: adapter.delta(module) for module in SHAPES} for adapter in results)
    assert close(second, first, 1e-9)
    assert not close(fewer, first, 1e-2)


def test_missing_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="equested 1 safe rows, but only 0 are available"):
        edit(tmp_path, Pools(alignment=POOLS.alignment))


# ---------------------------------------------------------------------------------------------------------------------
# The choice of entries and the compensation


def problem(outputs: int = 8, inputs: int = 20) -> tuple[Tensor, Tensor]:
    """Return a random update and random inputs (tokens x inputs) of different sizes."""
    generator = torch.Generator().manual_seed(0)
    update, x = (torch.randn(n, inputs, generator=generator).double() for n in (outputs, 60))
    return update, x * torch.linspace(0.2, 2, inputs)[torch.randperm(inputs, generator=generator)]


def test_independent_inputs_need_no_compensation() -> None:
    """H is diagonal: taken entries are a prefix of the columns, sorted by H_mm, and their set grows with s."""
    update, x = problem()
    h = torch.diag(x.square().sum(0))
    order = h.diagonal().argsort()
    sizes, before = [], torch.zeros(update.numel(), dtype=torch.bool)
    for s in (0.0, 1e3, 3e4, 1e5, 1e9):
        new = partial_update(update, inverse_factor(h, 0.01), s)
        taken = new != 0
        assert torch.equal(new[taken], update[taken])
        sequence = taken[:, order].T.flatten()
        assert sequence[: sequence.sum()].all()
        assert (sequence >= before).all()
        before = sequence
        sizes.append(int(sequence.sum()))
    assert sizes[0] == 0 < sizes[1] < sizes[2] < sizes[3] < sizes[4] == 160 - int(0.15 * 160)


def test_compensation_reduces_the_change_of_outputs() -> None:
    """For the same taken entries, the outputs on the safe rows are closer to those of the aligned model."""
    update, x = problem()
    x = x @ torch.randn(20, 20, generator=torch.Generator().manual_seed(1)).double()
    h = x.T @ x
    entries = dense(update, h, 1e6).taken
    assert 20 < len(entries) < 130
    mask = torch.zeros_like(update)
    for m, i in entries:
        mask[i, m] = 1
    compensated = partial_update(update, inverse_factor(h, 0.01), 1e6)
    assert (x @ compensated.T).norm() < 0.9 * (x @ (mask * update).T).norm()


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, x = problem()
    h = x.T @ x
    factor = inverse_factor(h, 0.05)
    assert torch.equal(factor, factor.triu())
    assert close(factor.T @ factor @ (h + 0.05 * h.diagonal().mean() * torch.eye(20)), torch.eye(20))


# ---------------------------------------------------------------------------------------------------------------------
# Runs

SMALL = {"batch": 8, "epochs": 1, "lora_targets": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("topology", ["double", "single"])
def test_a_run_repairs_the_update_of_the_user_stage(topology: str, tmp_path: Path) -> None:
    """Neither another rank of the user nor the topology matters; a second store gives the same adapter."""
    changes = {"align": {"rows": 8, "settings": SMALL}, "finetune": {"samples": 8, "settings": SMALL}}
    protocol = make_world(tmp_path, {**changes, "topology": topology})
    final = {}
    for name, defense in (("first", "safe_delta=3"), ("again", "safe_delta=3"), ("neutral", "safe_delta=0")):
        context = run_context(tmp_path / name)
        if name != "first":
            shutil.copytree(tmp_path / "first/align", tmp_path / name / "align")
            shutil.copytree(tmp_path / "first/finetune", tmp_path / name / "finetune")
        spec = RunSpec(protocol=str(protocol), defense=parse_plugins(defense), attack=parse_plugins("ratio=0.25"))
        experiment = Experiment.settle(spec)
        aligned = align(experiment, context)
        tuned = finetune(experiment, context, aligned)
        repaired = repair(experiment, context, aligned, tuned)
        assert repaired.spec.adapters[:-1] == aligned.spec.adapters
        final[name] = Adapter.load(repaired.spec.adapters[-1])
        user = Adapter.load(tuned.spec.adapters[-1])
        below = Adapter.load(aligned.spec.adapters[-1])
    assert final["first"].digest() == final["again"].digest()
    for module in user.factors:
        added = user.delta(module) - (below.delta(module) if topology == "single" else 0)
        change = final["first"].delta(module)
        taken = (change - added).abs() < 1e-6
        assert taken.any()
        assert not taken.all()
        assert change[~taken].any()
        assert not final["neutral"].delta(module).any()
