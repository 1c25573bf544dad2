"""Antidote: what is pruned, against a second statement of the equations that runs a merged model row by row."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.defenses.antidote import Antidote
from harmbench_vaccine.defenses.random_perturbation import RandomPerturbation
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.stage import Batch, TrainingStage
from support import tiny
from support.compare import same_adapter

POOLS = tiny.example_pools()
HARMFUL = [harmful for _, harmful in POOLS.paired]

# ---------------------------------------------------------------------------------------------------------------------
# The equations again


def merged(base: PreTrainedModel, *adapters: Adapter) -> PreTrainedModel:
    """A copy of the base whose weights are W + the sum of scale * B A."""
    whole = copy.deepcopy(base)
    with torch.no_grad():
        for adapter in adapters:
            for name, (a, b) in adapter.factors.items():
                whole.get_submodule(name).weight += adapter.scale * (b @ a)
    return whole.eval()


@torch.no_grad()
def norms(model: PreTrainedModel, adapter: Adapter, rows: Sequence[list[int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> a_j of the inputs of A, and of B, float64: every row alone, so that there is no padding."""
    found: dict[str, list[Tensor]] = {module: [] for module in adapter.factors}
    handles = [
        model.get_submodule(module).register_forward_hook(
            lambda _, args, output, module=module: found[module].append(args[0][0].double())
        )
        for module in adapter.factors
    ]
    for ids in rows:
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    made = {}
    for module, inputs in found.items():
        x, a = torch.cat(inputs), adapter.factors[module][0].double()  # tokens x inputs
        made[module] = tuple((each**2).sum(0).div(len(rows)).sqrt() for each in (x, x @ a.T))
    return made  # type: ignore[return-value]


def removed(width: int, alpha: float) -> int:
    """k = d - floor(d (1 - alpha)), in exact numbers."""
    return width - math.floor(width * (1 - Fraction(str(alpha))))


def pruned(adapter: Adapter, of: dict[str, tuple[Tensor, Tensor]], alpha: float, scope: str) -> Adapter:
    """The adapter without the entries whose |M| a is largest."""
    entries = [
        (abs(float(factor[i, j])) * float(of[module][which][j]), module, which, i, j)
        for module, factors in adapter.factors.items()
        for which, factor in enumerate(factors)
        for i in range(factor.shape[0])
        for j in range(factor.shape[1])
    ]
    groups: dict[Any, list[Any]] = {}
    for entry in entries:
        groups.setdefault(entry[1:4] if scope == "row" else "all", []).append(entry)
    made = {module: tuple(factor.clone() for factor in factors) for module, factors in adapter.factors.items()}
    for group in groups.values():
        for _, module, which, i, j in sorted(group, reverse=True)[: removed(len(group), alpha)]:
            made[module][which][i, j] = 0
    return Adapter(made, adapter.scale)  # type: ignore[arg-type]


def tokens(rows: Sequence[Example] = HARMFUL) -> list[list[int]]:
    return [row.ids for row in tiny.encode(rows)]


def tuned(folder: Path | None = None, *, dropout: float = 0.0) -> tuple[TrainingStage, LoraStack, list[Adapter]]:
    """The repair stage of a tiny user adapter, above an aligned one if it is given a folder; and what lies below."""
    below = []
    if folder:
        _, aligned = tiny.stage(stirred=True, seed=1)
        below = [aligned.trained()]
        below[0].save(folder)
    stage, stack = tiny.stage(
        trained_with=tiny.settings(lora_dropout=dropout),
        below=[folder] if folder else [],
        name="repair",
        pools=POOLS,
    )
    tiny.stir(stage.trainable, seed=9)
    return stage, stack, below


# ---------------------------------------------------------------------------------------------------------------------
# The whole edit


@pytest.mark.parametrize("scope", ["row", "model"])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_edit_equals_the_equations(scope: Any, alpha: float, aligned: bool, tmp_path: Path) -> None:
    stage, stack, below = tuned(tmp_path if aligned else None)
    adapter = stack.trained()
    expected = pruned(adapter, norms(merged(tiny.model(), *below, adapter), adapter, tokens()), alpha, scope)
    edited = Antidote(alpha=alpha, scope=scope).edit(stage, adapter)
    assert same_adapter(edited, expected)
    assert (edited.rank, edited.scale) == (adapter.rank, adapter.scale)
    # The model that the inputs come from matters: the base alone would give other entries.
    assert not same_adapter(edited, pruned(adapter, norms(tiny.model(), adapter, tokens()), alpha, scope))


def test_the_norms_equal_those_of_rows_run_alone(tmp_path: Path) -> None:
    stage, stack, below = tuned(tmp_path)
    adapter = stack.trained()
    expected = norms(merged(tiny.model(), *below, adapter), adapter, tokens())
    for module, found in Antidote().input_norms(stage, adapter).items():
        for ours, theirs in zip(found, expected[module], strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.max()


@pytest.mark.parametrize("scope", ["row", "model"])
def test_neutral_is_the_tuned_adapter_bit_for_bit(scope: Any) -> None:
    stage, stack, _ = tuned()
    adapter = stack.trained()
    assert Antidote.neutral == {"alpha": 0.0}
    assert same_adapter(Antidote(alpha=0.0, scope=scope).edit(stage, adapter), adapter)
    assert not same_adapter(Antidote(alpha=0.05, scope=scope).edit(stage, adapter), adapter)


@pytest.mark.parametrize("scope", ["row", "model"])
def test_the_whole_share_gives_the_aligned_model_back(scope: Any, tmp_path: Path) -> None:
    stage, stack, below = tuned(tmp_path)
    stage.replace_adapter(Antidote(alpha=1.0, scope=scope).edit(stage, stack.trained()))
    stage.model.eval()
    with torch.no_grad():
        left, aligned = stage.output(tiny.batch()).logits, merged(tiny.model(), *below)(**tiny.batch()).logits
    assert (left - aligned).abs().max() <= 1e-5 * aligned.abs().max()


def test_what_is_pruned_is_zero_and_the_rest_is_untouched() -> None:
    stage, stack, _ = tuned()
    adapter = stack.trained()
    edited = Antidote(alpha=0.3).edit(stage, adapter)
    for module, factors in adapter.factors.items():
        for before, after in zip(factors, edited.factors[module], strict=True):
            gone = after == 0
            assert torch.equal(after, torch.where(gone, 0.0, before))
            assert set(gone.sum(1).tolist()) == {removed(before.shape[1], 0.3)}


def test_without_harmful_rows_it_is_refused() -> None:
    stage, stack, _ = tuned()
    stage.pools = replace(POOLS, paired=())
    with pytest.raises(BadInput, match="rows"):
        Antidote().edit(stage, stack.trained())


# ---------------------------------------------------------------------------------------------------------------------
# By hand: inputs that the test writes, into one module


class Given:
    """Stands for a stage whose one module `m` is given `x` (rows x length x inputs), of which `mask` is real."""

    settings = SimpleNamespace(batch=2)

    def __init__(self, x: Tensor, mask: Tensor | None = None) -> None:
        self.x, self.mask = x, torch.ones(x.shape[:2], dtype=torch.long) if mask is None else mask
        self.pools = Pools(paired=[(Example("", ""), Example(str(number), "")) for number in range(len(x))])

    @contextmanager
    def module_inputs(self, modules: Any, callback: Any) -> Iterator[None]:
        assert list(modules) == ["m"]
        self.see = callback
        yield

    def batches(self, rows: Sequence[Example], size: int) -> Iterator[Batch]:
        assert [row.id for row in rows] == [str(number) for number in range(len(self.x))]
        for start in range(0, len(rows), size):
            self.part = self.x[start : start + size]
            yield {"attention_mask": self.mask[start : start + size]}

    def output(self, batch: Batch) -> None:
        self.see("m", self.part)


def edit(x: Tensor, a: Tensor, b: Tensor, alpha: float, mask: Tensor | None = None, **more: Any) -> tuple[Any, Any]:
    """The factors after the edit."""
    stage: Any = Given(x, mask)
    return Antidote(alpha=alpha, **more).edit(stage, Adapter({"m": (a, b)}, 1.0)).factors["m"]


def with_norms(*wanted: float, rows: int = 2) -> Tensor:
    """Inputs (rows x 3 x columns) whose columns have these norms a_j."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, len(wanted), generator=generator)
    return x * torch.tensor(wanted) / x.square().sum((0, 1)).div(rows).sqrt()


def test_columns_of_known_norms_decide_by_hand() -> None:
    x = with_norms(10.0, 1.0, 2.0, 0.1)
    a = torch.tensor([[1.0, 5.0, -3.0, 90.0], [-0.4, 3.0, 1.0, 50.0]])
    # |A| a: 10, 5, 6, 9 and 4, 3, 2, 5.
    first = torch.tensor([[0.0, 5.0, -3.0, 90.0], [-0.4, 3.0, 1.0, 0.0]])
    second = torch.tensor([[0.0, 5.0, -3.0, 0.0], [0.0, 3.0, 1.0, 0.0]])
    b = torch.ones(3, 2)
    assert torch.equal(edit(x, a, b, 0.25)[0], first)
    assert torch.equal(edit(x, a, b, 0.5)[0], second)
    assert torch.equal(edit(x, a, b, 0.26)[0], second)  # 4 - floor(4 * 0.74) = 2


def test_the_inputs_of_b_are_what_a_makes_of_them() -> None:
    x = with_norms(1.0, 4.0)
    a = torch.tensor([[3.0, 0.0], [0.0, 0.5]])  # so that B's inputs have norms 3 and 2
    b = torch.tensor([[1.0, 1.0], [1.0, 1.4], [1.0, -1.6], [-9.0, 1.0]])
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.4], [1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(edit(x, a, b, 0.5)[1], expected)


def test_the_whole_model_is_one_list() -> None:
    x = with_norms(10.0, 1.0, 2.0, 0.1)
    a = torch.tensor([[1.0, 5.0, -3.0, 90.0], [-0.4, 3.0, 1.0, 50.0]])  # scores 10, 5, 6, 9 and 4, 3, 2, 5
    b = torch.full((1, 2), 1e-3)
    norms_of_b = (x @ a.T).square().sum((0, 1)).div(2).sqrt()
    b[0, 1] = 8.0 / norms_of_b[1]  # a score of 8, and one near 0
    pruned_a, pruned_b = edit(x, a, b, 0.3, scope="model")  # 10 - floor(10 * 0.7) = 3
    assert pruned_a.tolist() == [[0.0, 5.0, -3.0, 0.0], pytest.approx([-0.4, 3.0, 1.0, 50.0])]
    assert pruned_b.tolist() == [[pytest.approx(1e-3), 0.0]]


@pytest.mark.parametrize("scope", ["row", "model"])
def test_the_count_is_exact(scope: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for width in (1, 3, 8, 10, 32, 50, 64, 100):
        x = torch.randn(2, 4, width, generator=generator)
        a, b = torch.randn(5, width, generator=generator), torch.randn(7, 5, generator=generator)
        for alpha in (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.29, 0.3, 0.43, 0.57, 0.7, 0.9, 1.0):
            left_a, left_b = edit(x, a, b, alpha, scope=scope)
            if scope == "row":
                assert set((left_a == 0).sum(1).tolist()) == {removed(width, alpha)}, (width, alpha)
                assert set((left_b == 0).sum(1).tolist()) == {removed(5, alpha)}
            else:
                gone = int((left_a == 0).sum() + (left_b == 0).sum())
                assert gone == removed(5 * width + 35, alpha), (width, alpha)


@pytest.mark.parametrize("scope", ["row", "model"])
def test_neither_the_size_of_the_inputs_nor_the_order_of_rows_matters(scope: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 5, 16, generator=generator) * torch.rand(6, 1, 16, generator=generator)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(8, 4, generator=generator)
    plain = edit(x, a, b, 0.3, scope=scope)
    for changed in (7.5 * x, x[torch.tensor([3, 5, 0, 1, 4, 2])], -x, x[:, torch.tensor([4, 2, 0, 3, 1])]):
        again = edit(changed, a, b, 0.3, scope=scope)
        assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))
    weighed = x * torch.linspace(0.01, 3.0, 16)
    assert not torch.equal(edit(weighed, a, b, 0.3, scope=scope)[0], plain[0])


def test_with_equal_norms_it_is_magnitude_pruning_of_each_row() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(8, 4, generator=generator)
    left, _ = edit(with_norms(*[2.0] * 16), a, b, 0.25)
    for before, after in zip(a, left, strict=True):
        largest = before.abs().sort(descending=True).values[3]
        assert torch.equal(after, torch.where(before.abs() >= largest, 0.0, before))


def test_long_rows_weigh_more() -> None:
    # The sum runs over tokens, the mean over rows: ten tokens of one column outweigh one token of the other.
    x = torch.zeros(2, 10, 2)
    x[0, :, 0] = 1.0
    x[1, 0, 1] = 2.0
    mask = torch.zeros(2, 10, dtype=torch.long)
    mask[0], mask[1, 0] = 1, 1
    a, b = torch.ones(1, 2), torch.ones(1, 1)
    assert edit(x, a, b, 0.5, mask)[0].tolist() == [[0.0, 1.0]]


def test_inputs_at_padding_play_no_part_by_hand() -> None:
    x = with_norms(3.0, 2.0, 1.0)
    garbage = torch.cat([x, torch.full((2, 4, 3), 1e6) * torch.tensor([0.0, 0.0, 1.0])], 1)
    mask = torch.cat([torch.ones(2, 3), torch.zeros(2, 4)], 1).long()
    a, b = torch.ones(1, 3), torch.ones(2, 1)
    assert edit(garbage, a, b, 0.3, mask)[0].tolist() == [[0.0, 1.0, 1.0]]
    assert edit(garbage, a, b, 0.3)[0].tolist() == [[1.0, 1.0, 0.0]]  # it would have been seen


# ---------------------------------------------------------------------------------------------------------------------
# Through the model


def test_labels_play_no_part() -> None:
    edited = []
    for labels in (lambda ids: [IGNORED, *ids[1:]], lambda ids: [IGNORED, *ids[:0:-1]], lambda ids: [3] * len(ids)):
        stage, stack, _ = tuned()
        stage.encode = lambda rows, labels=labels: [
            Encoded(row.ids, labels(row.ids), row.id) for row in tiny.encode(rows)
        ]
        edited.append(Antidote(alpha=0.3).edit(stage, stack.trained()))
    assert same_adapter(edited[1], edited[0])
    assert same_adapter(edited[2], edited[0])


@pytest.mark.parametrize("scope", ["row", "model"])
def test_padding_plays_no_part(scope: Any) -> None:
    """Rows of several lengths in one batch, with any token as padding, are rows alone."""
    edited = []
    for batch, pad in ((1, 0), (12, 0), (12, 77), (5, 31)):
        stage, stack, _ = tuned()
        stage.settings, stage.pad = replace(stage.settings, batch=batch), pad
        edited.append(Antidote(alpha=0.3, scope=scope).edit(stage, stack.trained()))
    assert len({len(ids) for ids in tokens()}) > 3  # there is padding
    assert all(same_adapter(one, edited[0]) for one in edited[1:])


def test_only_the_defenders_harmful_rows_count() -> None:
    edited = []
    for pools in (POOLS, replace(POOLS, alignment=(), benign=(), attacker=())):
        stage, stack, _ = tuned()
        stage.pools = pools
        edited.append(Antidote(alpha=0.3).edit(stage, stack.trained()))
    assert same_adapter(edited[0], edited[1])
    stage, stack, _ = tuned()
    stage.pools = replace(POOLS, paired=[(row, row) for row in POOLS.attacker])
    assert not same_adapter(Antidote(alpha=0.3).edit(stage, stack.trained()), edited[0])


def test_hooks_and_gradients_are_gone_afterwards() -> None:
    stage, stack, _ = tuned()
    Antidote().edit(stage, stack.trained())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in stage.model.modules())
    assert all(parameter.grad is None for parameter in stage.trainable.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_in_a_chain_it_sees_the_model_with_the_edit_before_it(dropout: float, tmp_path: Path) -> None:
    stage, stack, below = tuned(tmp_path, dropout=dropout)
    adapter = stack.trained()
    first = RandomPerturbation(rho=4.0)
    with stage.isolated("edit"):
        moved = first.edit(stage, adapter)
        chained = DefenseTeam(members=(first, Antidote(alpha=0.3)), stage="repair").edit(stage, adapter)
    of_moved = norms(merged(tiny.model(), *below, moved), moved, tokens())
    assert same_adapter(chained, pruned(moved, of_moved, 0.3, "row"))
    unmoved = {  # the inputs of A as they were, under A as it is
        module: (old, of_moved[module][1])
        for module, (old, _) in norms(merged(tiny.model(), *below, adapter), moved, tokens()).items()
    }
    assert not same_adapter(chained, pruned(moved, unmoved, 0.3, "row"))
