"""Constrained SFT compared with its equations in plain PyTorch: token weights and their reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.defenses.constrained_sft import ConstrainedSFT
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.stage import Batch, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.compare import close, same
from support.plain_math import BASE, SCALE, Values, leaves

PAPER = (0.5, 2.0, 0.1)
STRONG = (3.0, 8.0, 1.0)  # so that the weights differ from 1 after three steps
NONE = {"beta_first": 0.0, "beta_early": 0.0, "beta_rest": 0.0}


def params(betas: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(NONE, betas, strict=True))


def log_probabilities(values: Values, row: Encoded) -> Tensor:
    """Return log p of every response token of one row, for a model whose adapter has these values."""
    weights = {}
    for name, a in values.items():
        if ".lora_A." in name:
            weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
            weights[weight] = BASE.get_parameter(weight) + SCALE * values[name.replace("lora_A", "lora_B")] @ a
    log_p = functional_call(BASE, weights, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
    return torch.stack([log_p[t - 1, label] for t, label in enumerate(row.labels) if label != IGNORED])


def softplus_form(
    betas: tuple[float, float, float], rows: Sequence[Encoded], values: Values, initial: Sequence[Tensor]
) -> Tensor:
    """Compute the paper's loss token by token: the mean of (2 / beta_t) log(1 + exp(-beta_t D_t))."""
    terms = []
    for row, old in zip(rows, initial, strict=True):
        for t, d in enumerate(log_probabilities(values, row) - old, 1):
            beta = betas[0] if t == 1 else betas[1] if t <= 5 else betas[2]
            terms.append(2 / beta * (1 + (-beta * d).exp()).log())
    return torch.stack(terms).mean()


def user_stage(settings: TrainSettings | None = None) -> TrainingStage:
    return tiny.stage(trained_with=settings, stirred=True, name="finetune")[0]


def train_adapter(
    defense: Defense, folder: Path, settings: TrainSettings, rows: Sequence[Encoded] | None = None
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Train a user stage as in the pipeline, with the settings of the defense."""
    settings = defense.settings("finetune", settings)
    stage = user_stage(settings)
    log = train(stage, defense, rows or tiny.rows(12), settings, folder, pad=tiny.PAD)
    return stage.values(), log


def numbered_batch(rows: Sequence[Encoded], numbers: Sequence[int]) -> Batch:
    return tiny.collated([rows[n] for n in numbers]) | tiny.on_device({"rows": torch.tensor(numbers)})


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@pytest.mark.parametrize("betas", [PAPER, STRONG, (0.1, 0.1, 0.1)])
def test_the_weights_give_the_gradient_of_the_papers_loss(betas: tuple[float, float, float]) -> None:
    stage, defense = user_stage(), ConstrainedSFT(**params(betas))
    stage.rows = rows = tiny.rows(12)
    initial = [log_probabilities(leaves(stage), row).detach() for row in rows]
    defense.before(stage)
    tiny.stir(stage.trainable, seed=8, size=0.2)
    values, numbers = leaves(stage), [7, 2, 10, 4]
    loss = softplus_form(betas, [rows[n] for n in numbers], values, [initial[n] for n in numbers])
    expected = list(torch.autograd.grad(loss, list(values.values())))
    gradient = defense.gradient(stage, numbered_batch(rows, numbers))
    assert close(gradient.values, expected)
    assert gradient.loss.item() == pytest.approx(loss.item(), rel=1e-5)  # the log contains the loss of the paper
    assert not gradient.loss.requires_grad
    assert not close(stage.gradient(numbered_batch(rows, numbers)).values, expected, 1e-2)


@pytest.mark.parametrize("betas", [PAPER, STRONG])
def test_three_steps_equal_plain_pytorch(betas: tuple[float, float, float], tmp_path: Path) -> None:
    settings = tiny.settings(epochs=1, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3)
    result, log = train_adapter(ConstrainedSFT(**params(betas)), tmp_path / "constrained", settings)
    twin, rows = user_stage(), tiny.rows(12)
    values = leaves(twin)
    parameters, initial = list(values.values()), [log_probabilities(values, row).detach() for row in rows]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.5, 0.999), eps=1e-8, weight_decay=0.1)
    for entry, numbers in zip(log, batch_order(12, settings, twin.seed), strict=True):
        loss = softplus_form(betas, [rows[n] for n in numbers], values, [initial[n] for n in numbers])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(log) == 3
    assert close(result, parameters)
    neutral, _ = train_adapter(ConstrainedSFT(**NONE), tmp_path / "free", settings)  # with the same momentum
    assert not close(neutral, parameters, 1e-4)


def test_more_padding_and_another_order_have_no_effect() -> None:
    stage, defense = user_stage(), ConstrainedSFT(**params(STRONG))
    stage.rows = rows = tiny.rows(12)
    defense.before(stage)
    tiny.stir(stage.trainable, seed=8, size=0.2)
    plain = defense.gradient(stage, numbered_batch(rows, [7, 2, 10, 4]))
    reordered = defense.gradient(stage, numbered_batch(rows, [4, 10, 2, 7]))
    shortest = min(range(12), key=lambda n: len(rows[n].ids))
    longest = max(range(12), key=lambda n: len(rows[n].ids))
    narrow, wide = numbered_batch(rows, [shortest]), numbered_batch(rows, [shortest, longest])
    wide = {name: value[:1] for name, value in wide.items()}
    assert wide["input_ids"].shape > narrow["input_ids"].shape
    assert close(reordered.values, list(plain.values))
    assert close(defense.gradient(stage, wide).values, list(defense.gradient(stage, narrow).values))


# ---------------------------------------------------------------------------------------------------------------------
# The weights


def weights(betas: tuple[float, float, float], labels: Tensor, shift: Tensor) -> tuple[Tensor, float]:
    """Return the weight of every position that scores a response token (NaN elsewhere), and the loss.

    The logits are the parameters, so their gradient is omega (p - y) / n, which gives omega.

    Args:
        betas: The strengths at token 1, at tokens 2 to 5, and at later tokens.
        labels: Labels (rows x length).
        shift: D (rows x length - 1).
    """
    z = torch.nn.Parameter(torch.randn(*labels.shape, 7, generator=torch.Generator().manual_seed(0)))
    stage = TrainingStage("finetune", SimpleNamespace(), {"z": z}, 0)
    answering = labels[:, 1:] != IGNORED
    stage.output = lambda batch: SimpleNamespace(logits=z[:, :-1][answering])
    p, y = z.detach().softmax(-1)[:, :-1], torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), 7).float()
    losses = -(p * y).sum(-1).log()
    defense = ConstrainedSFT(**params(betas))
    defense.restore({"before": torch.where(answering, losses + shift, 0)})
    gradient = defense.gradient(stage, {"labels": labels, "rows": torch.arange(len(labels))})
    values = gradient.values[0]
    assert values is not None
    slopes = (p - y) / answering.sum()
    omega = (values[:, :-1] * slopes).sum(-1) / slopes.square().sum(-1)
    torch.testing.assert_close(values[:, :-1], torch.where(answering, omega, 0)[..., None] * slopes)
    return torch.where(answering, omega, torch.nan), gradient.loss.item()


LONG = torch.tensor([[IGNORED] * 2 + [1] * 8, [IGNORED] * 5 + [2] * 3 + [IGNORED] * 2, [IGNORED] + [3] * 9])


def test_the_position_in_the_response_is_counted_separately_in_every_row() -> None:
    """At D = 1, token 1 has the weight of beta_first, tokens 2 to 5 of beta_early, and later tokens of beta_rest."""
    omega, _ = weights(PAPER, LONG, torch.ones(3, 9))
    first, early, rest = (2 / (1 + torch.tensor(beta).exp().item()) for beta in PAPER)
    expected = [first, early, early, early, early, rest, rest, rest, rest]
    for row, (start, count) in zip(omega, [(1, 8), (4, 3), (0, 9)], strict=True):
        assert row[start : start + count].tolist() == pytest.approx(expected[:count], rel=1e-4)
        assert row.isnan().sum() == 9 - count


def test_an_unchanged_token_has_weight_1() -> None:
    omega, _ = weights(STRONG, LONG, torch.zeros(3, 9))
    torch.testing.assert_close(omega.nan_to_num(1.0), torch.ones(3, 9), atol=1e-5, rtol=0)


def test_weights_fall_from_2_to_0_as_a_token_becomes_more_likely() -> None:
    """The weight is 2 for D -> -inf and 0 for D -> inf, without the lower bound of 0.001 in the authors' code."""
    omegas = [weights(PAPER, LONG, torch.full((3, 9), d))[0] for d in (-1e4, -3.0, -0.5, 0.5, 3.0, 1e4)]
    response_omegas = torch.stack(omegas)[:, ~omegas[0].isnan()]
    assert response_omegas.isfinite().all()
    assert (response_omegas[:-1] > response_omegas[1:]).all()
    torch.testing.assert_close(response_omegas[0], torch.full_like(response_omegas[0], 2.0), rtol=1e-4, atol=0)
    assert response_omegas[-1].abs().max() < 1e-6


def test_strength_0_gives_weight_1_and_cross_entropy() -> None:
    shift = torch.linspace(-5, 5, 27).view(3, 9)
    omega, loss = weights((0.0, 0.0, 0.0), LONG, shift)
    torch.testing.assert_close(omega.nan_to_num(1.0), torch.ones(3, 9), atol=1e-5, rtol=0)
    z = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), LONG[:, 1:].flatten(), ignore_index=IGNORED)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    mixed, finite = weights((0.0, 2.0, 0.0), LONG, shift)
    assert mixed[0, 1].item() == pytest.approx(1, abs=1e-5)
    assert mixed[0, 2].item() == pytest.approx(2 / (1 + torch.exp(2 * shift[0, 2]).item()), rel=1e-4)
    assert torch.tensor(finite).isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# log p_w0


class RecordingRestore(ConstrainedSFT):
    """A defense that stores a copy of its restored state."""

    _restored: Any = None

    def restore(self, state: dict[str, Tensor]) -> None:
        self._restored = {name: value.clone() for name, value in state.items()}
        super().restore(state)


def test_the_reference_is_computed_before_the_first_step_without_dropout(tmp_path: Path) -> None:
    rows, defense = tiny.rows(11), ConstrainedSFT()
    start = leaves(user_stage())
    train_adapter(defense, tmp_path, tiny.settings(lora_dropout=0.5, batch=4), rows)
    losses = defense.state()["before"]
    assert losses.shape == (11, max(len(row.ids) for row in rows) - 1)
    for row, row_losses in zip(rows, losses, strict=True):
        expected = torch.zeros(losses.shape[1])
        expected[1 : len(row.ids) - 1] = -log_probabilities(start, row).detach()  # the prompt has two tokens
        torch.testing.assert_close(row_losses, expected, atol=1e-5, rtol=1e-5)
    assert not losses.requires_grad


def forward_passes(defense: Defense, folder: Path, settings: TrainSettings) -> int:
    settings = defense.settings("finetune", settings)
    stage, passes = user_stage(settings), []
    handle = stage.model.register_forward_hook(lambda module, args, output: passes.append(1))
    try:
        train(stage, defense, tiny.rows(12), settings, folder, pad=tiny.PAD)
    except KeyboardInterrupt:
        pass
    finally:
        handle.remove()
    return len(passes)


class Interrupted(ConstrainedSFT):
    """A defense that stops at step 4."""

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == 4:
            raise KeyboardInterrupt


def test_log_probabilities_are_computed_once(tmp_path: Path) -> None:
    """Twelve rows in batches of 4 for two epochs: three passes before the steps, one per step, none on resuming."""
    settings = tiny.settings(batch=4, epochs=2)
    assert forward_passes(SFT(), tmp_path / "sft", settings) == 6
    assert forward_passes(ConstrainedSFT(), tmp_path / "complete", settings) == 3 + 6
    assert forward_passes(Interrupted(), tmp_path / "cut", settings) == 3 + 3
    assert forward_passes(ConstrainedSFT(), tmp_path / "cut", settings) == 3


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    settings, strong = tiny.settings(lora_dropout=0.1, batch=4, epochs=2), params(STRONG)
    plain, resumed = ConstrainedSFT(**strong), RecordingRestore(**strong)
    complete, log = train_adapter(plain, tmp_path / "complete", settings)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(Interrupted(**strong), tmp_path / "cut", settings)
    result, result_log = train_adapter(resumed, tmp_path / "cut", settings)
    assert same(result, complete)
    assert result_log == log
    assert torch.equal(resumed._restored["before"], plain.state()["before"])


def test_state_is_restored_from_a_file(tmp_path: Path) -> None:
    stage, defense, restored = user_stage(), ConstrainedSFT(**params(STRONG)), ConstrainedSFT(**params(STRONG))
    stage.rows = rows = tiny.rows(12)
    defense.before(stage)
    save_file(defense.state(), tmp_path / "state")
    restored.restore(load_file(tmp_path / "state"))
    tiny.stir(stage.trainable, seed=8)
    gradient, expected = (member.gradient(stage, numbered_batch(rows, [3, 5])) for member in (restored, defense))
    assert same(gradient.values, expected.values)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with SFT


def test_strength_0_with_the_momentum_of_sft_equals_sft_bit_for_bit(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    sft, sft_log = train_adapter(SFT(), tmp_path / "sft", settings)
    neutral, neutral_log = train_adapter(ConstrainedSFT(**NONE, adam_beta1=0.9), tmp_path / "free", settings)
    assert same(neutral, sft)
    assert [e["loss"] for e in neutral_log] == pytest.approx([e["loss"] for e in sft_log], rel=1e-5)
    for number, defense in enumerate((ConstrainedSFT(adam_beta1=0.9), ConstrainedSFT(**NONE))):
        assert not same(train_adapter(defense, tmp_path / str(number), settings)[0], sft)


def test_the_momentum_is_lower_only_in_the_user_stage() -> None:
    stages = Experiment.settle(RunSpec(defense=parse_plugins("constrained_sft"))).stages
    assert stages["align"].settings.adam_beta1 == 0.9
    assert stages["finetune"].settings.adam_beta1 == 0.5
