"""Safe LoRA: C and the choice of modules, against dense matrices and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.safe_lora import SafeLoRA
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.compare import close
from support.world import make_world

MODULES = sorted(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv")
WIDTHS = {"q": (64, 64), "k": (32, 64), "v": (32, 64)}  # outputs, inputs

# ---------------------------------------------------------------------------------------------------------------------
# The equations again, with whole matrices in float64


def matrix(v: Tensor, projector: str) -> Tensor:
    """C (outputs x outputs) of what alignment added to a weight."""
    v = v.double()
    if projector == "paper":
        return v @ v.T / torch.linalg.matrix_norm(v, "fro")
    return v @ torch.linalg.pinv(v.T @ v, rtol=1e-10) @ v.T


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def projected(adapter: Adapter, aligned: Adapter, projector: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Module -> C B, and the cosine of C B A and B A."""
    made, cosines = {}, {}
    for module, (a, b) in adapter.factors.items():
        a_al, b_al = (factor.double() for factor in aligned.factors[module])
        made[module] = matrix(aligned.scale * b_al @ a_al, projector) @ b.double()
        cosines[module] = cosine(made[module] @ a.double(), b.double() @ a.double())
    return made, cosines


def random_adapter(rank: int, seed: int, *, scale: float = 2.0, modules: list[str] = MODULES) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module in modules:
        outputs, inputs = WIDTHS[module[-6]]
        factors[module] = (
            0.1 * torch.randn(rank, inputs, generator=generator),
            0.1 * torch.randn(outputs, rank, generator=generator),
        )
    return Adapter(factors, scale)


def written(make: Callable[[int, int], tuple[Tensor, Tensor]], scale: float = 1.0) -> Adapter:
    """An adapter whose (A, B) of every module are made from its numbers of outputs and inputs."""
    return Adapter({module: make(*WIDTHS[module[-6]]) for module in MODULES}, scale)


def repair_stage(folder: Path, aligned: Adapter) -> TrainingStage:
    """The repair stage above an aligned model."""
    aligned.save(folder)
    stage, _ = tiny.stage(below=[folder], name="repair")
    return stage


def edit(folder: Path, aligned: Adapter, adapter: Adapter, **params: Any) -> Adapter:
    return SafeLoRA(**params).edit(repair_stage(folder, aligned), adapter)


def changed(before: Adapter, after: Adapter) -> set[str]:
    """The modules whose B moved; A may not move anywhere, nor scale or modules."""
    assert after.scale == before.scale
    assert set(after.factors) == set(before.factors)
    assert all(torch.equal(after.factors[module][0], a) for module, (a, _) in before.factors.items())
    return {module for module, (_, b) in before.factors.items() if not torch.equal(after.factors[module][1], b)}


# ---------------------------------------------------------------------------------------------------------------------
# The edit


@pytest.mark.parametrize("projector", ["paper", "exact"])
@pytest.mark.parametrize("ranks", [(4, 4), (3, 6)])
def test_the_edit_equals_the_equations(projector: Any, ranks: tuple[int, int], tmp_path: Path) -> None:
    aligned, adapter = random_adapter(ranks[0], 1), random_adapter(ranks[1], 2, scale=0.5)
    expected, cosines = projected(adapter, aligned, projector)
    edited = edit(tmp_path, aligned, adapter, tau=1.0, projector=projector)
    assert changed(adapter, edited) == set(MODULES)
    assert edited.rank == ranks[1]
    for module in MODULES:
        assert close(edited.factors[module][1], expected[module])
        assert 0 < cosines[module] < 1


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_without_tau_the_k_modules_of_least_cosine_are_projected(projector: Any, tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    expected, cosines = projected(adapter, aligned, projector)
    ranked = sorted(MODULES, key=lambda module: cosines[module])
    assert ranked != MODULES
    for k in range(8):
        edited = edit(tmp_path, aligned, adapter, k=k, projector=projector)
        assert changed(adapter, edited) == set(ranked[:k])
        assert all(close(edited.factors[module][1], expected[module]) for module in ranked[:k])


def test_with_tau_those_of_at_most_that_cosine_are_projected(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    _, cosines = projected(adapter, aligned, "paper")
    values = sorted(cosines.values())
    for tau in [0.0, *((low + high) / 2 for low, high in pairwise(values)), 1.0]:
        edited = edit(tmp_path, aligned, adapter, tau=tau, k=1)  # tau counts, not k
        assert changed(adapter, edited) == {module for module in MODULES if cosines[module] <= tau}, tau


def test_neither_scale_changes_which_modules_are_chosen(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    chosen = changed(adapter, edit(tmp_path / "plain", aligned, adapter, k=3))
    for number, (below, above) in enumerate(((50.0, 1.0), (1e-3, 1.0), (1.0, 1e-3))):
        scaled = adapter.scaled(above)
        assert changed(scaled, edit(tmp_path / str(number), aligned.scaled(below), scaled, k=3)) == chosen


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_neutral_is_the_tuned_adapter_bit_for_bit(projector: Any, tmp_path: Path) -> None:
    assert SafeLoRA.neutral == {"k": 0}
    for seed in range(5):
        aligned, adapter = random_adapter(4, seed), random_adapter(4, 10 + seed)
        assert not changed(adapter, edit(tmp_path / str(seed), aligned, adapter, k=0, projector=projector))
        # C is positive semi-definite, so that no cosine is negative.
        assert not changed(adapter, edit(tmp_path / str(seed), aligned, adapter, tau=-1e-6, projector=projector))


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_the_cosine_is_never_negative(projector: Any, tmp_path: Path) -> None:
    """Even for an update that points away from alignment: dW = -V and what is random besides."""
    aligned = random_adapter(4, 1)
    for weight in (0.0, 0.1, 1.0, 10.0):
        other = random_adapter(4, 2).scaled(weight)
        factors = {
            module: (
                torch.cat([a, other.factors[module][0]]),
                torch.cat([-2 * b, weight * other.factors[module][1]], 1),
            )
            for module, (a, b) in aligned.factors.items()
        }
        away = Adapter(factors, 1.0)
        assert not changed(away, edit(tmp_path, aligned, away, tau=-1e-6, projector=projector))
        assert changed(away, edit(tmp_path, aligned, away, tau=1.0, projector="paper")) == set(MODULES)


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def direction(outputs: int, seed: int = 0) -> Tensor:
    """A vector of length 3."""
    drawn = torch.randn(outputs, generator=torch.Generator().manual_seed(seed + outputs))
    return 3 * drawn / drawn.norm()


def rank_one(scale: float = 0.5) -> Adapter:
    """V = scale v u^T with |v| = 3 and |u| = 2 for every module."""
    return written(lambda outputs, inputs: (2 * _unit(inputs)[None], direction(outputs)[:, None]), scale)


def _unit(width: int, seed: int = 50) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.mark.parametrize(("projector", "factor"), [("paper", 0.5 * 3 * 2), ("exact", 1.0)])
def test_an_update_along_the_one_direction_of_alignment(projector: Any, factor: float, tmp_path: Path) -> None:
    """V = v u^T: C = |v| |u| vv^T/|v|^2, so that a dW in the span of v is scaled, and its cosine is 1."""
    along = written(
        lambda outputs, inputs: (
            torch.stack([_unit(inputs, 1), _unit(inputs, 2)]),
            torch.outer(direction(outputs), torch.tensor([1.0, -4.0])),
        )
    )
    edited = edit(tmp_path, rank_one(), along, tau=1.0 + 1e-6, projector=projector)
    for module, (_, b) in along.factors.items():
        assert close(edited.factors[module][1], factor * b)
    assert not changed(along, edit(tmp_path, rank_one(), along, tau=1 - 1e-5, projector=projector))


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_an_update_across_it_is_taken_away(projector: Any, tmp_path: Path) -> None:
    def across(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        v = direction(outputs)
        b = torch.randn(outputs, 2, generator=torch.Generator().manual_seed(4))
        return torch.stack([_unit(inputs, 1), _unit(inputs, 2)]), b - torch.outer(v, v @ b) / 9

    adapter = written(across)
    edited = edit(tmp_path, rank_one(), adapter, tau=1e-5, projector=projector)
    assert changed(adapter, edited) == set(MODULES)
    for module, (_, b) in adapter.factors.items():
        assert edited.factors[module][1].abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_what_is_left_is_the_part_along_the_direction(projector: Any, tmp_path: Path) -> None:
    adapter = random_adapter(4, 2)
    edited = edit(tmp_path, rank_one(), adapter, tau=1.0, projector=projector)
    for module, (_, b) in adapter.factors.items():
        v = direction(len(b)) / 3
        assert close(edited.factors[module][1], (3.0 if projector == "paper" else 1.0) * torch.outer(v, v @ b))


def test_an_alignment_that_scales_every_output_alike(tmp_path: Path) -> None:
    """V = lambda I: C = lambda / sqrt(d) I, every cosine is 1, and k still takes exactly k of the equals."""
    aligned = written(lambda outputs, inputs: (torch.eye(64), 0.7 * torch.eye(outputs, 64)))
    adapter = random_adapter(4, 2)
    edited = edit(tmp_path, aligned, adapter, tau=1.0 + 1e-6)
    for module, (_, b) in adapter.factors.items():
        assert close(edited.factors[module][1], 0.7 / math.sqrt(len(b)) * b)
    assert not changed(adapter, edit(tmp_path, aligned, adapter, tau=1 - 1e-5))
    for k in (1, 2, 5):
        assert len(changed(adapter, edit(tmp_path, aligned, adapter, k=k))) == k
    exact = edit(tmp_path, aligned, adapter, tau=1.0 + 1e-6, projector="exact")
    assert all(close(exact.factors[module][1], b) for module, (_, b) in adapter.factors.items())


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_the_eigenvalues_of_c(projector: Any, tmp_path: Path) -> None:
    """sigma_i^2 / ||V|| for the paper's, ones for the projector, as many as V has ranks."""
    aligned = random_adapter(4, 1)
    stage = repair_stage(tmp_path, aligned)
    for module in MODULES:
        directions, weights = SafeLoRA(projector=projector).directions(stage.alignment_adapter() or aligned, module)
        values = torch.linalg.svdvals(aligned.delta(module).double())[:4]
        expected = values**2 / values.norm() if projector == "paper" else torch.ones(4)
        assert weights.shape == (4,)
        assert close(weights.sort(descending=True).values, expected)
        assert close(directions.T @ directions, torch.eye(4))


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_ranks_that_alignment_does_not_use_count_for_nothing(projector: Any, tmp_path: Path) -> None:
    """An aligned adapter of rank 4 whose V has rank 2."""
    plain = random_adapter(4, 1)
    aligned = Adapter(
        {module: (a, torch.cat([b[:, :2], b[:, :2] @ torch.tensor([[1.0, 2.0], [0.5, -1.0]])], 1))
         for module, (a, b) in plain.factors.items()}, 1.0,
    )  # fmt: skip
    adapter = random_adapter(4, 2)
    expected, _ = projected(adapter, aligned, projector)
    edited = edit(tmp_path, aligned, adapter, tau=1.0, projector=projector)
    for module in MODULES:
        assert close(edited.factors[module][1], expected[module], 1e-4)
        assert torch.linalg.matrix_rank(edited.factors[module][1], rtol=1e-4) == 2


def test_the_exact_projector_knows_no_size_of_v_and_the_papers_does(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    for number, factor in enumerate((1e-3, -3.0, 40.0)):
        for projector, expected in (("exact", 1.0), ("paper", abs(factor))):
            one = edit(tmp_path / "one", aligned, adapter, tau=1.0, projector=projector)
            other = edit(tmp_path / str(number), aligned.scaled(factor), adapter, tau=1.0, projector=projector)
            for module in MODULES:
                assert close(other.factors[module][1], expected * one.factors[module][1])


def test_the_exact_projector_projects_once_and_the_papers_shrinks_again(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    for projector, again in (("exact", True), ("paper", False)):
        once = edit(tmp_path, aligned, adapter, tau=2.0, projector=projector)
        twice = edit(tmp_path, aligned, once, tau=2.0, projector=projector)
        assert all(close(twice.factors[m][1], once.factors[m][1]) == again for m in MODULES)


# ---------------------------------------------------------------------------------------------------------------------
# Edges


def with_b(adapter: Adapter, values: Mapping[str, Tensor]) -> Adapter:
    """The adapter with other B in some modules."""
    return replace(adapter, factors={m: (a, values.get(m, b)) for m, (a, b) in adapter.factors.items()})


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_a_module_that_the_user_left_alone_is_left_alone(projector: Any, tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    still = with_b(adapter, {MODULES[2]: torch.zeros_like(adapter.factors[MODULES[2]][1])})
    for tau in (0.0, 1.0):
        edited = edit(tmp_path, aligned, still, tau=tau, projector=projector)
        assert changed(still, edited) == (set() if tau == 0 else {*MODULES} - {MODULES[2]})
        assert edited.factors[MODULES[2]][1].abs().max() == 0


def test_a_module_that_the_user_left_alone_is_none_of_the_k(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    still = with_b(adapter, {MODULES[2]: torch.zeros_like(adapter.factors[MODULES[2]][1])})
    _, cosines = projected(adapter, aligned, "paper")
    ranked = sorted({*MODULES} - {MODULES[2]}, key=lambda module: cosines[module])
    for k in (1, 3):
        assert changed(still, edit(tmp_path, aligned, still, k=k)) == set(ranked[:k])


def test_modules_that_alignment_never_adapted_stay(tmp_path: Path) -> None:
    queries = [module for module in MODULES if module.endswith("q_proj")]
    adapter = random_adapter(4, 2)
    edited = edit(tmp_path, random_adapter(4, 1, modules=queries), adapter, tau=1.0)
    assert changed(adapter, edited) == set(queries)


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_an_aligned_module_that_was_not_moved_gives_numbers(projector: Any, tmp_path: Path) -> None:
    plain = random_adapter(4, 1)
    aligned = with_b(plain, {MODULES[0]: torch.zeros_like(plain.factors[MODULES[0]][1])})
    edited = edit(tmp_path, aligned, random_adapter(4, 2), tau=1.0, projector=projector)
    assert all(torch.isfinite(factor).all() for factors in edited.factors.values() for factor in factors)


def test_several_adapters_below_are_one_alignment(tmp_path: Path) -> None:
    """V is what stands between the base and the model that the user was given, in however many adapters."""
    first, second, adapter = random_adapter(2, 1), random_adapter(3, 5, scale=0.5), random_adapter(4, 2)
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    stage, _ = tiny.stage(below=[tmp_path / "first", tmp_path / "second"], name="repair")
    edited = SafeLoRA(tau=1.0).edit(stage, adapter)
    for module, (_, b) in adapter.factors.items():
        v = first.delta(module).double() + second.delta(module).double()
        assert close(edited.factors[module][1], matrix(v, "paper") @ b.double())


def test_without_an_aligned_model_it_is_refused_before_any_work(tmp_path: Path) -> None:
    world = str(make_world(tmp_path))
    Experiment.settle(RunSpec(protocol=world, defense=parse_plugins("safe_lora")))
    with pytest.raises(BadInput, match="safe_lora") as refusal:
        Experiment.settle(RunSpec(protocol=world, defense=parse_plugins("none+safe_lora")))
    assert "'none+safe_lora'" in str(refusal.value)


def test_written_as_on_the_command_line(tmp_path: Path) -> None:
    world = str(make_world(tmp_path))
    found = [
        Experiment.settle(RunSpec(protocol=world, defense=parse_plugins(f"sft+{text}"))).defenses[1].params
        for text in ("safe_lora", "safe_lora=0.35", "safe_lora:k=3,projector=exact")
    ]
    assert found == [
        {"tau": None, "k": 10, "projector": "paper"},
        {"tau": 0.35, "k": 10, "projector": "paper"},
        {"tau": None, "k": 3, "projector": "exact"},
    ]
    with pytest.raises(BadInput, match=r"paper \| exact"):
        Experiment.settle(RunSpec(protocol=world, defense=parse_plugins("sft+safe_lora:projector=none")))
