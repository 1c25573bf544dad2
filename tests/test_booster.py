"""Booster compared with its equations in plain PyTorch: loss, gradients, shift and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.booster import Booster
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.training import lora_linear
from harmbench_vaccine.training.dropout import draw_mask
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import (
    cross_entropy,
    gradient_at,
    length,
    random_coefficients,
    record_stream,
    replace_harmful_loss,
)
from support.compare import close_in_norm, same
from support.hooks import recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

POOLS = tiny.example_pools()


def stage(**changes: Any) -> TrainingStage:
    """Return an alignment stage with harmful rows at its first micro-batch, with a nonzero adapter."""
    result, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=POOLS)
    result.step, result.steps = 1, 10
    return result


def expected_gradient(
    stage: TrainingStage, batch: Batch, harmful: Batch, lam: float, alpha: float, seed: int | None = None
) -> list[Tensor]:
    """Compute the gradient from the paper's equations; with a seed, every pass starts from the same random state."""
    w = [parameter.detach().clone() for parameter in stage.trainable.values()]
    g_h = gradient_at(stage, harmful, w, seed)
    shifted = [value - alpha * g / (length(g_h) + 1e-7) for value, g in zip(w, g_h, strict=True)]
    g_shifted = gradient_at(stage, harmful, shifted, seed)
    g_a = gradient_at(stage, batch, w, seed)
    return [a + lam * (h - s) for a, h, s in zip(g_a, g_h, g_shifted, strict=True)]


def run_stage(defense: Defense, folder: Path, salt: int = 0, **changes: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Train a short stage with new objects and return the adapter and the log."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "epochs": 2, **changes})
    torch.manual_seed(salt)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    log = train(training, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in training.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@pytest.mark.parametrize(("lam", "alpha"), [(5.0, 0.1), (1.0, 1.0), (0.5, 5.0)])
def test_gradient_equals_plain_autograd(lam: float, alpha: float) -> None:
    training, batch = stage(), tiny.batch()
    harmful = record_stream(training)
    gradient = Booster(lam=lam, alpha=alpha).gradient(training, batch)
    assert len(harmful) == 1  # both harmful passes use one batch
    expected = expected_gradient(training, batch, harmful[0], lam, alpha)
    assert close_in_norm(gradient, expected)
    assert not close_in_norm(training.gradient(batch), expected, 1e-2)  # the correction is large enough to test
    assert gradient.loss.item() == pytest.approx(
        cross_entropy(training.model, batch).item()
        + lam * (cross_entropy(training.model, harmful[0]).item() - loss_after(training, harmful[0], alpha)),
        rel=1e-4,
    )
    assert not gradient.loss.requires_grad


def loss_after(stage: TrainingStage, harmful: Batch, alpha: float) -> float:
    """Return L_h after the simulated step."""
    parameters = list(stage.trainable.values())
    initial = [parameter.detach().clone() for parameter in parameters]
    g = gradient_at(stage, harmful, initial)
    for parameter, value, slope in zip(parameters, initial, g, strict=True):
        parameter.data = value - alpha * slope / length(g)
    loss = cross_entropy(stage.model, harmful).item()
    for parameter, value in zip(parameters, initial, strict=True):
        parameter.data = value
    return loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """With accumulation, a step is the mean of two composed gradients with different harmful rows."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    settings = tiny.settings(**changes, schedule="constant", warmup=0.0)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    harmful = record_stream(training)
    batches: list[Batch] = []

    class RecordingBooster(Booster):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    train(
        training, RecordingBooster(lam=5.0, alpha=1.0), tiny.rows(12 * accumulation), settings, tmp_path, pad=tiny.PAD
    )
    assert len(batches) == len(harmful) == 3 * accumulation
    assert len({str(rows["input_ids"].tolist()) for rows in harmful}) == 3 * accumulation

    twin, _ = tiny.stage(trained_with=settings, stirred=True)
    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [expected_gradient(twin, batches[n], harmful[n], 5.0, 1.0) for n in numbers]
        return [torch.stack(gradients).mean(0) for gradients in zip(*micro, strict=True)]

    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    assert_equal_where_firm(training, twin, firm)


def test_correction_tends_to_the_hessian_along_the_harmful_gradient() -> None:
    """For small alpha the correction is lam * alpha * H g_h / ||g_h||, with H g_h from a second differentiation."""
    training, batch = stage(), tiny.batch()
    harmful = record_stream(training)
    lam, alpha = 2.0, 1e-2
    gradient = Booster(lam=lam, alpha=alpha).gradient(training, batch)
    correction = [a - b for a, b in zip(gradient.values, training.gradient(batch).values, strict=True)]
    parameters = list(training.trainable.values())
    # `cross_entropy` and this kernel have a second derivative
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        g_h = torch.autograd.grad(cross_entropy(training.model, harmful[0]), parameters, create_graph=True)
        squared_norm = sum((g * g.detach()).sum() for g in g_h)
        hessian_products = torch.autograd.grad(squared_norm, parameters)  # type: ignore[arg-type]
    expected = [lam * alpha * product / length(g_h).detach() for product in hessian_products]
    error = length([a - b for a, b in zip(correction, expected, strict=True)]) / length(expected)
    assert error < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Harmful losses in closed form


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_quadratic_harmful_loss_in_closed_form(scale: float) -> None:
    """L_h = scale * (w'Hw/2 + b'w) is corrected by scale * lam * alpha * H g/||g||: the shift has no scale."""
    training, batch = stage(), tiny.batch()
    h, b = [coefficient.abs() for coefficient in random_coefficients(training, 1)], random_coefficients(training, 2)
    clean = training.gradient(batch)
    replace_harmful_loss(
        training,
        lambda w: scale * sum((h_i * w_i**2 / 2 + b_i * w_i).sum() for h_i, b_i, w_i in zip(h, b, w, strict=True)),
    )
    gradient = Booster(lam=5.0, alpha=0.5).gradient(training, batch)
    with torch.no_grad():
        g = [h_i * w_i + b_i for h_i, b_i, w_i in zip(h, b, training.trainable.values(), strict=True)]
        expected = [scale * 5.0 * 0.5 * h_i * g_i / length(g) for h_i, g_i in zip(h, g, strict=True)]
    correction = [a - c for a, c in zip(gradient.values, clean.values, strict=True)]
    assert length([a - e for a, e in zip(correction, expected, strict=True)]) < 1e-4 * length(expected)


def test_linear_harmful_loss_has_no_correction() -> None:
    training, batch = stage(), tiny.batch()
    slopes = random_coefficients(training, 1)
    clean = training.gradient(batch)
    replace_harmful_loss(training, lambda w: sum((c * w_i).sum() for c, w_i in zip(slopes, w, strict=True)))
    assert same(list(Booster(lam=50.0, alpha=5.0).gradient(training, batch).values), list(clean.values))


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, and the rows of each pass


def test_parameters_are_bit_identical_after_the_gradient() -> None:
    training = stage()
    initial = [parameter.detach().clone() for parameter in training.trainable.values()]
    Booster(lam=5.0, alpha=30.0).gradient(training, tiny.batch())
    assert same([parameter.detach() for parameter in training.trainable.values()], initial)
    assert all(parameter.grad is None for parameter in training.trainable.values())
    assert all(parameter.requires_grad for parameter in training.trainable.values())


def test_a_frozen_parameter_has_no_gradient() -> None:
    """Another defense may freeze a parameter: it then has no gradient, no share in the norm and no shift."""
    training, batch = stage(), tiny.batch()
    harmful = record_stream(training)
    first, *others = training.trainable.values()
    first.requires_grad_(False)
    gradient = Booster(lam=5.0, alpha=1.0).gradient(training, batch)
    assert gradient.values[0] is None
    training.trainable = dict(list(training.trainable.items())[1:])
    assert close_in_norm(
        Gradient(gradient.loss, gradient.values[1:]), expected_gradient(training, batch, harmful[0], 5.0, 1.0)
    )
    assert len(others) == len(gradient.values) - 1


def test_two_passes_use_the_same_harmful_rows_and_one_uses_the_batch() -> None:
    training, batch = stage(), tiny.batch()
    with recorded_rows(training.model) as passes:
        Booster().gradient(training, batch)
    first, second, third = passes
    assert first == second
    assert third == [[token for token in row if token != tiny.PAD] for row in batch["input_ids"].tolist()]
    pool = [row.ids for row in tiny.encode(POOLS.harmful)]
    assert len(first) == training.settings.batch
    assert all(row in pool for row in first)


def test_missing_harmful_rows_are_refused() -> None:
    training = stage()
    training.pools = Pools()
    with pytest.raises(BadInput):
        Booster().gradient(training, tiny.batch())


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


def test_both_harmful_passes_see_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    training = stage(lora_dropout=0.3)
    training.model.train()
    masks: list[list[Tensor]] = []
    training.model.register_forward_pre_hook(lambda module, args: masks.append([]))

    def draw(x: Tensor, rate: float) -> Tensor:
        mask = draw_mask(x, rate)
        masks[-1].append(mask == 0)
        return mask

    monkeypatch.setattr(lora_linear, "draw_mask", draw)
    torch.manual_seed(5)
    Booster(lam=5.0, alpha=5.0).gradient(training, tiny.batch())
    torch.manual_seed(6)
    Booster(lam=5.0, alpha=5.0).gradient(training, tiny.batch())
    first, second, _, again, *_ = masks
    assert len(first) == 6  # three modules in two layers
    assert all(0.1 < mask.float().mean() < 0.5 for mask in first)
    assert same(first, second)
    assert not same(first, again)  # the next call has different masks


def test_all_passes_start_from_the_same_random_state() -> None:
    training, batch = stage(lora_dropout=0.3), tiny.batch()
    training.model.train()
    harmful = record_stream(training)
    torch.manual_seed(5)
    gradient = Booster(lam=5.0, alpha=1.0).gradient(training, batch)
    assert close_in_norm(gradient, expected_gradient(training, batch, harmful[0], 5.0, 1.0, seed=5))
    assert not close_in_norm(gradient, expected_gradient(training, batch, harmful[0], 5.0, 1.0, seed=6), 1e-2)


@pytest.mark.parametrize("neutral", [Booster(lam=0.0, alpha=1.0), Booster(lam=5.0, alpha=0.0)], ids=["lam", "alpha"])
def test_lam_0_or_alpha_0_equals_sft_bit_for_bit_with_dropout(neutral: Booster, tmp_path: Path) -> None:
    """The harmful passes therefore use no random numbers of the steps, and differ only by the shift."""
    sft = run_stage(SFT(), tmp_path / "sft")
    assert_same(run_stage(neutral, tmp_path / "neutral"), sft)
    corrected = run_stage(Booster(lam=5.0, alpha=1.0), tmp_path / "corrected")
    assert not same(list(corrected[0].values()), list(sft[0].values()))


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2}
    complete = run_stage(Booster(alpha=1.0), tmp_path / "complete", **changes)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(Booster(alpha=1.0), "gradient", 8), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run_stage(Booster(alpha=1.0), tmp_path / "cut", salt=2, **changes), complete)
