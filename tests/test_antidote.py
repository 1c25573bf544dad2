"""Antidote: the pruned entries, compared with a second implementation that runs a merged model row by row."""

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
# A second implementation of the equations


def merged(base: PreTrainedModel, *adapters: Adapter) -> PreTrainedModel:
    """Return a copy of the base with the weights W + sum of scale * B A."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for adapter in adapters:
            for name, (a, b) in adapter.factors.items():
                model.get_submodule(name).weight += adapter.scale * (b @ a)
    return model.eval()


@torch.no_grad()
def norms(model: PreTrainedModel, adapter: Adapter, rows: Sequence[list[int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module -> (a_j of the inputs of A, a_j of the inputs of B) in float64, row by row without padding."""
    module_inputs: dict[str, list[Tensor]] = {module: [] for module in adapter.factors}
    handles = [
        model.get_submodule(module).register_forward_hook(
            lambda _, args, output, module=module: module_inputs[module].append(args[0][0].double())
        )
        for module in adapter.factors
    ]
    for ids in rows:
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    result = {}
    for module, inputs in module_inputs.items():
        x, a = torch.cat(inputs), adapter.factors[module][0].double()  # tokens x inputs
        result[module] = tuple((values**2).sum(0).div(len(rows)).sqrt() for values in (x, x @ a.T))
    return result  # type: ignore[return-value]


def pruned_count(width: int, alpha: float) -> int:
    """Return k = d - floor(d (1 - alpha)), computed with exact fractions."""
    return width - math.floor(width * (1 - Fraction(str(alpha))))


def prune(adapter: Adapter, of: dict[str, tuple[Tensor, Tensor]], alpha: float, scope: str) -> Adapter:
    """Return the adapter without the entries with the largest |M| a."""
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
    result = {module: tuple(factor.clone() for factor in factors) for module, factors in adapter.factors.items()}
    for group in groups.values():
        for _, module, which, i, j in sorted(group, reverse=True)[: pruned_count(len(group), alpha)]:
            result[module][which][i, j] = 0
    return Adapter(result, adapter.scale)  # type: ignore[arg-type]


def tokens(rows: Sequence[Example] = HARMFUL) -> list[list[int]]:
    return [row.ids for row in tiny.encode(rows)]


def repair_stage(folder: Path | None = None, *, dropout: float = 0.0) -> tuple[TrainingStage, LoraStack, list[Adapter]]:
    """Return the repair stage of a tiny user adapter, and the adapters below it.

    With a folder, the user adapter is on top of an aligned adapter.
    """
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
# The edit


@pytest.mark.parametrize("scope", ["row", "model"])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_edit_equals_the_equations(scope: Any, alpha: float, aligned: bool, tmp_path: Path) -> None:
    stage, stack, below = repair_stage(tmp_path if aligned else None)
    adapter = stack.trained()
    expected = prune(adapter, norms(merged(tiny.model(), *below, adapter), adapter, tokens()), alpha, scope)
    edited = Antidote(alpha=alpha, scope=scope).edit(stage, adapter)
    assert same_adapter(edited, expected)
    assert (edited.rank, edited.scale) == (adapter.rank, adapter.scale)
    # The inputs depend on the complete model: the base model alone would select other entries.
    assert not same_adapter(edited, prune(adapter, norms(tiny.model(), adapter, tokens()), alpha, scope))


def test_the_norms_equal_those_of_rows_run_alone(tmp_path: Path) -> None:
    stage, stack, below = repair_stage(tmp_path)
    adapter = stack.trained()
    expected = norms(merged(tiny.model(), *below, adapter), adapter, tokens())
    for module, pair in Antidote().input_norms(stage, adapter).items():
        for ours, theirs in zip(pair, expected[module], strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.max()


@pytest.mark.parametrize("scope", ["row", "model"])
def test_neutral_equals_the_tuned_adapter_bit_for_bit(scope: Any) -> None:
    stage, stack, _ = repair_stage()
    adapter = stack.trained()
    assert Antidote.neutral == {"alpha": 0.0}
    assert same_adapter(Antidote(alpha=0.0, scope=scope).edit(stage, adapter), adapter)
    assert not same_adapter(Antidote(alpha=0.05, scope=scope).edit(stage, adapter), adapter)


@pytest.mark.parametrize("scope", ["row", "model"])
def test_alpha_1_gives_the_aligned_model(scope: Any, tmp_path: Path) -> None:
    stage, stack, below = repair_stage(tmp_path)
    stage.replace_adapter(Antidote(alpha=1.0, scope=scope).edit(stage, stack.trained()))
    stage.model.eval()
    batch = tiny.batch()
    with torch.no_grad():
        edited, logits = stage.output(batch).logits, merged(tiny.model(), *below)(**batch).logits
    aligned = logits[:, :-1][batch["labels"][:, 1:] != IGNORED]
    assert (edited - aligned).abs().max() <= 1e-5 * aligned.abs().max()


def test_pruned_entries_are_zero_and_all_others_are_unchanged() -> None:
    stage, stack, _ = repair_stage()
    adapter = stack.trained()
    edited = Antidote(alpha=0.3).edit(stage, adapter)
    for module, factors in adapter.factors.items():
        for old, new in zip(factors, edited.factors[module], strict=True):
            zeros = new == 0
            assert torch.equal(new, torch.where(zeros, 0.0, old))
            assert set(zeros.sum(1).tolist()) == {pruned_count(old.shape[1], 0.3)}


def test_missing_harmful_rows_are_refused() -> None:
    stage, stack, _ = repair_stage()
    stage.pools = replace(POOLS, paired=())
    with pytest.raises(BadInput, match="rows"):
        Antidote().edit(stage, stack.trained())


# ---------------------------------------------------------------------------------------------------------------------
# Explicit inputs of one module


class StubStage:
    """A stage with one module `m` whose inputs are `x` (rows x length x inputs) with the token mask `mask`."""

    settings = SimpleNamespace(batch=2)

    def __init__(self, x: Tensor, mask: Tensor | None = None) -> None:
        self.x, self.mask = x, torch.ones(x.shape[:2], dtype=torch.long) if mask is None else mask
        self.pools = Pools(paired=[(Example("", ""), Example(str(number), "")) for number in range(len(x))])

    @contextmanager
    def module_inputs(self, modules: Any, callback: Any) -> Iterator[None]:
        assert list(modules) == ["m"]
        self.callback = callback
        yield

    def batches(self, rows: Sequence[Example], size: int) -> Iterator[Batch]:
        assert [row.id for row in rows] == [str(number) for number in range(len(self.x))]
        for start in range(0, len(rows), size):
            self.part = self.x[start : start + size]
            yield {"attention_mask": self.mask[start : start + size]}

    def output(self, batch: Batch) -> None:
        self.callback("m", self.part)


def edit(x: Tensor, a: Tensor, b: Tensor, alpha: float, mask: Tensor | None = None, **more: Any) -> tuple[Any, Any]:
    """Return the factors after the edit."""
    stage: Any = StubStage(x, mask)
    return Antidote(alpha=alpha, **more).edit(stage, Adapter({"m": (a, b)}, 1.0)).factors["m"]


def with_norms(*column_norms: float, rows: int = 2) -> Tensor:
    """Return inputs (rows x 3 x columns) whose columns have these norms a_j."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, len(column_norms), generator=generator)
    return x * torch.tensor(column_norms) / x.square().sum((0, 1)).div(rows).sqrt()


def test_known_column_norms_select_the_entries() -> None:
    x = with_norms(10.0, 1.0, 2.0, 0.1)
    a = torch.tensor([[1.0, 5.0, -3.0, 90.0], [-0.4, 3.0, 1.0, 50.0]])
    # |A| a: 10, 5, 6, 9 and 4, 3, 2, 5.
    first = torch.tensor([[0.0, 5.0, -3.0, 90.0], [-0.4, 3.0, 1.0, 0.0]])
    second = torch.tensor([[0.0, 5.0, -3.0, 0.0], [0.0, 3.0, 1.0, 0.0]])
    b = torch.ones(3, 2)
    assert torch.equal(edit(x, a, b, 0.25)[0], first)
    assert torch.equal(edit(x, a, b, 0.5)[0], second)
    assert torch.equal(edit(x, a, b, 0.26)[0], second)  # 4 - floor(4 * 0.74) = 2


def test_the_inputs_of_b_are_the_outputs_of_a() -> None:
    x = with_norms(1.0, 4.0)
    a = torch.tensor([[3.0, 0.0], [0.0, 0.5]])  # so that the inputs of B have norms 3 and 2
    b = torch.tensor([[1.0, 1.0], [1.0, 1.4], [1.0, -1.6], [-9.0, 1.0]])
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.4], [1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(edit(x, a, b, 0.5)[1], expected)


def test_scope_model_ranks_all_entries_together() -> None:
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
            pruned_a, pruned_b = edit(x, a, b, alpha, scope=scope)
            if scope == "row":
                assert set((pruned_a == 0).sum(1).tolist()) == {pruned_count(width, alpha)}, (width, alpha)
                assert set((pruned_b == 0).sum(1).tolist()) == {pruned_count(5, alpha)}
            else:
                zeros = int((pruned_a == 0).sum() + (pruned_b == 0).sum())
                assert zeros == pruned_count(5 * width + 35, alpha), (width, alpha)


@pytest.mark.parametrize("scope", ["row", "model"])
def test_the_scale_of_the_inputs_and_the_order_of_rows_have_no_effect(scope: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 5, 16, generator=generator) * torch.rand(6, 1, 16, generator=generator)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(8, 4, generator=generator)
    plain = edit(x, a, b, 0.3, scope=scope)
    for changed in (7.5 * x, x[torch.tensor([3, 5, 0, 1, 4, 2])], -x, x[:, torch.tensor([4, 2, 0, 3, 1])]):
        again = edit(changed, a, b, 0.3, scope=scope)
        assert all(torch.equal(left, right) for left, right in zip(again, plain, strict=True))
    weighted = x * torch.linspace(0.01, 3.0, 16)
    assert not torch.equal(edit(weighted, a, b, 0.3, scope=scope)[0], plain[0])


def test_equal_norms_give_magnitude_pruning_of_each_row() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(8, 4, generator=generator)
    edited, _ = edit(with_norms(*[2.0] * 16), a, b, 0.25)
    for old, new in zip(a, edited, strict=True):
        largest = old.abs().sort(descending=True).values[3]
        assert torch.equal(new, torch.where(old.abs() >= largest, 0.0, old))


def test_long_rows_have_more_weight() -> None:
    # The sum is over tokens and the mean over rows: ten tokens of one column outweigh one token of the other column.
    x = torch.zeros(2, 10, 2)
    x[0, :, 0] = 1.0
    x[1, 0, 1] = 2.0
    mask = torch.zeros(2, 10, dtype=torch.long)
    mask[0], mask[1, 0] = 1, 1
    a, b = torch.ones(1, 2), torch.ones(1, 1)
    assert edit(x, a, b, 0.5, mask)[0].tolist() == [[0.0, 1.0]]


def test_inputs_at_padding_are_ignored() -> None:
    x = with_norms(3.0, 2.0, 1.0)
    garbage = torch.cat([x, torch.full((2, 4, 3), 1e6) * torch.tensor([0.0, 0.0, 1.0])], 1)
    mask = torch.cat([torch.ones(2, 3), torch.zeros(2, 4)], 1).long()
    a, b = torch.ones(1, 3), torch.ones(2, 1)
    assert edit(garbage, a, b, 0.3, mask)[0].tolist() == [[0.0, 1.0, 1.0]]
    assert edit(garbage, a, b, 0.3)[0].tolist() == [[1.0, 1.0, 0.0]]  # without the mask the padding counts


# ---------------------------------------------------------------------------------------------------------------------
# Through the model


def test_labels_have_no_effect() -> None:
    edited = []
    for labels in (lambda ids: [IGNORED, *ids[1:]], lambda ids: [IGNORED, *ids[:0:-1]], lambda ids: [3] * len(ids)):
        stage, stack, _ = repair_stage()
        stage.encode = lambda rows, labels=labels: [
            Encoded(row.ids, labels(row.ids), row.id) for row in tiny.encode(rows)
        ]
        edited.append(Antidote(alpha=0.3).edit(stage, stack.trained()))
    assert same_adapter(edited[1], edited[0])
    assert same_adapter(edited[2], edited[0])


@pytest.mark.parametrize("scope", ["row", "model"])
def test_padding_has_no_effect(scope: Any) -> None:
    """Batches of rows with different lengths and any padding token give the same result as single rows."""
    edited = []
    for batch, pad in ((1, 0), (12, 0), (12, 77), (5, 31)):
        stage, stack, _ = repair_stage()
        stage.settings, stage.pad = replace(stage.settings, batch=batch), pad
        edited.append(Antidote(alpha=0.3, scope=scope).edit(stage, stack.trained()))
    assert len({len(ids) for ids in tokens()}) > 3  # so the batches contain padding
    assert all(same_adapter(adapter, edited[0]) for adapter in edited[1:])


def test_only_the_defenders_harmful_rows_count() -> None:
    edited = []
    for pools in (POOLS, replace(POOLS, alignment=(), benign=(), attacker=())):
        stage, stack, _ = repair_stage()
        stage.pools = pools
        edited.append(Antidote(alpha=0.3).edit(stage, stack.trained()))
    assert same_adapter(edited[0], edited[1])
    stage, stack, _ = repair_stage()
    stage.pools = replace(POOLS, paired=[(row, row) for row in POOLS.attacker])
    assert not same_adapter(Antidote(alpha=0.3).edit(stage, stack.trained()), edited[0])


def test_hooks_and_gradients_are_removed() -> None:
    stage, stack, _ = repair_stage()
    Antidote().edit(stage, stack.trained())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in stage.model.modules())
    assert all(parameter.grad is None for parameter in stage.trainable.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_chained_edit_uses_the_model_with_the_previous_edit(dropout: float, tmp_path: Path) -> None:
    stage, stack, below = repair_stage(tmp_path, dropout=dropout)
    adapter = stack.trained()
    first = RandomPerturbation(rho=4.0)
    with stage.isolated("edit"):
        perturbed = first.edit(stage, adapter)
        chained = DefenseTeam(members=(first, Antidote(alpha=0.3)), stage="repair").edit(stage, adapter)
    perturbed_norms = norms(merged(tiny.model(), *below, perturbed), perturbed, tokens())
    assert same_adapter(chained, prune(perturbed, perturbed_norms, 0.3, "row"))
    stale_norms = {  # the previous inputs of A with the current A
        module: (old, perturbed_norms[module][1])
        for module, (old, _) in norms(merged(tiny.model(), *below, adapter), perturbed, tokens()).items()
    }
    assert not same_adapter(chained, prune(perturbed, stale_norms, 0.3, "row"))
