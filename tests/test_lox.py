"""LoX: the edited adapter compared with dense singular value decompositions in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.defenses.lox import LoX
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.projection import left_singular_vectors
from support import tiny
from support.compare import close

MODULES = {f"model.layers.{layer}.self_attn.{name}_proj": name for layer in (0, 1) for name in "qkv"}
OUTPUTS = {"q": 64, "k": 32, "v": 32}
INPUTS = 64


def random_adapter(rank: int = 4, *, seed: int = 1, size: float = 0.1, scale: float = 2.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, name in MODULES.items():
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, INPUTS), (OUTPUTS[name], rank)))
        factors[module] = (0.1 * a, size * b)
    return Adapter(factors, scale)


def edit(adapter: Adapter, alpha: float, k: int) -> Adapter:
    stage, _ = tiny.stage()
    return LoX(alpha=alpha, k=k).edit(stage, adapter)


def update(adapter: Adapter, module: str) -> Tensor:
    """Return the change of the weight, scale * B A, in float64."""
    a, b = (factor.double() for factor in adapter.factors[module])
    return adapter.scale * b @ a


# ---------------------------------------------------------------------------------------------------------------------
# The edit


@pytest.mark.parametrize("size", [0.1, 1e-5], ids=["ordinary", "tiny"])
@pytest.mark.parametrize(("alpha", "k"), [(1.25, 1), (1.25, 3), (0.3, 4), (1.25, 6)])
def test_the_edit_adds_the_leading_part_of_the_update(alpha: float, k: int, size: float) -> None:
    """The tiny update is below the rounding of weights in bfloat16."""
    adapter = random_adapter(size=size)
    edited = edit(adapter, alpha, k)
    for module in MODULES:
        v = update(adapter, module)
        u, values, vh = torch.linalg.svd(v, full_matrices=False)
        leading = u[:, :k] @ torch.diag(values[:k]) @ vh[:k]
        assert close(update(edited, module), v + alpha * leading)
        assert torch.linalg.matrix_rank(update(edited, module) - v, rtol=1e-4) == min(k, adapter.rank)


def test_only_the_leading_singular_values_grow() -> None:
    adapter = random_adapter()
    edited = edit(adapter, 1.25, 2)
    for module in MODULES:
        before, after = (torch.linalg.svdvals(update(which, module))[:4] for which in (adapter, edited))
        assert close(after, before * torch.tensor([2.25, 2.25, 1.0, 1.0]))
        assert before[1] > 1.05 * before[2]  # the two directions are well defined


def test_only_b_changes() -> None:
    adapter = random_adapter()
    edited = edit(adapter, 1.25, 2)
    assert (edited.scale, edited.rank, set(edited.factors)) == (adapter.scale, adapter.rank, set(adapter.factors))
    for module, (a, b) in adapter.factors.items():
        assert torch.equal(edited.factors[module][0], a)
        assert edited.factors[module][1].dtype == torch.float32
        assert not close(edited.factors[module][1], b, 1e-2)


@pytest.mark.parametrize("k", [4, 100])
def test_with_k_of_at_least_the_rank_the_update_is_scaled(k: int) -> None:
    adapter = random_adapter()
    edited = edit(adapter, 0.75, k)
    for module, (_, b) in adapter.factors.items():
        assert close(edited.factors[module][1], 1.75 * b)


def test_the_scale_of_an_adapter_does_not_change_its_directions() -> None:
    """The singular vectors are those of scale * B A, so B is the same for any scale."""
    adapter = random_adapter()
    edited = edit(adapter, 1.25, 2)
    for scale in (1e-3, 50.0):
        scaled = edit(replace(adapter, scale=scale), 1.25, 2)
        assert all(close(scaled.factors[module][1], edited.factors[module][1]) for module in MODULES)


def test_a_module_without_an_update_is_unchanged() -> None:
    adapter, zero = random_adapter(), next(iter(MODULES))
    factors = {m: (a, torch.zeros_like(b) if m == zero else b) for m, (a, b) in adapter.factors.items()}
    edited = edit(Adapter(factors, 2.0), 1.25, 2)
    assert edited.factors[zero][1].count_nonzero() == 0
    assert all(factor.isfinite().all() for pair in edited.factors.values() for factor in pair)


# ---------------------------------------------------------------------------------------------------------------------
# Singular vectors from the factors


@pytest.mark.parametrize("scale", [2.0, -0.5])
@pytest.mark.parametrize("rank", [1, 4, 48, 100])
def test_left_singular_vectors_of_any_rank(rank: int, scale: float) -> None:
    """Also for a rank above the number of outputs, or of inputs."""
    adapter = random_adapter(rank, scale=scale)
    for module in MODULES:
        v = update(adapter, module)
        vectors, values = left_singular_vectors(adapter, module)
        assert vectors.shape == (len(v), min(rank, *v.shape))
        assert close(values, torch.linalg.svdvals(v)[: len(values)])
        assert close(vectors.T @ vectors, torch.eye(len(values)))
        assert close((v.T @ vectors.double()).norm(dim=0), values)  # each vector with its own value
        assert close(vectors.double() @ vectors.double().T @ v, v)


@pytest.mark.parametrize("rank", [4, 32])
def test_directions_without_an_update_are_left_out(rank: int) -> None:
    """Half of the columns of B are mixtures of the others, up to rounding."""
    plain = random_adapter(rank)
    mixture = torch.randn(rank // 2, rank // 2, generator=torch.Generator().manual_seed(4))
    factors = {
        module: (a, torch.cat([b[:, : rank // 2], b[:, : rank // 2] @ mixture], 1))
        for module, (a, b) in plain.factors.items()
    }
    adapter = Adapter(factors, 2.0)
    for module in MODULES:
        vectors, values = left_singular_vectors(adapter, module)
        assert vectors.shape[1] == len(values) == min(rank // 2, *update(adapter, module).shape)
        assert close(values, torch.linalg.svdvals(update(adapter, module))[: len(values)])
