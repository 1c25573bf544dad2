"""Vaccine and its control, against plain autograd written out here: nothing below uses the package's taps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmbench_vaccine.defenses.random_vaccine import RandomVaccine
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy
from support.compare import close_in_norm, same
from support.hooks import applied_shifts, decoder_layers, hooked

LAYERS = 2


def rederived(stage: TrainingStage, batch: Batch, rho: float, seed: int = 0) -> list[Tensor]:
    """Vaccine's gradient by the paper's three lines, in plain autograd; both passes from the same random state."""
    model, parameters = stage.model, list(stage.trainable.values())
    hidden: dict[int, Tensor] = {}

    def keep(number: int, output: Tensor) -> None:
        output.retain_grad()
        hidden[number] = output

    torch.manual_seed(seed)
    with hooked(model, keep):
        cross_entropy(model, batch).backward()
    real = batch["attention_mask"][..., None].float()
    g = [hidden[number].grad * real for number in range(LAYERS)]
    for parameter in parameters:
        parameter.grad = None
    norm = sum((each**2).sum() for each in g).sqrt()
    shift = [rho * each / (norm + 1e-7) for each in g]
    torch.manual_seed(seed)
    with hooked(model, lambda number, output: output + shift[number]):
        cross_entropy(model, batch).backward()
    gradient = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradient


def trained(
    defense: Defense, folder: Path, dropout: float = 0.1, **more: Any
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """The adapter's tensors and the log of a short stage (10 optimizer steps) under a defense."""
    settings = tiny.settings(lora_dropout=dropout, **more)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    log = train(stage, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return [parameter.detach().clone() for parameter in stage.trainable.values()], log


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize("rho", [0.5, 2.0, 5.0])
def test_gradient_equals_plain_autograd(rho: float) -> None:
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    expected = rederived(stage, batch, rho)
    gradient = Vaccine(rho=rho).gradient(stage, batch)
    assert close_in_norm(gradient, expected)
    assert not close_in_norm(stage.gradient(batch), expected, 1e-2)  # the perturbation matters here
    assert all(parameter.grad is None for parameter in stage.trainable.values())


def test_gradient_with_dropout_belongs_to_one_set_of_masks() -> None:
    stage, _ = tiny.stage(trained_with=tiny.settings(lora_dropout=0.3), stirred=True)
    stage.model.train()
    batch = tiny.batch()
    expected = rederived(stage, batch, 2.0, seed=5)
    torch.manual_seed(5)
    assert close_in_norm(Vaccine(rho=2.0).gradient(stage, batch), expected)
    torch.manual_seed(6)
    assert not close_in_norm(Vaccine(rho=2.0).gradient(stage, batch), expected, 1e-2)


def test_logged_loss_is_the_perturbed_one_without_a_graph() -> None:
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    with applied_shifts(stage.model) as passes:
        gradient = Vaccine(rho=2.0).gradient(stage, batch)
    shift = [each.float() for each in passes[-1]]
    with hooked(stage.model, lambda number, output: output + shift[number]), torch.no_grad():
        assert gradient.loss.item() == pytest.approx(cross_entropy(stage.model, batch).item(), rel=1e-5)
    assert gradient.loss.item() > stage.loss(batch).item() + 1e-3
    assert not gradient.loss.requires_grad


@pytest.mark.parametrize("rho", [0.1, 2.0, 20.0])
def test_norm_of_the_applied_perturbation_is_rho(rho: float) -> None:
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    with applied_shifts(stage.model) as passes:
        Vaccine(rho=rho).gradient(stage, batch)
    assert len(passes) == 2
    assert torch.stack(passes[0]).norm() < 1e-5  # the first pass only looks
    assert torch.stack(passes[1]).norm().item() == pytest.approx(rho, rel=1e-4)
    assert all(shift.norm() > 1e-3 * rho for shift in passes[1])  # every block has its part


def test_a_gradient_as_small_as_the_guard_is_halved() -> None:
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    hidden: list[Tensor] = []
    with hooked(stage.model, lambda number, output: hidden.append(output)):
        gradients = torch.autograd.grad(cross_entropy(stage.model, batch), hidden)
    plain, norm = stage.loss, torch.stack([(g * batch["attention_mask"][..., None]).norm() for g in gradients]).norm()
    stage.loss = lambda batch: plain(batch) * 1e-7 / norm  # so that ||g|| = 1e-7
    with applied_shifts(stage.model) as passes:
        Vaccine(rho=2.0).gradient(stage, batch)
    assert torch.stack(passes[1]).norm().item() == pytest.approx(2.0 / 2, rel=1e-3)


def test_doubling_the_loss_leaves_the_perturbation() -> None:
    stage, _ = tiny.stage(stirred=True)
    plain, found = stage.loss, []
    for factor in (1.0, 2.0):
        stage.loss = lambda batch, factor=factor: factor * plain(batch)
        with applied_shifts(stage.model) as passes:
            Vaccine(rho=2.0).gradient(stage, tiny.batch())
        found.append(torch.stack(passes[1]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_loss_rises_by_rho_times_the_norm_of_the_gradient_for_small_rho() -> None:
    stage, _ = tiny.stage(stirred=True)
    stage.model.double()  # a rise of 1e-4 drowns in float32, which the model's own loss goes back to
    stage.loss = lambda batch: cross_entropy(stage.model, batch)
    batch = tiny.batch()
    hidden: list[Tensor] = []
    with hooked(stage.model, lambda number, output: hidden.append(output)):
        clean = cross_entropy(stage.model, batch)
    g = torch.autograd.grad(clean, hidden)
    norm = torch.stack([(each * batch["attention_mask"][..., None]).norm() for each in g]).norm().item()
    off = {}
    for rho in (1.0, 1e-2):
        rise = Vaccine(rho=rho).gradient(stage, batch).loss.item() - clean.item()
        off[rho] = abs(rise / (rho * norm) - 1)
    assert off[1e-2] < 1e-3
    assert off[1e-2] < off[1.0] / 10  # what remains is of the next order in rho


# ---------------------------------------------------------------------------------------------------------------------
# Padding


def test_a_gradient_at_a_padding_position_changes_nothing() -> None:
    batch = tiny.batch((9, 5, 7))
    padding = (1 - batch["attention_mask"])[..., None].float()
    found, passes = {}, 0

    def inject(module: nn.Module, args: Any, size: float) -> Any:
        # Into the first block's output: below it stands no attention that could carry it on to real tokens. The second
        # pass is left alone, since there it would be a gradient of the weights.
        nonlocal passes
        passes += 1
        if passes == 1:
            hidden = args[0] * 1.0
            hidden.register_hook(lambda gradient: gradient + size * padding)
            return (hidden,)
        return None

    for size in (0.0, 1e3):
        stage, _ = tiny.stage(stirred=True)
        passes = 0
        after_first_block = decoder_layers(stage.model)[0].post_attention_layernorm
        after_first_block.register_forward_pre_hook(lambda module, args, size=size: inject(module, args, size))
        with applied_shifts(stage.model) as shifts:
            found[size] = list(Vaccine(rho=2.0).gradient(stage, batch).values)
        assert passes == 2
        assert all((shift * padding).abs().max() < 1e-6 for shift in shifts[1])
    assert same(found[1e3], found[0.0])


@pytest.mark.parametrize("defense", [Vaccine(rho=2.0), SFT()])
def test_more_padding_changes_nothing(defense: Defense) -> None:
    stage, _ = tiny.stage(stirred=True)
    narrow = defense.gradient(stage, tiny.batch())
    wide = defense.gradient(stage, tiny.batch(width=20))
    assert close_in_norm(wide, list(narrow.values))


# ---------------------------------------------------------------------------------------------------------------------
# Against SFT, in the trainer


def test_rho_0_is_sft_bit_for_bit_with_dropout_on(tmp_path: Path) -> None:
    sft, sft_log = trained(SFT(), tmp_path / "sft")
    still, still_log = trained(Vaccine(rho=0), tmp_path / "vaccine")
    assert len(sft_log) == 10
    assert same(still, sft)
    assert still_log == sft_log
    assert not same(trained(Vaccine(rho=2), tmp_path / "moved")[0], sft)
    assert not same(trained(SFT(), tmp_path / "dry", dropout=0.0)[0], sft)  # dropout was on


def test_variance_0_is_sft_bit_for_bit_with_dropout_on(tmp_path: Path) -> None:
    sft, sft_log = trained(SFT(), tmp_path / "sft")
    still, still_log = trained(RandomVaccine(variance=0), tmp_path / "still")
    assert same(still, sft)
    assert still_log == sft_log
    assert not same(trained(RandomVaccine(variance=0.01), tmp_path / "moved")[0], sft)


@pytest.mark.parametrize("defense", [Vaccine(rho=2.0), RandomVaccine(variance=1.0)])
def test_the_next_dropout_masks_are_those_of_sft(defense: Defense) -> None:
    after = []
    for each in (SFT(), defense):
        stage, _ = tiny.stage(trained_with=tiny.settings(lora_dropout=0.3), stirred=True)
        stage.model.train()
        torch.manual_seed(11)
        each.gradient(stage, tiny.batch())
        after.append(torch.get_rng_state())
    assert torch.equal(after[0], after[1])


@pytest.mark.parametrize(
    ("tau", "accumulation", "perturbed"), [(1, 1, range(1, 11)), (3, 1, [3, 6, 9]), (2, 2, [2, 4])]
)
def test_step_t_is_perturbed_if_tau_divides_t_counting_from_1(
    tau: int, accumulation: int, perturbed: Any, tmp_path: Path
) -> None:
    norms: dict[int, list[float]] = {}

    class Watched(Vaccine):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            with applied_shifts(stage.model) as passes:
                gradient = super().gradient(stage, batch)
            norms.setdefault(stage.step, []).append(torch.stack(passes[-1]).norm().item())
            return gradient

    _, log = trained(Watched(rho=2.0, tau=tau), tmp_path, accumulation=accumulation)
    assert len(log) == len(norms) == 10 // accumulation
    for step, found in norms.items():
        # One norm a micro-batch: under accumulation each has a perturbation of its own.
        assert found == pytest.approx([2.0 if step in perturbed else 0.0] * accumulation, abs=1e-3), step


def test_a_step_between_is_sft_exactly() -> None:
    stage, _ = tiny.stage(stirred=True)
    stage.step = 3
    between = Vaccine(rho=2.0, tau=2).gradient(stage, tiny.batch())
    assert same(list(between.values), list(stage.gradient(tiny.batch()).values))


# ---------------------------------------------------------------------------------------------------------------------
# Random Vaccine


def noise(variance: float, step: int = 1, micro: int = 0) -> tuple[Tensor, Tensor]:
    """Layers x rows x length x width of applied noise, and the mask of real tokens."""
    stage, _ = tiny.stage(stirred=True)
    stage.step, stage.micro = step, micro
    batch = tiny.batch((30, 24, 30, 18, 30, 30))
    with applied_shifts(stage.model) as passes:
        RandomVaccine(variance=variance).gradient(stage, batch)
    assert len(passes) == 1
    return torch.stack(passes[0]), batch["attention_mask"].bool()


@pytest.mark.parametrize("variance", [1e-4, 0.01, 1.0])
def test_noise_has_the_variance_asked_and_leaves_padding_alone(variance: float) -> None:
    added, real = noise(variance)
    drawn = added[:, real]  # 2 x 162 tokens x 64: the standard error of a variance is 1 %
    assert drawn.var().item() == pytest.approx(variance, rel=0.05)
    assert abs(drawn.mean().item()) < 0.03 * variance**0.5
    assert added[:, ~real].abs().max() < 1e-6
    correlation = (drawn[0] * drawn[1]).mean() / variance
    assert abs(correlation.item()) < 0.05  # blocks draw apart


def test_noise_is_fresh_at_every_micro_batch_and_the_same_when_repeated() -> None:
    first, real = noise(1.0)
    torch.testing.assert_close(noise(1.0)[0], first)
    for step, micro in ((2, 0), (1, 1)):
        other = noise(1.0, step, micro)[0]
        assert abs((first * other)[:, real].mean().item()) < 0.05
