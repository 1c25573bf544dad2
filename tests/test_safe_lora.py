"""Safe LoRA: C and the selection of modules, compared with dense matrices and closed forms."""

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
from harmbench_vaccine.training.projection import alignment_projector
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.compare import close
from support.world import make_world

MODULES = sorted(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv")
WIDTHS = {"q": (64, 64), "k": (32, 64), "v": (32, 64)}  # outputs, inputs

# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations, with dense matrices in float64


def matrix(v: Tensor, projector: str) -> Tensor:
    """Return C (outputs x outputs) for the alignment update of a weight."""
    v = v.double()
    if projector == "paper":
        return v @ v.T / torch.linalg.matrix_norm(v, "fro")
    return v @ torch.linalg.pinv(v.T @ v, rtol=1e-10) @ v.T


def cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / (left.norm() * right.norm()))


def project(adapter: Adapter, aligned: Adapter, projector: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return module -> C B, and module -> the cosine of C B A and B A."""
    products, cosines = {}, {}
    for module, (a, b) in adapter.factors.items():
        a_al, b_al = (factor.double() for factor in aligned.factors[module])
        products[module] = matrix(aligned.scale * b_al @ a_al, projector) @ b.double()
        cosines[module] = cosine(products[module] @ a.double(), b.double() @ a.double())
    return products, cosines


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


def make_adapter(make: Callable[[int, int], tuple[Tensor, Tensor]], scale: float = 1.0) -> Adapter:
    """Return an adapter; `make(outputs, inputs)` returns the (A, B) of a module."""
    return Adapter({module: make(*WIDTHS[module[-6]]) for module in MODULES}, scale)


def repair_stage(folder: Path, aligned: Adapter) -> TrainingStage:
    """Return the repair stage on top of an aligned model."""
    aligned.save(folder)
    stage, _ = tiny.stage(below=[folder], name="repair")
    return stage


def edit(folder: Path, aligned: Adapter, adapter: Adapter, **params: Any) -> Adapter:
    return SafeLoRA(**params).edit(repair_stage(folder, aligned), adapter)


def changed_modules(old: Adapter, new: Adapter) -> set[str]:
    """Return the modules whose B changed; assert that A, the scale and the modules did not change."""
    assert new.scale == old.scale
    assert set(new.factors) == set(old.factors)
    assert all(torch.equal(new.factors[module][0], a) for module, (a, _) in old.factors.items())
    return {module for module, (_, b) in old.factors.items() if not torch.equal(new.factors[module][1], b)}


# ---------------------------------------------------------------------------------------------------------------------
# The edit


@pytest.mark.parametrize("projector", ["paper", "exact"])
@pytest.mark.parametrize("ranks", [(4, 4), (3, 6)])
def test_the_edit_equals_the_equations(projector: Any, ranks: tuple[int, int], tmp_path: Path) -> None:
    aligned, adapter = random_adapter(ranks[0], 1), random_adapter(ranks[1], 2, scale=0.5)
    expected, cosines = project(adapter, aligned, projector)
    edited = edit(tmp_path, aligned, adapter, tau=1.0, projector=projector)
    assert changed_modules(adapter, edited) == set(MODULES)
    assert edited.rank == ranks[1]
    for module in MODULES:
        assert close(edited.factors[module][1], expected[module])
        assert 0 < cosines[module] < 1


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_without_tau_the_k_modules_with_the_smallest_cosine_are_projected(projector: Any, tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    expected, cosines = project(adapter, aligned, projector)
    ranked = sorted(MODULES, key=lambda module: cosines[module])
    assert ranked != MODULES
    for k in range(8):
        edited = edit(tmp_path, aligned, adapter, k=k, projector=projector)
        assert changed_modules(adapter, edited) == set(ranked[:k])
        assert all(close(edited.factors[module][1], expected[module]) for module in ranked[:k])


def test_with_tau_modules_with_a_cosine_of_at_most_tau_are_projected(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    _, cosines = project(adapter, aligned, "paper")
    values = sorted(cosines.values())
    for tau in [0.0, *((low + high) / 2 for low, high in pairwise(values)), 1.0]:
        edited = edit(tmp_path, aligned, adapter, tau=tau, k=1)  # tau has priority over k
        assert changed_modules(adapter, edited) == {module for module in MODULES if cosines[module] <= tau}, tau


def test_the_scales_do_not_change_the_selection(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    chosen = changed_modules(adapter, edit(tmp_path / "plain", aligned, adapter, k=3))
    for number, (below, above) in enumerate(((50.0, 1.0), (1e-3, 1.0), (1.0, 1e-3))):
        scaled = adapter.scaled(above)
        assert changed_modules(scaled, edit(tmp_path / str(number), aligned.scaled(below), scaled, k=3)) == chosen


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_neutral_equals_the_tuned_adapter_bit_for_bit(projector: Any, tmp_path: Path) -> None:
    assert SafeLoRA.neutral == {"k": 0}
    for seed in range(5):
        aligned, adapter = random_adapter(4, seed), random_adapter(4, 10 + seed)
        assert not changed_modules(adapter, edit(tmp_path / str(seed), aligned, adapter, k=0, projector=projector))
        # C is positive semi-definite, so no cosine is negative.
        assert not changed_modules(
            adapter, edit(tmp_path / str(seed), aligned, adapter, tau=-1e-6, projector=projector)
        )


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_the_cosine_is_never_negative(projector: Any, tmp_path: Path) -> None:
    """Also for an update that points away from alignment: dW = -V plus a random part."""
    aligned = random_adapter(4, 1)
    for weight in (0.0, 0.1, 1.0, 10.0):
        random_part = random_adapter(4, 2).scaled(weight)
        factors = {
            module: (
                torch.cat([a, random_part.factors[module][0]]),
                torch.cat([-2 * b, weight * random_part.factors[module][1]], 1),
            )
            for module, (a, b) in aligned.factors.items()
        }
        opposite = Adapter(factors, 1.0)
        assert not changed_modules(opposite, edit(tmp_path, aligned, opposite, tau=-1e-6, projector=projector))
        assert changed_modules(opposite, edit(tmp_path, aligned, opposite, tau=1.0, projector="paper")) == set(MODULES)


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def direction(outputs: int, seed: int = 0) -> Tensor:
    """Return a random vector of length 3."""
    vector = torch.randn(outputs, generator=torch.Generator().manual_seed(seed + outputs))
    return 3 * vector / vector.norm()


def rank_one(scale: float = 0.5) -> Adapter:
    """Return an adapter with V = scale v u^T, |v| = 3 and |u| = 2 for every module."""
    return make_adapter(lambda outputs, inputs: (2 * _unit(inputs)[None], direction(outputs)[:, None]), scale)


def _unit(width: int, seed: int = 50) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.mark.parametrize(("projector", "factor"), [("paper", 0.5 * 3 * 2), ("exact", 1.0)])
def test_an_update_parallel_to_a_rank_one_alignment_is_scaled(projector: Any, factor: float, tmp_path: Path) -> None:
    """V = v u^T: C = |v| |u| vv^T/|v|^2, so a dW in the span of v is scaled, and its cosine is 1."""
    parallel = make_adapter(
        lambda outputs, inputs: (
            torch.stack([_unit(inputs, 1), _unit(inputs, 2)]),
            torch.outer(direction(outputs), torch.tensor([1.0, -4.0])),
        )
    )
    edited = edit(tmp_path, rank_one(), parallel, tau=1.0 + 1e-6, projector=projector)
    for module, (_, b) in parallel.factors.items():
        assert close(edited.factors[module][1], factor * b)
    assert not changed_modules(parallel, edit(tmp_path, rank_one(), parallel, tau=1 - 1e-5, projector=projector))


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_an_update_orthogonal_to_alignment_is_removed(projector: Any, tmp_path: Path) -> None:
    def orthogonal(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        v = direction(outputs)
        b = torch.randn(outputs, 2, generator=torch.Generator().manual_seed(4))
        return torch.stack([_unit(inputs, 1), _unit(inputs, 2)]), b - torch.outer(v, v @ b) / 9

    adapter = make_adapter(orthogonal)
    edited = edit(tmp_path, rank_one(), adapter, tau=1e-5, projector=projector)
    assert changed_modules(adapter, edited) == set(MODULES)
    for module, (_, b) in adapter.factors.items():
        assert edited.factors[module][1].abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_the_result_is_the_component_along_the_direction(projector: Any, tmp_path: Path) -> None:
    adapter = random_adapter(4, 2)
    edited = edit(tmp_path, rank_one(), adapter, tau=1.0, projector=projector)
    for module, (_, b) in adapter.factors.items():
        v = direction(len(b)) / 3
        assert close(edited.factors[module][1], (3.0 if projector == "paper" else 1.0) * torch.outer(v, v @ b))


def test_an_alignment_that_scales_all_outputs_equally(tmp_path: Path) -> None:
    """V = lambda I: C = lambda / sqrt(d) I, every cosine is 1, and exactly k of the tied modules are selected."""
    aligned = make_adapter(lambda outputs, inputs: (torch.eye(64), 0.7 * torch.eye(outputs, 64)))
    adapter = random_adapter(4, 2)
    edited = edit(tmp_path, aligned, adapter, tau=1.0 + 1e-6)
    for module, (_, b) in adapter.factors.items():
        assert close(edited.factors[module][1], 0.7 / math.sqrt(len(b)) * b)
    assert not changed_modules(adapter, edit(tmp_path, aligned, adapter, tau=1 - 1e-5))
    for k in (1, 2, 5):
        assert len(changed_modules(adapter, edit(tmp_path, aligned, adapter, k=k))) == k
    exact = edit(tmp_path, aligned, adapter, tau=1.0 + 1e-6, projector="exact")
    assert all(close(exact.factors[module][1], b) for module, (_, b) in adapter.factors.items())


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_the_eigenvalues_of_c(projector: Any, tmp_path: Path) -> None:
    """rank(V) eigenvalues: sigma_i^2 / ||V|| (paper), or 1 (exact)."""
    aligned = random_adapter(4, 1)
    stage = repair_stage(tmp_path, aligned)
    for module in MODULES:
        directions, weights = alignment_projector(stage.alignment_adapter() or aligned, module, projector)
        values = torch.linalg.svdvals(aligned.delta(module).double())[:4]
        expected = values**2 / values.norm() if projector == "paper" else torch.ones(4)
        assert weights.shape == (4,)
        assert close(weights.sort(descending=True).values, expected)
        assert close(directions.T @ directions, torch.eye(4))


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_unused_ranks_of_alignment_have_no_effect(projector: Any, tmp_path: Path) -> None:
    """An aligned adapter of rank 4 whose V has rank 2."""
    plain = random_adapter(4, 1)
    mixture = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    factors = {module: (a, torch.cat([b[:, :2], b[:, :2] @ mixture], 1)) for module, (a, b) in plain.factors.items()}
    aligned = Adapter(factors, 1.0)
    adapter = random_adapter(4, 2)
    expected, _ = project(adapter, aligned, projector)
    edited = edit(tmp_path, aligned, adapter, tau=1.0, projector=projector)
    for module in MODULES:
        assert close(edited.factors[module][1], expected[module], 1e-4)
        assert torch.linalg.matrix_rank(edited.factors[module][1], rtol=1e-4) == 2


def test_only_the_projector_of_the_paper_depends_on_the_scale_of_v(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    for number, factor in enumerate((1e-3, -3.0, 40.0)):
        for projector, expected in (("exact", 1.0), ("paper", abs(factor))):
            plain = edit(tmp_path / "one", aligned, adapter, tau=1.0, projector=projector)
            scaled = edit(tmp_path / str(number), aligned.scaled(factor), adapter, tau=1.0, projector=projector)
            for module in MODULES:
                assert close(scaled.factors[module][1], expected * plain.factors[module][1])


def test_only_the_exact_projector_is_idempotent(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    for projector, again in (("exact", True), ("paper", False)):
        once = edit(tmp_path, aligned, adapter, tau=2.0, projector=projector)
        twice = edit(tmp_path, aligned, once, tau=2.0, projector=projector)
        assert all(close(twice.factors[m][1], once.factors[m][1]) == again for m in MODULES)


# ---------------------------------------------------------------------------------------------------------------------
# Edges


def with_b(adapter: Adapter, values: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter with other values of B in some modules."""
    return replace(adapter, factors={m: (a, values.get(m, b)) for m, (a, b) in adapter.factors.items()})


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_a_module_without_user_update_is_unchanged(projector: Any, tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    update = with_b(adapter, {MODULES[2]: torch.zeros_like(adapter.factors[MODULES[2]][1])})
    for tau in (0.0, 1.0):
        edited = edit(tmp_path, aligned, update, tau=tau, projector=projector)
        assert changed_modules(update, edited) == (set() if tau == 0 else {*MODULES} - {MODULES[2]})
        assert edited.factors[MODULES[2]][1].abs().max() == 0


def test_a_module_without_user_update_is_not_one_of_the_k(tmp_path: Path) -> None:
    aligned, adapter = random_adapter(4, 1), random_adapter(4, 2)
    update = with_b(adapter, {MODULES[2]: torch.zeros_like(adapter.factors[MODULES[2]][1])})
    _, cosines = project(adapter, aligned, "paper")
    ranked = sorted({*MODULES} - {MODULES[2]}, key=lambda module: cosines[module])
    for k in (1, 3):
        assert changed_modules(update, edit(tmp_path, aligned, update, k=k)) == set(ranked[:k])


def test_modules_without_alignment_adapter_are_unchanged(tmp_path: Path) -> None:
    queries = [module for module in MODULES if module.endswith("q_proj")]
    adapter = random_adapter(4, 2)
    edited = edit(tmp_path, random_adapter(4, 1, modules=queries), adapter, tau=1.0)
    assert changed_modules(adapter, edited) == set(queries)


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_a_zero_alignment_update_gives_finite_numbers(projector: Any, tmp_path: Path) -> None:
    plain = random_adapter(4, 1)
    aligned = with_b(plain, {MODULES[0]: torch.zeros_like(plain.factors[MODULES[0]][1])})
    edited = edit(tmp_path, aligned, random_adapter(4, 2), tau=1.0, projector=projector)
    assert all(torch.isfinite(factor).all() for factors in edited.factors.values() for factor in factors)


def test_several_adapters_below_form_one_alignment(tmp_path: Path) -> None:
    """V is the difference between the base model and the model before the user stage, for any number of adapters."""
    first, second, adapter = random_adapter(2, 1), random_adapter(3, 5, scale=0.5), random_adapter(4, 2)
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    stage, _ = tiny.stage(below=[tmp_path / "first", tmp_path / "second"], name="repair")
    edited = SafeLoRA(tau=1.0).edit(stage, adapter)
    for module, (_, b) in adapter.factors.items():
        v = first.delta(module).double() + second.delta(module).double()
        assert close(edited.factors[module][1], matrix(v, "paper") @ b.double())


def test_a_missing_aligned_model_is_refused_before_any_work(tmp_path: Path) -> None:
    world = str(make_world(tmp_path))
    Experiment.settle(RunSpec(protocol=world, defense=parse_plugins("safe_lora")))
    with pytest.raises(BadInput, match="safe_lora") as refusal:
        Experiment.settle(RunSpec(protocol=world, defense=parse_plugins("none+safe_lora")))
    assert "'none+safe_lora'" in str(refusal.value)


def test_parameters_from_the_command_line(tmp_path: Path) -> None:
    world = str(make_world(tmp_path))
    parameters = [
        Experiment.settle(RunSpec(protocol=world, defense=parse_plugins(f"sft+{text}"))).defenses[1].params
        for text in ("safe_lora", "safe_lora=0.35", "safe_lora:k=3,projector=exact")
    ]
    assert parameters == [
        {"tau": None, "k": 10, "projector": "paper"},
        {"tau": 0.35, "k": 10, "projector": "paper"},
        {"tau": None, "k": 3, "projector": "exact"},
    ]
    with pytest.raises(BadInput, match=r"paper \| exact"):
        Experiment.settle(RunSpec(protocol=world, defense=parse_plugins("sft+safe_lora:projector=none")))
