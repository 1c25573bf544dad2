"""Constrained SFT against its equations in plain PyTorch: the weights of tokens, and what they are measured from."""

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

from harmbench_vaccine.data.collate import IGNORED, Encoded, collate
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
STRONG = (3.0, 8.0, 1.0)  # so that the weights leave 1 within three steps
NONE = {"beta_first": 0.0, "beta_early": 0.0, "beta_rest": 0.0}


def params(betas: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(NONE, betas, strict=True))


def log_probabilities(values: Values, row: Encoded) -> Tensor:
    """log p of every response token of one row, of the model whose adapter has these values."""
    weights = {}
    for name, a in values.items():
        if ".lora_A." in name:
            weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
            weights[weight] = BASE.get_parameter(weight) + SCALE * values[name.replace("lora_A", "lora_B")] @ a
    log_p = functional_call(BASE, weights, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
    return torch.stack([log_p[t - 1, label] for t, label in enumerate(row.labels) if label != IGNORED])


def softplus_form(
    betas: tuple[float, float, float], rows: Sequence[Encoded], now: Values, before: Sequence[Tensor]
) -> Tensor:
    """The paper's loss, response token by response token: the mean of (2 / beta_t) log(1 + exp(-beta_t D_t))."""
    terms = []
    for row, old in zip(rows, before, strict=True):
        for t, d in enumerate(log_probabilities(now, row) - old, 1):
            beta = betas[0] if t == 1 else betas[1] if t <= 5 else betas[2]
            terms.append(2 / beta * (1 + (-beta * d).exp()).log())
    return torch.stack(terms).mean()


def staged(settings: TrainSettings | None = None) -> TrainingStage:
    return tiny.stage(trained_with=settings, stirred=True, name="finetune")[0]


def trained(
    defense: Defense, folder: Path, settings: TrainSettings, rows: Sequence[Encoded] | None = None
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """A user stage as the pipeline runs it: under the settings that the defense asks for."""
    settings = defense.settings("finetune", settings)
    stage = staged(settings)
    log = train(stage, defense, rows or tiny.rows(12), settings, folder, pad=tiny.PAD)
    return stage.values(), log


def numbered(rows: Sequence[Encoded], numbers: Sequence[int]) -> Batch:
    return {**collate([rows[n] for n in numbers], tiny.PAD), "rows": torch.tensor(numbers)}


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations


@pytest.mark.parametrize("betas", [PAPER, STRONG, (0.1, 0.1, 0.1)])
def test_the_weights_give_the_gradient_of_the_papers_loss(betas: tuple[float, float, float]) -> None:
    stage, defense = staged(), ConstrainedSFT(**params(betas))
    stage.rows = rows = tiny.rows(12)
    before = [log_probabilities(leaves(stage), row).detach() for row in rows]
    defense.before(stage)
    tiny.stir(stage.trainable, seed=8, size=0.2)
    values, numbers = leaves(stage), [7, 2, 10, 4]
    loss = softplus_form(betas, [rows[n] for n in numbers], values, [before[n] for n in numbers])
    expected = list(torch.autograd.grad(loss, list(values.values())))
    found = defense.gradient(stage, numbered(rows, numbers))
    assert close(found.values, expected)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)  # the log shows the paper's loss
    assert not found.loss.requires_grad
    assert not close(stage.gradient(numbered(rows, numbers)).values, expected, 1e-2)


@pytest.mark.parametrize("betas", [PAPER, STRONG])
def test_three_steps_equal_plain_pytorch(betas: tuple[float, float, float], tmp_path: Path) -> None:
    settings = tiny.settings(epochs=1, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3)
    found, log = trained(ConstrainedSFT(**params(betas)), tmp_path / "constrained", settings)
    twin, rows = staged(), tiny.rows(12)
    values = leaves(twin)
    parameters, before = list(values.values()), [log_probabilities(values, row).detach() for row in rows]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.5, 0.999), eps=1e-8, weight_decay=0.1)
    for entry, numbers in zip(log, batch_order(12, settings, twin.seed), strict=True):
        loss = softplus_form(betas, [rows[n] for n in numbers], values, [before[n] for n in numbers])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(log) == 3
    assert close(found, parameters)
    free, _ = trained(ConstrainedSFT(**NONE), tmp_path / "free", settings)  # with the same momentum
    assert not close(free, parameters, 1e-4)


def test_more_padding_and_another_order_change_nothing() -> None:
    stage, defense = staged(), ConstrainedSFT(**params(STRONG))
    stage.rows = rows = tiny.rows(12)
    defense.before(stage)
    tiny.stir(stage.trainable, seed=8, size=0.2)
    plain = defense.gradient(stage, numbered(rows, [7, 2, 10, 4]))
    turned = defense.gradient(stage, numbered(rows, [4, 10, 2, 7]))
    shortest = min(range(12), key=lambda n: len(rows[n].ids))
    longest = max(range(12), key=lambda n: len(rows[n].ids))
    narrow, wide = numbered(rows, [shortest]), numbered(rows, [shortest, longest])
    wide = {name: value[:1] for name, value in wide.items()}
    assert wide["input_ids"].shape > narrow["input_ids"].shape
    assert close(turned.values, list(plain.values))
    assert close(defense.gradient(stage, wide).values, list(defense.gradient(stage, narrow).values))


# ---------------------------------------------------------------------------------------------------------------------
# The weights


def weights(betas: tuple[float, float, float], labels: Tensor, moved: Tensor) -> tuple[Tensor, float]:
    """The weight of every place that scores a response token, found in the gradient on logits; NaN elsewhere.

    `moved` (rows x length - 1) is D. The logits are the parameters, so that their gradient is omega (p - y) / n.
    """
    z = torch.nn.Parameter(torch.randn(*labels.shape, 7, generator=torch.Generator().manual_seed(0)))
    stage = TrainingStage("finetune", SimpleNamespace(), {"z": z}, 0)
    stage.output = lambda batch: SimpleNamespace(logits=z)
    p = z.detach().softmax(-1)[:, :-1]
    y, answering = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), 7).float(), labels[:, 1:] != IGNORED
    losses = -(p * y).sum(-1).log()
    defense = ConstrainedSFT(**params(betas))
    defense.restore({"before": torch.where(answering, losses + moved, 0)})
    gradient = defense.gradient(stage, {"labels": labels, "rows": torch.arange(len(labels))})
    values = gradient.values[0]
    assert values is not None
    assert not values[:, :-1][~answering].any()
    assert not values[:, -1].any()
    slopes = (p - y) / answering.sum()
    found = (values[:, :-1] * slopes).sum(-1) / slopes.square().sum(-1)
    torch.testing.assert_close(values[:, :-1], torch.where(answering, found, 0)[..., None] * slopes)
    return torch.where(answering, found, torch.nan), gradient.loss.item()


LONG = torch.tensor([[IGNORED] * 2 + [1] * 8, [IGNORED] * 5 + [2] * 3 + [IGNORED] * 2, [IGNORED] + [3] * 9])


def test_the_place_in_the_response_is_counted_anew_in_every_row() -> None:
    """D = 1 everywhere: token 1 has the weight of beta_first, 2 to 5 that of beta_early, later ones of beta_rest."""
    found, _ = weights(PAPER, LONG, torch.ones(3, 9))
    first, early, rest = (2 / (1 + torch.tensor(beta).exp().item()) for beta in PAPER)
    each = [first, early, early, early, early, rest, rest, rest, rest]
    for row, (start, count) in zip(found, [(1, 8), (4, 3), (0, 9)], strict=True):
        assert row[start : start + count].tolist() == pytest.approx(each[:count], rel=1e-4)
        assert row.isnan().sum() == 9 - count


def test_a_token_that_has_not_moved_weighs_1() -> None:
    found, _ = weights(STRONG, LONG, torch.zeros(3, 9))
    torch.testing.assert_close(found.nan_to_num(1.0), torch.ones(3, 9), atol=1e-5, rtol=0)


def test_weights_lie_between_0_and_2_and_fall_as_a_token_becomes_likelier() -> None:
    """2 as D -> -inf, 0 as D -> inf; the authors' bound of 0.001 is not there."""
    found = [weights(PAPER, LONG, torch.full((3, 9), d))[0] for d in (-1e4, -3.0, -0.5, 0.5, 3.0, 1e4)]
    known = torch.stack(found)[:, ~found[0].isnan()]
    assert known.isfinite().all()
    assert (known[:-1] > known[1:]).all()
    torch.testing.assert_close(known[0], torch.full_like(known[0], 2.0), rtol=1e-4, atol=0)
    assert known[-1].abs().max() < 1e-6


def test_without_strength_every_token_weighs_1_and_the_loss_is_cross_entropy() -> None:
    moved = torch.linspace(-5, 5, 27).view(3, 9)
    found, loss = weights((0.0, 0.0, 0.0), LONG, moved)
    torch.testing.assert_close(found.nan_to_num(1.0), torch.ones(3, 9), atol=1e-5, rtol=0)
    z = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), LONG[:, 1:].flatten(), ignore_index=IGNORED)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    mixed, finite = weights((0.0, 2.0, 0.0), LONG, moved)
    assert mixed[0, 1].item() == pytest.approx(1, abs=1e-5)
    assert mixed[0, 2].item() == pytest.approx(2 / (1 + torch.exp(2 * moved[0, 2]).item()), rel=1e-4)
    assert torch.tensor(finite).isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# log p_w0


class Kept(ConstrainedSFT):
    """Keeps what it was restored with."""

    _restored: Any = None

    def restore(self, state: dict[str, Tensor]) -> None:
        self._restored = {name: value.clone() for name, value in state.items()}
        super().restore(state)


def test_the_reference_is_every_row_at_the_start_without_dropout(tmp_path: Path) -> None:
    rows, defense = tiny.rows(11), ConstrainedSFT()
    start = leaves(staged())
    trained(defense, tmp_path, tiny.settings(lora_dropout=0.5, batch=4), rows)
    found = defense.state()["before"]
    assert found.shape == (11, max(len(row.ids) for row in rows) - 1)
    for row, kept in zip(rows, found, strict=True):
        expected = torch.zeros(found.shape[1])
        expected[1 : len(row.ids) - 1] = -log_probabilities(start, row).detach()  # a prompt of two tokens
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)
    assert not found.requires_grad


def forward_passes(defense: Defense, folder: Path, settings: TrainSettings) -> int:
    settings = defense.settings("finetune", settings)
    stage, passes = staged(settings), []
    handle = stage.model.register_forward_hook(lambda module, args, output: passes.append(1))
    try:
        train(stage, defense, tiny.rows(12), settings, folder, pad=tiny.PAD)
    except KeyboardInterrupt:
        pass
    finally:
        handle.remove()
    return len(passes)


class Interrupted(ConstrainedSFT):
    """Stops when a step is reached."""

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == 4:
            raise KeyboardInterrupt


def test_log_probabilities_are_computed_once(tmp_path: Path) -> None:
    """Twelve rows in batches of 4, two epochs: three passes before the steps, one a step, none for going on."""
    settings = tiny.settings(batch=4, epochs=2)
    assert forward_passes(SFT(), tmp_path / "sft", settings) == 6
    assert forward_passes(ConstrainedSFT(), tmp_path / "whole", settings) == 3 + 6
    assert forward_passes(Interrupted(), tmp_path / "cut", settings) == 3 + 3
    assert forward_passes(ConstrainedSFT(), tmp_path / "cut", settings) == 3


def test_an_interrupted_stage_ends_bit_equal(tmp_path: Path) -> None:
    settings, strong = tiny.settings(lora_dropout=0.1, batch=4, epochs=2), params(STRONG)
    plain, resumed = ConstrainedSFT(**strong), Kept(**strong)
    whole, log = trained(plain, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        trained(Interrupted(**strong), tmp_path / "cut", settings)
    again, log_again = trained(resumed, tmp_path / "cut", settings)
    assert same(again, whole)
    assert log_again == log
    assert torch.equal(resumed._restored["before"], plain.state()["before"])


def test_state_comes_back_from_a_file(tmp_path: Path) -> None:
    stage, defense, other = staged(), ConstrainedSFT(**params(STRONG)), ConstrainedSFT(**params(STRONG))
    stage.rows = rows = tiny.rows(12)
    defense.before(stage)
    save_file(defense.state(), tmp_path / "state")
    other.restore(load_file(tmp_path / "state"))
    tiny.stir(stage.trainable, seed=8)
    found, expected = (each.gradient(stage, numbered(rows, [3, 5])) for each in (other, defense))
    assert same(found.values, expected.values)


# ---------------------------------------------------------------------------------------------------------------------
# Against SFT


def test_without_strength_and_with_sfts_momentum_it_is_sft_bit_for_bit(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    sft, sft_log = trained(SFT(), tmp_path / "sft", settings)
    free, free_log = trained(ConstrainedSFT(**NONE, adam_beta1=0.9), tmp_path / "free", settings)
    assert same(free, sft)
    assert [e["loss"] for e in free_log] == pytest.approx([e["loss"] for e in sft_log], rel=1e-5)
    for number, other in enumerate((ConstrainedSFT(adam_beta1=0.9), ConstrainedSFT(**NONE))):
        assert not same(trained(other, tmp_path / str(number), settings)[0], sft)


def test_the_momentum_is_lower_in_the_user_stage_alone() -> None:
    cell = Experiment.settle(RunSpec(defense=parse_plugins("constrained_sft")))
    found = {stage: cell.settings(stage, cell.team(stage)).adam_beta1 for stage in ("align", "finetune")}
    assert found == {"align": 0.9, "finetune": 0.5}
