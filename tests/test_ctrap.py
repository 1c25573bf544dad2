"""CTRAP compared with its equations in plain PyTorch, the collapse loss, and the effect of training on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.ctrap import CTRAP
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, gradient_at, peft_computation, record_stream
from support.compare import close, close_in_norm, same
from support.hooks import recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw

POOLS = tiny.example_pools()
TOKEN = 3 + ord("o") % 90
"""The last token of the default text "an error", before the token that ends a response: in `tiny.encode` the r."""


def stage(**changes: Any) -> TrainingStage:
    """Return an alignment stage with harmful and benign rows at its first micro-batch, with a nonzero adapter."""
    result, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=POOLS)
    result.step, result.steps = 1, 10
    return result


# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations


def collapse_loss(stage: TrainingStage, benign: Batch, token: int = TOKEN) -> Tensor:
    """Return the mean of -log p(token) over the positions that score a response token, one by one."""
    with peft_computation():
        logits = stage.model(input_ids=benign["input_ids"], attention_mask=benign["attention_mask"]).logits
    log_p = logits.log_softmax(-1)
    places = [(r, t) for r, row in enumerate(benign["labels"].tolist()) for t, label in enumerate(row) if label >= 0]
    return -torch.stack([log_p[r, t - 1, token] for r, t in places]).mean()


def expected(
    stage: TrainingStage,
    batch: Batch,
    harmful: Batch,
    benign: Batch,
    lam: float,
    alpha: float,
    token: int = TOKEN,
    *,
    normalized: bool = True,
) -> tuple[list[Tensor], float]:
    """Return the gradient of the step and its loss."""
    parameters, w = list(stage.trainable.values()), stage.values()
    g_h, g_a = gradient_at(stage, harmful, w), gradient_at(stage, batch, w)
    loss = cross_entropy(stage.model, batch).item()
    rate = alpha / (math.sqrt(sum(float((slope**2).sum()) for slope in g_h)) + 1e-7) if normalized else alpha
    for parameter, value, slope in zip(parameters, w, g_h, strict=True):
        parameter.data = value - rate * slope
    collapse = collapse_loss(stage, benign, token)
    g_c = torch.autograd.grad(collapse, parameters)
    for parameter, value in zip(parameters, w, strict=True):
        parameter.data = value
    return [a + lam * c for a, c in zip(g_a, g_c, strict=True)], loss + lam * collapse.item()


@pytest.mark.parametrize("normalized", [True, False], ids=["code", "paper"])
@pytest.mark.parametrize(("lam", "alpha"), [(0.1, 0.1), (1.0, 0.5), (3.0, 0.0)])
def test_gradient_equals_plain_autograd(lam: float, alpha: float, normalized: bool) -> None:
    """With alpha = 0, the collapse loss is that at w."""
    training, batch = stage(), tiny.batch()
    drawn = record_stream(training)
    gradient = CTRAP(lam=lam, alpha=alpha, normalized=normalized).gradient(training, batch)
    harmful, benign = drawn
    values, loss = expected(training, batch, harmful, benign, lam, alpha, normalized=normalized)
    assert close_in_norm(gradient, values)
    assert gradient.loss.item() == pytest.approx(loss, rel=1e-5)
    assert not gradient.loss.requires_grad
    assert not close_in_norm(training.gradient(batch), values, 1e-2)
    for other in (alpha + 0.1, 2 * alpha + 0.2):  # the simulated step is large enough for a comparison
        assert not close_in_norm(
            gradient, expected(training, batch, harmful, benign, lam, other, normalized=normalized)[0], 1e-3
        )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """With accumulation, every micro-batch has other harmful and benign rows."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    changes |= {"schedule": "constant", "warmup": 0.0}
    training, twin = stage(**changes), stage(**changes)
    drawn, batches = record_stream(training), []

    class RecordingCTRAP(CTRAP):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    defense = RecordingCTRAP(lam=2.0, alpha=0.3)
    train(training, defense, tiny.rows(12 * accumulation), training.settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == 3 * accumulation
    assert len({str(rows["input_ids"].tolist()) for rows in drawn}) == len(drawn) == 6 * accumulation

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [expected(twin, batches[n], drawn[2 * n], drawn[2 * n + 1], 2.0, 0.3)[0] for n in numbers]
        return [torch.stack(values).mean(0) for values in zip(*micro, strict=True)]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [partial(mean, numbers) for numbers in steps])
    assert_equal_where_firm(training, twin, firm)


# ---------------------------------------------------------------------------------------------------------------------
# The collapse loss


def test_uniform_logits_have_the_loss_log_v() -> None:
    training, batch = stage(), tiny.batch()
    with torch.no_grad():
        training.stack.base.get_output_embeddings().weight.zero_()
    gradient = CTRAP(lam=3.0).gradient(training, batch)
    assert gradient.loss.item() == pytest.approx(4.0 * math.log(tiny.VOCABULARY), rel=1e-6)


@pytest.mark.parametrize("text", ["that", "st", "no start"])
def test_the_token_is_the_last_of_the_text(text: str) -> None:
    token = 3 + ord(text[-2]) % 90
    training, batch = stage(), tiny.batch()
    drawn = record_stream(training)
    gradient = CTRAP(lam=1.0, text=text).gradient(training, batch)
    harmful, benign = drawn
    assert close_in_norm(gradient, expected(training, batch, harmful, benign, 1.0, 0.1, token)[0])


def collapse_after(alpha: float | None, folder: Path) -> tuple[float, float]:
    """Train a stage, and return the collapse loss on benign rows before and after a step on harmful rows.

    Args:
        alpha: The rate of CTRAP, as in the paper; None: plain supervised fine-tuning.
        folder: Folder for checkpoints.
    """
    training = stage(epochs=6, lr=2e-2)
    defense = SFT() if alpha is None else CTRAP(lam=1.0, alpha=alpha, normalized=False, text="e.")
    token = 3 + ord("e") % 90
    train(training, defense, tiny.rows(16), training.settings, folder, pad=tiny.PAD)
    harmful, benign = (tiny.collated(tiny.encode(rows)) for rows in (POOLS.harmful, POOLS.benign))
    slopes = gradient_at(training, harmful, training.values())
    before = collapse_loss(training, benign, token).item()
    with training.shifted([-0.3 * slope for slope in slopes]):
        return before, collapse_loss(training, benign, token).item()


def test_the_collapse_withstands_a_harmful_step(tmp_path: Path) -> None:
    """The control with alpha = 0 collapses too, but a harmful step then undoes a part of it."""
    sft = collapse_after(None, tmp_path / "sft")
    trap = collapse_after(0.3, tmp_path / "trap")
    control = collapse_after(0.0, tmp_path / "control")
    assert max(trap[0], control[0]) < 1 < 4 < min(sft)
    assert trap[1] - trap[0] < 0.1 < 0.2 < control[1] - control[0]
    assert trap[1] < control[1] - 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, and the rows of each pass


def test_parameters_are_bit_identical_after_the_gradient() -> None:
    training = stage()
    initial = training.values()
    CTRAP(lam=5.0, alpha=30.0).gradient(training, tiny.batch())
    assert same(training.values(), initial)
    assert all(parameter.grad is None for parameter in training.trainable.values())
    assert all(parameter.requires_grad for parameter in training.trainable.values())


def test_a_frozen_parameter_has_no_gradient_and_no_shift() -> None:
    training, batch = stage(), tiny.batch()
    drawn = record_stream(training)
    first, *_ = training.trainable.values()
    first.requires_grad_(False)
    gradient = CTRAP(lam=1.0, alpha=0.5).gradient(training, batch)
    assert gradient.values[0] is None
    training.trainable = dict(list(training.trainable.items())[1:])
    harmful, benign = drawn
    assert close(gradient.values[1:], expected(training, batch, harmful, benign, 1.0, 0.5)[0])


def test_every_pass_has_rows_of_its_own_pool() -> None:
    training, batch = stage(), tiny.batch()
    with recorded_rows(training.model) as passes:
        CTRAP().gradient(training, batch)
    harmful, benign, safe = passes
    for rows, pool in ((harmful, POOLS.harmful), (benign, POOLS.benign)):
        encoded = [row.ids for row in tiny.encode(pool)]
        assert len(rows) == training.settings.batch
        assert all(row in encoded for row in rows)
    assert safe == [[token for token in row if token != tiny.PAD] for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("pools", [Pools(paired=POOLS.paired), Pools(benign=POOLS.benign)], ids=["benign", "harmful"])
def test_missing_rows_are_refused(pools: Pools) -> None:
    training = stage()
    training.pools = pools
    with pytest.raises(BadInput):
        CTRAP().gradient(training, tiny.batch())
