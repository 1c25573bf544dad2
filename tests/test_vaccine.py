"""Vaccine and its control, compared with plain autograd that does not use the taps of the package."""

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


def expected_gradient(stage: TrainingStage, batch: Batch, rho: float, seed: int = 0) -> list[Tensor]:
    """Compute the gradient of Vaccine from the paper's equations; both passes start from the same random state."""
    model, parameters = stage.model, list(stage.trainable.values())
    hidden: dict[int, Tensor] = {}

    def record(number: int, output: Tensor) -> None:
        output.retain_grad()
        hidden[number] = output

    torch.manual_seed(seed)
    with hooked(model, record):
        cross_entropy(model, batch).backward()
    real = batch["attention_mask"][..., None].float()
    gradients = [hidden[number].grad * real for number in range(LAYERS)]
    for parameter in parameters:
        parameter.grad = None
    norm = sum((gradient_l**2).sum() for gradient_l in gradients).sqrt()
    shift = [rho * gradient_l / (norm + 1e-7) for gradient_l in gradients]
    torch.manual_seed(seed)
    with hooked(model, lambda number, output: output + shift[number]):
        cross_entropy(model, batch).backward()
    gradient = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradient


def train_adapter(
    defense: Defense, folder: Path, dropout: float = 0.1, **more: Any
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Train a short stage (10 optimizer steps) and return the adapter's tensors and the log."""
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
    expected = expected_gradient(stage, batch, rho)
    gradient = Vaccine(rho=rho).gradient(stage, batch)
    assert close_in_norm(gradient, expected)
    assert not close_in_norm(stage.gradient(batch), expected, 1e-2)  # the perturbation matters here
    assert all(parameter.grad is None for parameter in stage.trainable.values())


def test_both_passes_use_the_same_dropout_masks() -> None:
    stage, _ = tiny.stage(trained_with=tiny.settings(lora_dropout=0.3), stirred=True)
    stage.model.train()
    batch = tiny.batch()
    expected = expected_gradient(stage, batch, 2.0, seed=5)
    torch.manual_seed(5)
    assert close_in_norm(Vaccine(rho=2.0).gradient(stage, batch), expected)
    torch.manual_seed(6)
    assert not close_in_norm(Vaccine(rho=2.0).gradient(stage, batch), expected, 1e-2)


def test_logged_loss_is_the_perturbed_loss_without_a_graph() -> None:
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    with applied_shifts(stage.model) as passes:
        gradient = Vaccine(rho=2.0).gradient(stage, batch)
    shifts = [layer_shift.float() for layer_shift in passes[-1]]
    with hooked(stage.model, lambda number, output: output + shifts[number]), torch.no_grad():
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
    assert torch.stack(passes[0]).norm() < 1e-5  # the first pass has no shift
    assert torch.stack(passes[1]).norm().item() == pytest.approx(rho, rel=1e-4)
    assert all(shift.norm() > 1e-3 * rho for shift in passes[1])  # every block is shifted


def test_perturbation_is_halved_if_the_gradient_norm_equals_the_constant_1e_7() -> None:
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


def test_perturbation_does_not_depend_on_the_scale_of_the_loss() -> None:
    stage, _ = tiny.stage(stirred=True)
    plain, shifts = stage.loss, []
    for factor in (1.0, 2.0):
        stage.loss = lambda batch, factor=factor: factor * plain(batch)
        with applied_shifts(stage.model) as passes:
            Vaccine(rho=2.0).gradient(stage, tiny.batch())
        shifts.append(torch.stack(passes[1]))
    torch.testing.assert_close(shifts[0], shifts[1], atol=1e-6, rtol=1e-5)


def test_loss_rises_by_rho_times_the_gradient_norm_for_small_rho() -> None:
    stage, _ = tiny.stage(stirred=True)
    stage.model.double()  # float32, which the model's loss uses, cannot resolve a rise of 1e-4
    stage.loss = lambda batch: cross_entropy(stage.model, batch)
    batch = tiny.batch()
    hidden: list[Tensor] = []
    with hooked(stage.model, lambda number, output: hidden.append(output)):
        clean = cross_entropy(stage.model, batch)
    gradients = torch.autograd.grad(clean, hidden)
    norm = torch.stack([(gradient * batch["attention_mask"][..., None]).norm() for gradient in gradients]).norm().item()
    errors = {}
    for rho in (1.0, 1e-2):
        rise = Vaccine(rho=rho).gradient(stage, batch).loss.item() - clean.item()
        errors[rho] = abs(rise / (rho * norm) - 1)
    assert errors[1e-2] < 1e-3
    assert errors[1e-2] < errors[1.0] / 10  # the remaining error is of the next order in rho


# ---------------------------------------------------------------------------------------------------------------------
# Padding


def test_a_gradient_at_a_padding_position_has_no_effect() -> None:
    batch = tiny.batch((9, 5, 7))
    padding = (1 - batch["attention_mask"])[..., None].float()
    gradients, passes = {}, 0

    def inject(module: nn.Module, args: Any, size: float) -> Any:
        # Inject into the output of the first block: no attention below it can carry the gradient to real tokens.
        # Skip the second pass, where the injection would change the gradient of the weights.
        nonlocal passes
        passes += 1
        if passes == 1:
            hidden = args[0] * 1.0
            hidden.register_hook(lambda gradient: gradient + size * padding)
            return (hidden,)
        return None

    for size in (0.0, 1e3):
        stage, _ = tiny.stage(tiny.model(attn_implementation="eager"), stirred=True)  # runs on padded rows
        passes = 0
        after_first_block = decoder_layers(stage.model)[0].post_attention_layernorm
        after_first_block.register_forward_pre_hook(lambda module, args, size=size: inject(module, args, size))
        with applied_shifts(stage.model) as shifts:
            gradients[size] = list(Vaccine(rho=2.0).gradient(stage, batch).values)
        assert passes == 2
        assert all((shift * padding).abs().max() < 1e-6 for shift in shifts[1])
    assert same(gradients[1e3], gradients[0.0])


@pytest.mark.parametrize("defense", [Vaccine(rho=2.0), SFT()])
def test_more_padding_has_no_effect(defense: Defense) -> None:
    stage, _ = tiny.stage(stirred=True)
    narrow = defense.gradient(stage, tiny.batch())
    wide = defense.gradient(stage, tiny.batch(width=20))
    assert close_in_norm(wide, list(narrow.values))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with SFT in the trainer


def test_rho_0_equals_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    sft, sft_log = train_adapter(SFT(), tmp_path / "sft")
    neutral, neutral_log = train_adapter(Vaccine(rho=0), tmp_path / "vaccine")
    assert len(sft_log) == 10
    assert same(neutral, sft)
    assert neutral_log == sft_log
    assert not same(train_adapter(Vaccine(rho=2), tmp_path / "perturbed")[0], sft)
    assert not same(train_adapter(SFT(), tmp_path / "dry", dropout=0.0)[0], sft)  # dropout was on


def test_variance_0_equals_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    sft, sft_log = train_adapter(SFT(), tmp_path / "sft")
    neutral, neutral_log = train_adapter(RandomVaccine(variance=0), tmp_path / "neutral")
    assert same(neutral, sft)
    assert neutral_log == sft_log
    assert not same(train_adapter(RandomVaccine(variance=0.01), tmp_path / "perturbed")[0], sft)


@pytest.mark.parametrize("defense", [Vaccine(rho=2.0), RandomVaccine(variance=1.0)])
def test_the_next_dropout_masks_equal_those_of_sft(defense: Defense) -> None:
    states = []
    for member in (SFT(), defense):
        stage, _ = tiny.stage(trained_with=tiny.settings(lora_dropout=0.3), stirred=True)
        stage.model.train()
        torch.manual_seed(11)
        member.gradient(stage, tiny.batch())
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("tau", "accumulation", "perturbed"), [(1, 1, range(1, 11)), (3, 1, [3, 6, 9]), (2, 2, [2, 4])]
)
def test_step_t_is_perturbed_if_and_only_if_tau_divides_t(
    tau: int, accumulation: int, perturbed: Any, tmp_path: Path
) -> None:
    norms: dict[int, list[float]] = {}

    class RecordingVaccine(Vaccine):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            with applied_shifts(stage.model) as passes:
                gradient = super().gradient(stage, batch)
            norms.setdefault(stage.step, []).append(torch.stack(passes[-1]).norm().item())
            return gradient

    _, log = train_adapter(RecordingVaccine(rho=2.0, tau=tau), tmp_path, accumulation=accumulation)
    assert len(log) == len(norms) == 10 // accumulation
    for step, step_norms in norms.items():
        # One norm for each micro-batch: under accumulation every micro-batch has its own perturbation.
        assert step_norms == pytest.approx([2.0 if step in perturbed else 0.0] * accumulation, abs=1e-3), step


def test_an_unperturbed_step_equals_sft() -> None:
    stage, _ = tiny.stage(stirred=True)
    stage.step = 3
    unperturbed = Vaccine(rho=2.0, tau=2).gradient(stage, tiny.batch())
    assert same(list(unperturbed.values), list(stage.gradient(tiny.batch()).values))


# ---------------------------------------------------------------------------------------------------------------------
# Random Vaccine


def noise(variance: float, step: int = 1, micro: int = 0) -> tuple[Tensor, Tensor]:
    """Return the applied noise (layers x rows x length x width) and the mask of real tokens (rows x length)."""
    stage, _ = tiny.stage(stirred=True)
    stage.step, stage.micro = step, micro
    batch = tiny.batch((30, 24, 30, 18, 30, 30))
    with applied_shifts(stage.model) as passes:
        RandomVaccine(variance=variance).gradient(stage, batch)
    assert len(passes) == 1
    return torch.stack(passes[0]), batch["attention_mask"].bool()


@pytest.mark.parametrize("variance", [1e-4, 0.01, 1.0])
def test_noise_has_the_requested_variance_and_skips_padding(variance: float) -> None:
    applied_noise, tokens = noise(variance)
    token_noise = applied_noise[:, tokens]  # 2 x 162 tokens x 64: the standard error of a variance is 1 %
    assert token_noise.var().item() == pytest.approx(variance, rel=0.05)
    assert abs(token_noise.mean().item()) < 0.03 * variance**0.5
    assert applied_noise[:, ~tokens].abs().max() < 1e-6
    correlation = (token_noise[0] * token_noise[1]).mean() / variance
    assert abs(correlation.item()) < 0.05  # blocks have independent noise


def test_noise_differs_between_micro_batches_and_is_reproducible() -> None:
    first, tokens = noise(1.0)
    torch.testing.assert_close(noise(1.0)[0], first)
    for step, micro in ((2, 0), (1, 1)):
        second = noise(1.0, step, micro)[0]
        assert abs((first * second)[:, tokens].mean().item()) < 0.05
