"""AsFT compared with dense matrices, closed forms of the penalty, and the published faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from harmbench_vaccine.defenses.asft import AsFT
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, gradient_at
from support.compare import close, close_in_norm, same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

MODULES = sorted(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv")
OUTPUTS = {"q": 64, "k": 32, "v": 32}
INPUTS = 64
SCALE = 2.0  # alpha / rank of tiny.settings
PROJECTORS = pytest.mark.parametrize("projector", ["paper", "exact"])


def random_adapter(rank: int = 3, *, seed: int = 1, scale: float = 1.5, size: float = 0.2) -> Adapter:
    """Return an alignment adapter whose rank differs from that of the user's adapter."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            module: (
                size * torch.randn(rank, INPUTS, generator=generator),
                size * torch.randn(OUTPUTS[module[-6]], rank, generator=generator),
            )
            for module in MODULES
        },
        scale,
    )


def rank_one(norm: float) -> Adapter:
    """Return an adapter with V = norm u v^T for unit vectors u and v."""
    return Adapter(
        {
            module: (normalize(torch.ones(1, INPUTS), dim=1), direction(module)[:, None] * norm / 2)
            for module in MODULES
        },
        2.0,
    )


def direction(module: str) -> Tensor:
    """Return u, a random unit vector."""
    return normalize(torch.randn(OUTPUTS[module[-6]], generator=torch.Generator().manual_seed(9)), dim=0)


def user_stage(folder: Path, aligned: Adapter, *, stirred: bool = True, **changes: Any) -> TrainingStage:
    """Return the user stage on an aligned model."""
    aligned.save(folder / "aligned")
    settings = tiny.settings(**changes)
    stage, _ = tiny.stage(trained_with=settings, below=[folder / "aligned"], name="finetune", stirred=stirred)
    return stage


def update(stage: TrainingStage, module: str) -> tuple[Tensor, Tensor]:
    """Return the user's A and B of a module."""
    prefix = f"base_model.model.{module}"
    return tuple(stage.trainable[f"{prefix}.lora_{name}.trained.weight"] for name in "AB")  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations, with dense matrices in float64


def complement(aligned: Adapter, module: str, projector: str) -> Tensor:
    """Return I - C (outputs x outputs)."""
    eye = torch.eye(OUTPUTS[module[-6]], dtype=torch.float64)
    if module not in aligned.factors:
        return eye
    a, b = (factor.double() for factor in aligned.factors[module])
    v = aligned.scale * b @ a
    if not v.any():
        return eye
    if projector == "paper":
        return eye - v @ v.T / torch.linalg.matrix_norm(v, "fro")
    return eye - v @ torch.linalg.pinv(v.T @ v, rtol=1e-10) @ v.T


def penalty(stage: TrainingStage, aligned: Adapter, projector: str, scale: float = 1.0) -> Tensor:
    """Return the sum over modules of ||(I - C) scale B A||_F^2, with a graph."""
    terms = []
    for module in MODULES:
        a, b = update(stage, module)
        terms.append((complement(aligned, module, projector) @ (scale * b.double() @ a.double())).square().sum())
    return torch.stack(terms).sum()


def expected(
    stage: TrainingStage, batch: Batch, aligned: Adapter, lam: float, projector: str, scale: float = 1.0
) -> list[Tensor]:
    parameters = list(stage.trainable.values())
    user = gradient_at(stage, batch, stage.values())
    extra = torch.autograd.grad(penalty(stage, aligned, projector, scale), parameters)
    return [g + lam * e for g, e in zip(user, extra, strict=True)]


@PROJECTORS
@pytest.mark.parametrize(("scaled", "scale"), [(False, 1.0), (True, SCALE)])
def test_gradient_equals_dense_matrices(projector: Any, scaled: bool, scale: float, tmp_path: Path) -> None:
    """The penalty without the LoRA scale is that of the authors' code; `scaled` includes alpha / rank."""
    aligned, batch = random_adapter(), tiny.batch()
    stage = user_stage(tmp_path, aligned)
    gradient = AsFT(lam=3.0, projector=projector, scaled=scaled).gradient(stage, batch)
    values = expected(stage, batch, aligned, 3.0, projector, scale)
    assert close_in_norm(gradient, values)
    total = cross_entropy(stage.model, batch) + 3.0 * penalty(stage, aligned, projector, scale)
    assert gradient.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert not gradient.loss.requires_grad
    assert not close_in_norm(stage.gradient(batch), values, 0.1)  # the penalty is large enough to test


@PROJECTORS
def test_a_module_that_alignment_did_not_change_is_penalized_in_all_directions(projector: Any, tmp_path: Path) -> None:
    """C = 0 for V = 0. The authors' code pairs C and modules by their order, so that a missing one shifts the rest."""
    complete = random_adapter()
    factors = {module: complete.factors[module] for module in MODULES[1:]}  # alignment without the first module
    factors[MODULES[2]] = (factors[MODULES[2]][0], torch.zeros_like(factors[MODULES[2]][1]))
    aligned, batch = Adapter(factors, complete.scale), tiny.batch()
    stage = user_stage(tmp_path, aligned)
    gradient = AsFT(lam=3.0, projector=projector).gradient(stage, batch)
    assert close_in_norm(gradient, expected(stage, batch, aligned, 3.0, projector))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """The penalty does not grow with accumulation, as it does in the authors' code."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    changes |= {"schedule": "constant", "warmup": 0.0}
    aligned, batches = random_adapter(), []
    stage, twin = (user_stage(tmp_path, aligned, **changes) for _ in range(2))

    class RecordingAsFT(AsFT):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    rows = tiny.rows(12 * accumulation)
    train(stage, RecordingAsFT(lam=3.0), rows, stage.settings, tmp_path / "checkpoints", pad=tiny.PAD)
    assert len(batches) == 3 * accumulation

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [expected(twin, batches[n], aligned, 3.0, "paper") for n in numbers]
        return [torch.stack(values).mean(0) for values in zip(*micro, strict=True)]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [partial(mean, numbers) for numbers in steps])
    assert_equal_where_firm(stage, twin, firm)


# ---------------------------------------------------------------------------------------------------------------------
# The penalty alone


def penalty_of(stage: TrainingStage, **params: Any) -> Gradient:
    """Return the penalty with its gradient: the loss of the user's rows is 0."""
    user = stage.gradient
    stage.gradient = lambda batch: 0.0 * user(batch)  # type: ignore[method-assign]
    try:
        return AsFT(lam=1.0, **params).gradient(stage, tiny.batch())
    finally:
        stage.gradient = user  # type: ignore[method-assign]


def set_updates(stage: TrainingStage, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for module, factors in values.items():
            for parameter, value in zip(update(stage, module), factors, strict=True):
                parameter.copy_(value)


def parallel_and_orthogonal(stage: TrainingStage) -> tuple[float, float]:
    """Return the sums over modules of ||u^T B A||^2 and ||B A||^2 - ||u^T B A||^2."""
    inside = total = 0.0
    for module in MODULES:
        a, b = (factor.detach().double() for factor in update(stage, module))
        inside += float((direction(module).double() @ b @ a).square().sum())
        total += float((b @ a).square().sum())
    return inside, total - inside


@pytest.mark.parametrize("norm", [0.01, 1.0, 10.0])
def test_an_alignment_of_rank_one_in_closed_form(norm: float, tmp_path: Path) -> None:
    """Along u, the penalty of the paper is (1 - ||V||)^2 times that of the other directions; `exact` has none."""
    stage = user_stage(tmp_path, rank_one(norm))
    inside, outside = parallel_and_orthogonal(stage)
    paper, exact = penalty_of(stage).loss.item(), penalty_of(stage, projector="exact").loss.item()
    assert paper == pytest.approx((1 - norm) ** 2 * inside + outside, rel=1e-5)
    assert exact == pytest.approx(outside, rel=1e-5)


@PROJECTORS
def test_an_update_along_an_alignment_of_rank_one_and_norm_1_has_no_penalty(projector: Any, tmp_path: Path) -> None:
    stage = user_stage(tmp_path, rank_one(1.0))
    generator = torch.Generator().manual_seed(5)
    parallel, orthogonal = {}, {}
    for module in MODULES:
        u, row, a = direction(module), torch.randn(4, generator=generator), torch.randn(4, INPUTS, generator=generator)
        b = torch.randn(len(u), 4, generator=generator)
        parallel[module], orthogonal[module] = (a, torch.outer(u, row)), (a, b - torch.outer(u, u @ b))
    set_updates(stage, orthogonal)
    largest = penalty_of(stage, projector=projector)
    assert largest.loss.item() == pytest.approx(sum(parallel_and_orthogonal(stage)), rel=1e-5)
    set_updates(stage, parallel)
    gradient = penalty_of(stage, projector=projector)
    assert abs(gradient.loss.item()) < 1e-6 * largest.loss.item()
    assert gradient.norm < 1e-6 * largest.norm


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_only_the_exact_projector_is_independent_of_the_scale_of_alignment(factor: float, tmp_path: Path) -> None:
    aligned = random_adapter()
    values = {}
    for name, adapter in (("plain", aligned), ("scaled", aligned.scaled(factor))):
        stage = user_stage(tmp_path / name, adapter)
        values[name] = {projector: penalty_of(stage, projector=projector) for projector in ("paper", "exact")}
    assert close(values["scaled"]["exact"], values["plain"]["exact"])
    assert values["scaled"]["exact"].loss.item() == pytest.approx(values["plain"]["exact"].loss.item(), rel=1e-5)
    assert not close(values["scaled"]["paper"], values["plain"]["paper"], 0.1)


@PROJECTORS
@pytest.mark.parametrize("factor", ["A", "B"])
def test_gradient_equals_finite_differences(factor: str, projector: Any, tmp_path: Path) -> None:
    """The penalty is quadratic in A and in B, so a central difference is exact."""
    stage = user_stage(tmp_path, random_adapter())
    gradient = penalty_of(stage, projector=projector)
    generator, slope, shifts = torch.Generator().manual_seed(1), 0.0, []
    for (name, parameter), value in zip(stage.trainable.items(), gradient.values, strict=True):
        assert value is not None
        shift = 0.1 * torch.randn(parameter.shape, generator=generator) * (f".lora_{factor}." in name)
        slope += float((shift.double() * value.double()).sum())
        shifts.append(shift)
    ends = []
    for sign in (1, -1):
        with stage.shifted([sign * shift for shift in shifts]):
            ends.append(penalty_of(stage, projector=projector).loss.item())
    assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=1e-4)
    assert abs(slope) > 1e-2 * gradient.loss.item()


def test_a_new_adapter_has_no_penalty(tmp_path: Path) -> None:
    """B = 0, so that the first gradient is that of SFT."""
    stage, batch = user_stage(tmp_path, random_adapter(), stirred=False), tiny.batch()
    gradient, sft = AsFT(lam=100.0).gradient(stage, batch), stage.gradient(batch)
    assert close(gradient, sft)
    assert gradient.loss == sft.loss


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters and the trainer


def test_parameters_are_bit_identical_after_the_gradient(tmp_path: Path) -> None:
    stage, batch = user_stage(tmp_path, random_adapter()), tiny.batch()
    initial, complete = stage.values(), AsFT(lam=3.0).gradient(stage, batch)
    first, *others = stage.trainable.values()
    first.requires_grad_(False)
    gradient = AsFT(lam=3.0).gradient(stage, batch)
    assert same(stage.values(), initial)
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    assert gradient.values[0] is None
    assert close(gradient.values[1:], complete.values[1:])
    assert all(parameter.requires_grad for parameter in others)


def run_stage(defense: Defense, folder: Path, aligned: Path) -> tuple[dict[str, Tensor], list[Any]]:
    """Train a short stage with new objects and return the adapter and the log."""
    settings = tiny.settings(lora_dropout=0.1, batch=3, accumulation=2)
    stage, _ = tiny.stage(trained_with=settings, below=[aligned], name="finetune", stirred=True)
    log = train(stage, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in stage.trainable.items()}, log


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    """The projectors are computed again after an interruption."""
    aligned = tmp_path / "aligned"
    random_adapter().save(aligned)
    complete = run_stage(AsFT(lam=3.0), tmp_path / "complete", aligned)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(AsFT(lam=3.0), "gradient", 8), tmp_path / "cut", aligned)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run_stage(AsFT(lam=3.0), tmp_path / "cut", aligned), complete)
