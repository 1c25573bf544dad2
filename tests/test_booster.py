"""Booster against its equations in plain PyTorch: own loss, own gradients, own shift, own optimizer."""

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
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

POOLS = tiny.example_pools()


def stage(**changes: Any) -> TrainingStage:
    """The first micro-batch of an alignment stage with harmful rows, its adapter away from zero."""
    made, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=POOLS)
    made.step, made.steps = 1, 10
    return made


def rederived(
    stage: TrainingStage, batch: Batch, harmful: Batch, lam: float, alpha: float, seed: int | None = None
) -> list[Tensor]:
    """The paper's three lines; with a seed, every pass begins at the same random state."""
    w = [parameter.detach().clone() for parameter in stage.trainable.values()]
    g_h = gradient_at(stage, harmful, w, seed)
    shifted = [value - alpha * g / (length(g_h) + 1e-7) for value, g in zip(w, g_h, strict=True)]
    after = gradient_at(stage, harmful, shifted, seed)
    g_a = gradient_at(stage, batch, w, seed)
    return [a + lam * (h - there) for a, h, there in zip(g_a, g_h, after, strict=True)]


def run(defense: Defense, folder: Path, salt: int = 0, **changes: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """A short stage from fresh objects: the adapter and the log."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "epochs": 2, **changes})
    torch.manual_seed(salt)
    made, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    log = train(made, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in made.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations


@pytest.mark.parametrize(("lam", "alpha"), [(5.0, 0.1), (1.0, 1.0), (0.5, 5.0)])
def test_gradient_equals_plain_autograd(lam: float, alpha: float) -> None:
    made, batch = stage(), tiny.batch()
    given = record_stream(made)
    gradient = Booster(lam=lam, alpha=alpha).gradient(made, batch)
    assert len(given) == 1  # one batch serves both harmful passes
    expected = rederived(made, batch, given[0], lam, alpha)
    assert close_in_norm(gradient, expected)
    assert not close_in_norm(made.gradient(batch), expected, 1e-2)  # the correction matters here
    assert gradient.loss.item() == pytest.approx(
        cross_entropy(made.model, batch).item()
        + lam * (cross_entropy(made.model, given[0]).item() - loss_after(made, given[0], alpha)),
        rel=1e-4,
    )
    assert not gradient.loss.requires_grad


def loss_after(stage: TrainingStage, harmful: Batch, alpha: float) -> float:
    """L_h after the simulated step."""
    parameters = list(stage.trainable.values())
    kept = [parameter.detach().clone() for parameter in parameters]
    g = gradient_at(stage, harmful, kept)
    for parameter, value, slope in zip(parameters, kept, g, strict=True):
        parameter.data = value - alpha * slope / length(g)
    found = cross_entropy(stage.model, harmful).item()
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data = value
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """With accumulation, a step is the mean of two composed gradients, each with harmful rows of its own."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    settings = tiny.settings(**changes, schedule="constant", warmup=0.0)
    made, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    harmful = record_stream(made)
    batches: list[Batch] = []

    class Watched(Booster):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    train(made, Watched(lam=5.0, alpha=1.0), tiny.rows(12 * accumulation), settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == len(harmful) == 3 * accumulation
    assert len({str(each["input_ids"].tolist()) for each in harmful}) == 3 * accumulation

    twin, _ = tiny.stage(trained_with=settings, stirred=True)
    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [rederived(twin, batches[n], harmful[n], 5.0, 1.0) for n in numbers]
        return [torch.stack(gradients).mean(0) for gradients in zip(*micro, strict=True)]

    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    assert_equal_where_firm(made, twin, firm)


def test_correction_tends_to_the_hessian_along_the_harmful_gradient() -> None:
    """lam * alpha * H g_h / ||g_h|| for small alpha, H g_h by a second differentiation: the sign and the scale."""
    made, batch = stage(), tiny.batch()
    given = record_stream(made)
    lam, alpha = 2.0, 1e-2
    gradient = Booster(lam=lam, alpha=alpha).gradient(made, batch)
    correction = [a - b for a, b in zip(gradient.values, made.gradient(batch).values, strict=True)]
    parameters = list(made.trainable.values())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # it can be differentiated twice
        g_h = torch.autograd.grad(cross_entropy(made.model, given[0]), parameters, create_graph=True)
        along = sum((g * g.detach()).sum() for g in g_h)
        curved = torch.autograd.grad(along, parameters)  # type: ignore[arg-type]
    expected = [lam * alpha * each / length(g_h).detach() for each in curved]
    off = length([a - b for a, b in zip(correction, expected, strict=True)]) / length(expected)
    assert off < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Harmful losses in closed form


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_quadratic_harmful_loss_in_closed_form(scale: float) -> None:
    """L_h = scale * (w'Hw/2 + b'w) corrects by scale * lam * alpha * H g/||g||: the shift does not know the scale."""
    made, batch = stage(), tiny.batch()
    h, b = [each.abs() for each in random_coefficients(made, 1)], random_coefficients(made, 2)
    clean = made.gradient(batch)
    replace_harmful_loss(
        made, lambda w: scale * sum((h_i * w_i**2 / 2 + b_i * w_i).sum() for h_i, b_i, w_i in zip(h, b, w, strict=True))
    )
    gradient = Booster(lam=5.0, alpha=0.5).gradient(made, batch)
    with torch.no_grad():
        g = [h_i * w_i + b_i for h_i, b_i, w_i in zip(h, b, made.trainable.values(), strict=True)]
        expected = [scale * 5.0 * 0.5 * h_i * g_i / length(g) for h_i, g_i in zip(h, g, strict=True)]
    found = [a - c for a, c in zip(gradient.values, clean.values, strict=True)]
    assert length([a - e for a, e in zip(found, expected, strict=True)]) < 1e-4 * length(expected)


def test_linear_harmful_loss_corrects_nothing() -> None:
    made, batch = stage(), tiny.batch()
    slopes = random_coefficients(made, 1)
    clean = made.gradient(batch)
    replace_harmful_loss(made, lambda w: sum((c * w_i).sum() for c, w_i in zip(slopes, w, strict=True)))
    assert same(list(Booster(lam=50.0, alpha=5.0).gradient(made, batch).values), list(clean.values))


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves alone, and what it reads


def test_parameters_are_bit_identical_after_the_gradient() -> None:
    made = stage()
    before = [parameter.detach().clone() for parameter in made.trainable.values()]
    Booster(lam=5.0, alpha=30.0).gradient(made, tiny.batch())
    assert same([parameter.detach() for parameter in made.trainable.values()], before)
    assert all(parameter.grad is None for parameter in made.trainable.values())
    assert all(parameter.requires_grad for parameter in made.trainable.values())


def test_a_frozen_parameter_is_left_out() -> None:
    """Another defense of the cell may have frozen it: no gradient, no share in the norm, no shift."""
    made, batch = stage(), tiny.batch()
    given = record_stream(made)
    first, *others = made.trainable.values()
    first.requires_grad_(False)
    gradient = Booster(lam=5.0, alpha=1.0).gradient(made, batch)
    assert gradient.values[0] is None
    made.trainable = dict(list(made.trainable.items())[1:])
    assert close_in_norm(Gradient(gradient.loss, gradient.values[1:]), rederived(made, batch, given[0], 5.0, 1.0))
    assert len(others) == len(gradient.values) - 1


def test_the_passes_are_two_on_the_same_harmful_rows_and_one_on_the_batch() -> None:
    made, batch = stage(), tiny.batch()
    seen: list[Any] = []
    made.model.register_forward_pre_hook(
        lambda module, args, more: seen.append(more["input_ids"].tolist()), with_kwargs=True
    )
    Booster().gradient(made, batch)
    first, second, third = seen
    assert first == second
    assert third == batch["input_ids"].tolist()
    pool = [row.ids for row in tiny.encode(POOLS.harmful)]
    assert len(first) == made.settings.batch
    for row in first:
        assert [token for token in row if token != tiny.PAD] in pool


def test_without_harmful_rows_it_is_refused() -> None:
    made = stage()
    made.pools = Pools()
    with pytest.raises(BadInput):
        Booster().gradient(made, tiny.batch())


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


def test_both_harmful_passes_see_the_same_dropout_masks() -> None:
    made = stage(lora_dropout=0.3)
    made.model.train()
    masks: list[list[Tensor]] = []
    made.model.register_forward_pre_hook(lambda module, args: masks.append([]))
    for module in made.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, args, output: masks[-1].append(output == 0))
    torch.manual_seed(5)
    Booster(lam=5.0, alpha=5.0).gradient(made, tiny.batch())
    torch.manual_seed(6)
    Booster(lam=5.0, alpha=5.0).gradient(made, tiny.batch())
    first, second, _, again, *_ = masks
    assert len(first) == 6  # three modules in two layers
    assert all(0.1 < mask.float().mean() < 0.5 for mask in first)
    assert same(first, second)
    assert not same(first, again)  # they are drawn afresh at the next call


def test_gradient_with_dropout_belongs_to_one_set_of_masks() -> None:
    made, batch = stage(lora_dropout=0.3), tiny.batch()
    made.model.train()
    given = record_stream(made)
    torch.manual_seed(5)
    gradient = Booster(lam=5.0, alpha=1.0).gradient(made, batch)
    assert close_in_norm(gradient, rederived(made, batch, given[0], 5.0, 1.0, seed=5))
    assert not close_in_norm(gradient, rederived(made, batch, given[0], 5.0, 1.0, seed=6), 1e-2)


@pytest.mark.parametrize("neutral", [Booster(lam=0.0, alpha=1.0), Booster(lam=5.0, alpha=0.0)], ids=["lam", "alpha"])
def test_lam_0_or_alpha_0_is_sft_bit_for_bit_with_dropout_on(neutral: Booster, tmp_path: Path) -> None:
    """So the harmful passes take no random numbers from the steps, and differ in nothing but the shift."""
    sft = run(SFT(), tmp_path / "sft")
    assert_same(run(neutral, tmp_path / "neutral"), sft)
    moved = run(Booster(lam=5.0, alpha=1.0), tmp_path / "moved")
    assert not same(list(moved[0].values()), list(sft[0].values()))


def test_an_interrupted_stage_ends_bit_equal(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2}
    whole = run(Booster(alpha=1.0), tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(interrupting(Booster(alpha=1.0), "gradient", 8), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run(Booster(alpha=1.0), tmp_path / "cut", salt=2, **changes), whole)
