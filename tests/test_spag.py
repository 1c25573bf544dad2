"""SPAG compared with its equations in plain PyTorch, and the projection for losses in closed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.defenses.spag import SPAG
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, gradient_at, length, record_stream
from support.compare import close, same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

POOLS = tiny.example_pools()


def user_stage(**changes: Any) -> TrainingStage:
    """Return a user stage with alignment rows after its first optimizer step, with a nonzero adapter."""
    stage, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=POOLS, name="finetune")
    stage.step, stage.steps = 1, 10
    return stage


def run_stage(
    defense: Defense, folder: Path, *, accumulation: int = 1
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train a short stage with new objects and return the adapter and the log."""
    stage = user_stage(lora_dropout=0.1, batch=3, accumulation=accumulation)
    log = train(stage, defense, tiny.rows(20), stage.settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in stage.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


def project(stage: TrainingStage, rows: Batch, tau: float, eta: float) -> float:
    """Project the parameters as in the paper, and return the rate."""
    excess = cross_entropy(stage.model, rows).item() - tau
    g = gradient_at(stage, rows, stage.values())
    rate = min(excess / float(length(g) ** 2), eta) if excess > 0 else 0.0
    for parameter, slope in zip(stage.trainable.values(), g, strict=True):
        parameter.data = parameter.data - rate * slope
    return rate


@pytest.mark.parametrize("eta", [10.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, eta: float, tmp_path: Path) -> None:
    """The projection is outside of the optimizer, so that its momentum does not repeat the step of the user."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    changes |= {"schedule": "constant", "warmup": 0.0}
    stage, twin, tau = user_stage(**changes), user_stage(**changes), 3.5
    drawn, batches = record_stream(stage), []

    class RecordingSPAG(SPAG):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    train(stage, RecordingSPAG(tau=tau, eta=eta), tiny.rows(12 * accumulation), stage.settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == 3 * accumulation
    assert len({str(rows["input_ids"].tolist()) for rows in drawn}) == len(drawn) == 3  # one projection per step
    rates: list[float] = []

    def user_gradient(step: int) -> list[Tensor]:
        if step:
            rates.append(project(twin, drawn[step - 1], tau, eta))
        start = step * accumulation
        micro = [gradient_at(twin, batches[n], twin.values()) for n in range(start, start + accumulation)]
        return [torch.stack(values).mean(0) for values in zip(*micro, strict=True)]

    firm = plain_adamw(twin, [partial(user_gradient, step) for step in range(3)])
    rates.append(project(twin, drawn[2], tau, eta))
    assert_equal_where_firm(stage, twin, firm)
    assert all(0.06 < rate < 10 if eta > 1 else rate == eta for rate in rates)


# ---------------------------------------------------------------------------------------------------------------------
# Losses in closed form


def projected(loss: Callable[[Tensor, Tensor], Tensor], **params: float) -> tuple[list[Tensor], float]:
    """Project from a = (1, -2), b = (3) for a loss l(a, b), and return a and b with their new loss."""
    a, b = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0]))
    model: Any = SimpleNamespace(model=nn.Module())
    stage = TrainingStage("finetune", model, {"a": a, "b": b}, 0)
    stage.stream = lambda *args: tiny.batch()  # type: ignore[method-assign]
    stage.loss = lambda batch: loss(a, b)  # type: ignore[method-assign]
    SPAG(**params).after_step(stage)
    assert a.grad is None
    assert b.grad is None
    return [a.detach(), b.detach()], loss(a, b).item()


def linear(a: Tensor, b: Tensor) -> Tensor:
    """Return a loss of 7 at the start, with the gradient (3, 0) for a and (4) for b."""
    return 3 * a[0] + 4 * b[0] - 8.0


@pytest.mark.parametrize("tau", [0.0, 2.0, 6.9])
def test_a_linear_loss_is_tau_after_the_projection(tau: float) -> None:
    """One rate for all parameters: the step has the length (l - tau) / ||g||, with ||g|| = 5."""
    (a, b), loss = projected(linear, tau=tau)
    rate = (7.0 - tau) / 25
    assert close([a, b], [torch.tensor([1.0 - 3 * rate, -2.0]), torch.tensor([3.0 - 4 * rate])], 1e-6)
    assert loss == pytest.approx(tau, abs=1e-5)


def test_eta_is_the_largest_rate() -> None:
    (a, b), loss = projected(linear, tau=2.0, eta=0.1)
    assert close([a, b], [torch.tensor([0.7, -2.0]), torch.tensor([2.6])], 1e-6)
    assert loss > 2.0
    (a, b), _ = projected(lambda a, b: 1e-3 * linear(a, b), tau=0.0, eta=5.0)  # a small gradient
    assert close([a, b], [torch.tensor([1.0 - 0.015, -2.0]), torch.tensor([3.0 - 0.02])], 1e-6)


@pytest.mark.parametrize("tau", [7.0, 8.0])
def test_no_step_at_a_loss_of_at_most_tau(tau: float) -> None:
    (a, b), _ = projected(linear, tau=tau)
    assert same([a, b], [torch.tensor([1.0, -2.0]), torch.tensor([3.0])])


def test_no_step_without_a_gradient() -> None:
    (a, b), _ = projected(lambda a, b: 0 * a.sum() + 0 * b.sum() + 7.0)
    assert same([a, b], [torch.tensor([1.0, -2.0]), torch.tensor([3.0])])


# ---------------------------------------------------------------------------------------------------------------------
# Parameters, rows and dropout


def test_a_frozen_parameter_does_not_change() -> None:
    stage = user_stage()
    initial = stage.values()
    first, *others = stage.trainable.values()
    first.requires_grad_(False)
    drawn = record_stream(stage)
    SPAG(eta=0.01).after_step(stage)
    assert torch.equal(first, initial[0])
    stage.trainable = dict(list(stage.trainable.items())[1:])
    g = gradient_at(stage, drawn[0], initial[1:])
    assert close(stage.values(), [w - 0.01 * slope for w, slope in zip(initial[1:], g, strict=True)])
    assert all(parameter.grad is None for parameter in (first, *others))
    assert all(parameter.requires_grad for parameter in others)


def test_the_projection_is_without_dropout_and_random_numbers_of_the_steps() -> None:
    results = []
    for training in (False, True):
        stage = user_stage(lora_dropout=0.5)
        stage.model.train(training)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        SPAG().after_step(stage)
        assert torch.equal(torch.get_rng_state(), state)
        assert stage.model.training is training
        results.append(stage.values())
    assert same(*results)


def test_the_rows_are_alignment_rows() -> None:
    stage = user_stage()
    drawn = record_stream(stage)
    SPAG().after_step(stage)
    pool = [row.ids for row in tiny.encode(POOLS.alignment)]
    rows = [[token for token in row if token != tiny.PAD] for row in drawn[0]["input_ids"].tolist()]
    assert len(rows) == stage.settings.batch
    assert all(row in pool for row in rows)


def test_missing_alignment_rows_are_refused() -> None:
    stage = user_stage()
    stage.pools = Pools()
    with pytest.raises(BadInput):
        SPAG().after_step(stage)


def test_a_large_tau_equals_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    sft = run_stage(SFT(), tmp_path / "sft")
    assert_same(run_stage(SPAG(tau=1e9), tmp_path / "large"), sft)
    projected, _ = run_stage(SPAG(tau=1.0, eta=0.1), tmp_path / "projected")
    assert not same(list(projected.values()), list(sft[0].values()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_interrupted_stage_gives_the_same_result(accumulation: int, tmp_path: Path) -> None:
    """A checkpoint contains the projected parameters."""
    defense = SPAG(tau=1.0, eta=0.1)
    complete = run_stage(defense, tmp_path / "complete", accumulation=accumulation)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(defense, "after_step", 5), tmp_path / "cut", accumulation=accumulation)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run_stage(defense, tmp_path / "cut", accumulation=accumulation), complete)
