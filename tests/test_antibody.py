"""Antibody compared with its equations in plain PyTorch: the flattening term of alignment, the weights of user rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.defenses.antibody import Antibody
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import gradient_at, length, peft_computation, random_coefficients
from support.compare import close, close_in_norm, same
from support.hooks import recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw

POOLS = tiny.example_pools()
STEPS: dict[str, Any] = {"epochs": 1, "lr": 1e-3, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0}
"""Settings under which 12 rows give three steps of `plain_adamw`."""


def stage_of(name: Any, **changes: Any) -> TrainingStage:
    """Return a stage with pairs at its first micro-batch, with a nonzero adapter."""
    stage, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=POOLS, name=name)
    stage.rows, stage.step, stage.steps = tiny.rows(12), 1, 10
    return stage


def record_pairs(stage: TrainingStage) -> list[tuple[Batch, Batch]]:
    """Return a list to which the refusals and harmful rows of every draw are appended from now on."""
    draws: list[tuple[Batch, Batch]] = []
    plain = stage.paired_stream

    def paired_stream(*args: Any) -> tuple[Batch, Batch]:
        draws.append(plain(*args))
        return draws[-1]

    stage.paired_stream = paired_stream  # type: ignore[method-assign, assignment]
    return draws


def dot(left: Sequence[Any], right: Sequence[Any]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Alignment


def flattening_at(stage: TrainingStage, harmful: Batch, rho: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return g_s and w'."""
    w = stage.values()
    g_h = gradient_at(stage, harmful, w)
    shifted = [value - rho * g / length(g_h) for value, g in zip(w, g_h, strict=True)]
    return [g - h for g, h in zip(g_h, gradient_at(stage, harmful, shifted), strict=True)], shifted


def expected_gradient(
    stage: TrainingStage, batch: Batch, pairs: tuple[Batch, Batch], xi: float, rho: float, lam_r: float
) -> tuple[list[Tensor], float]:
    """Return the gradient of the paper's equations, and lam."""
    refusals, harmful = pairs
    g_s, shifted = flattening_at(stage, harmful, rho)
    g_a, g_r = gradient_at(stage, batch, stage.values()), gradient_at(stage, refusals, shifted)
    lam = max(0.0, xi - dot(g_s, g_a) / dot(g_s, g_s))
    return [a + lam * s + lam_r * r for a, s, r in zip(g_a, g_s, g_r, strict=True)], lam


@pytest.mark.parametrize(("xi", "rho", "lam_r"), [(10.0, 0.05, 1.0), (0.5, 2.0, 0.3), (0.0, 0.5, 0.0)])
def test_gradient_equals_plain_autograd(xi: float, rho: float, lam_r: float) -> None:
    stage, batch = stage_of("align"), tiny.batch()
    draws = record_pairs(stage)
    gradient = Antibody(xi=xi, rho=rho, lam_r=lam_r).gradient(stage, batch)
    assert len(draws) == 1
    expected, _ = expected_gradient(stage, batch, draws[0], xi, rho, lam_r)
    assert close_in_norm(gradient, expected, 1e-4)  # g_s is a small difference of two gradients
    assert not gradient.loss.requires_grad


def test_the_weight_adapts_to_the_angle_between_both_gradients() -> None:
    """With lam > 0, <g_a + lam g_s, g_s> = xi ||g_s||^2, here 0: no step makes the harmful loss steeper."""
    stage = stage_of("align")
    draws, regimes = record_pairs(stage), set()
    for seed in range(6):
        batch = tiny.batch(seed=seed)
        gradient = Antibody(xi=0.0, rho=2.0, lam_r=0.0).gradient(stage, batch)
        g_s, _ = flattening_at(stage, draws[-1][1], 2.0)
        conflict = dot(g_s, stage.gradient(batch).values) < 0
        regimes.add(conflict)
        if conflict:
            assert abs(dot(gradient.values, g_s)) < 1e-4 * float(gradient.norm) * float(length(g_s))
        else:
            assert same([value for value in gradient.values if value is not None], plain(stage, batch))
    assert regimes == {True, False}


def plain(stage: TrainingStage, batch: Batch) -> list[Tensor]:
    return [value for value in stage.gradient(batch).values if value is not None]


def test_three_steps_of_alignment_equal_plain_adamw(tmp_path: Path) -> None:
    batches: list[Batch] = []

    class Recording(Antibody):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    stage, twin = (stage_of("align", **STEPS) for _ in range(2))
    draws = record_pairs(stage)
    train(stage, Recording(xi=3.0, rho=1.0, lam_r=0.5), tiny.rows(12), stage.settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == len(draws) == 3
    assert len({str(harmful["input_ids"].tolist()) for _, harmful in draws}) == 3

    def expected(step: int) -> list[Tensor]:
        return expected_gradient(twin, batches[step], draws[step], 3.0, 1.0, 0.5)[0]

    assert_equal_where_firm(stage, twin, plain_adamw(twin, [partial(expected, step) for step in range(3)]))


def test_harmful_rows_without_curvature_add_only_the_refusals() -> None:
    """The gradient of a linear loss does not change along the step: lam is 0, not infinite."""
    stage, batch = stage_of("align"), tiny.batch()
    draws, slopes, loss_of_stage = record_pairs(stage), random_coefficients(stage, 1), stage.loss

    def loss(batch: Batch) -> Tensor:
        if any(batch is harmful for _, harmful in draws):
            return torch.stack([(c * w).sum() for c, w in zip(slopes, stage.trainable.values(), strict=True)]).sum()
        return loss_of_stage(batch)

    stage.loss = loss  # type: ignore[method-assign]
    gradient = Antibody(xi=10.0, rho=0.5, lam_r=1.0).gradient(stage, batch)
    w, g_a = stage.values(), plain(stage, batch)
    g_r = gradient_at(stage, draws[0][0], [v - 0.5 * c / length(slopes) for v, c in zip(w, slopes, strict=True)])
    assert close_in_norm(gradient, [a + r for a, r in zip(g_a, g_r, strict=True)])


def test_each_pass_reads_its_rows() -> None:
    """Two passes read the harmful rows, one the refusals of the same prompts, and one the alignment batch."""
    stage, batch = stage_of("align"), tiny.batch()
    with recorded_rows(stage.model) as passes:
        Antibody().gradient(stage, batch)
    first, second, refusals, rows = passes
    pairs = [[tiny.encode([example])[0].ids for example in pair] for pair in POOLS.paired]
    assert first == second
    assert len(first) == stage.settings.batch
    assert all([refusal, harmful] in pairs for refusal, harmful in zip(refusals, first, strict=True))
    assert rows == [[token for token in row if token != tiny.PAD] for row in batch["input_ids"].tolist()]


def test_alignment_changes_no_parameter() -> None:
    stage = stage_of("align")
    initial = stage.values()
    next(iter(stage.trainable.values())).requires_grad_(False)
    gradient = Antibody(rho=30.0).gradient(stage, tiny.batch())
    assert same(stage.values(), initial)
    assert all(parameter.grad is None for parameter in stage.trainable.values())
    assert [value is None for value in gradient.values] == [True] + [False] * (len(initial) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# User stage


def user_batch(stage: TrainingStage, numbers: Sequence[int]) -> Batch:
    """Return rows of the stage as the trainer does."""
    return {**stage.collated([stage.rows[number] for number in numbers]), "rows": torch.tensor(numbers)}


def log_probability(stage: TrainingStage, row: Encoded) -> Tensor:
    """Return the sum of log p over the response tokens of a row, which the model reads alone."""
    with peft_computation():
        log_p = stage.model(input_ids=torch.tensor([row.ids], device=stage.device)).logits[0].log_softmax(-1)
    return torch.stack([log_p[place - 1, label] for place, label in enumerate(row.labels) if label != IGNORED]).sum()


def refused(row: Encoded) -> Encoded:
    """Return the prompt of a row with the first refusal of the pool as its response."""
    (refusal,) = tiny.encode([POOLS.paired[0][0]])
    response = [label for label in refusal.labels if label != IGNORED]
    prompt = [token for token, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
    return Encoded(prompt + response, [IGNORED] * len(prompt) + response)


@torch.no_grad()
def expected_weights(stage: TrainingStage, numbers: Sequence[int], tau: float) -> Tensor:
    rows = [stage.rows[number] for number in numbers]
    ratio = torch.stack([log_probability(stage, row) - log_probability(stage, refused(row)) for row in rows])
    exponentials = torch.exp((ratio - ratio.max()).double() / tau)
    return len(rows) * exponentials / exponentials.sum()


@pytest.mark.parametrize("tau", [1.0, 20.0])
def test_row_weights_compare_the_answer_with_a_refusal_of_the_same_prompt(tau: float) -> None:
    stage, numbers = stage_of("finetune"), [5, 0, 7, 2]
    weights = Antibody(tau=tau).batch(stage, user_batch(stage, numbers))["weights"]
    expected = expected_weights(stage, numbers, tau)
    assert close(weights[:, 0], expected)
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    assert expected.std() > 0.1
    tiny.stir(stage.trainable, seed=8)  # the current model decides
    assert close(
        Antibody(tau=tau).batch(stage, user_batch(stage, numbers))["weights"][:, 0],
        expected_weights(stage, numbers, tau),
    )
    assert not close(expected_weights(stage, numbers, tau), expected, 1e-2)


def test_a_row_whose_answer_is_the_refusal_has_a_smaller_weight_than_a_fitted_row() -> None:
    """With p(y | x) = p(refusal | x), r is 0; a row that the model has learned has r > 0."""
    stage = stage_of("finetune")
    learned, *others = tiny.rows(12, seed=3)
    stage.rows = [learned, refused(others[0])]
    optimizer = torch.optim.Adam(stage.trainable.values(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        stage.loss(stage.collated([learned])).backward()
        optimizer.step()
    first, second = Antibody(tau=5.0).batch(stage, user_batch(stage, [0, 1]))["weights"][:, 0].tolist()
    assert first > 1.5 > second
    assert first + second == pytest.approx(2)


def test_weights_are_without_dropout_and_keep_the_random_state() -> None:
    stage = stage_of("finetune", lora_dropout=0.5)
    stage.model.eval()
    expected = expected_weights(stage, [0, 1, 2], 5.0)
    stage.model.train()
    state = torch.get_rng_state()
    weights = Antibody(tau=5.0).batch(stage, user_batch(stage, [0, 1, 2]))["weights"]
    assert torch.equal(torch.get_rng_state(), state)
    assert stage.model.training
    assert not weights.requires_grad
    assert close(weights[:, 0], expected)


def test_a_refusal_is_cut_at_the_maximum_length() -> None:
    """A model with as many positions as `max_length` can therefore read it."""
    stage = stage_of("finetune", max_length=6)
    stage.rows = [Encoded([9, 8, 7, 6, 5], [IGNORED] * 4 + [5]), Encoded([4, 3, 5, 9], [IGNORED, IGNORED, 5, 9])]
    weights = Antibody(tau=5.0).batch(stage, user_batch(stage, [0, 1]))["weights"]
    with torch.no_grad():
        cut = [replace(row, ids=row.ids[:6], labels=row.labels[:6]) for row in map(refused, stage.rows)]
        ratio = torch.stack(
            [log_probability(stage, row) - log_probability(stage, r) for row, r in zip(stage.rows, cut, strict=True)]
        )
    assert len(refused(stage.rows[0]).ids) > 6
    assert close(weights[:, 0], 2 * (ratio / 5).softmax(0))


class Recording(Antibody):
    """Records the row numbers of every micro-batch."""

    _numbers: list[list[int]] = PrivateAttr(default_factory=list)

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        self._numbers.append(batch["rows"].tolist())
        return super().batch(stage, batch)


def test_three_user_steps_equal_plain_adamw(tmp_path: Path) -> None:
    stage, twin = (stage_of("finetune", **STEPS) for _ in range(2))
    defense = Recording(tau=5.0)
    train(stage, DefenseTeam(members=(defense,), stage="finetune"), stage.rows, stage.settings, tmp_path, pad=tiny.PAD)
    assert len(defense._numbers) == 3

    def expected(numbers: Sequence[int]) -> Sequence[Tensor]:
        rows = [twin.rows[number] for number in numbers]
        sums = torch.stack([-log_probability(twin, row) for row in rows])
        tokens = sum(label != IGNORED for row in rows for label in row.labels)
        loss = (expected_weights(twin, numbers, 5.0) * sums).sum() / tokens
        return torch.autograd.grad(loss, list(twin.trainable.values()))

    assert_equal_where_firm(stage, twin, plain_adamw(twin, [partial(expected, step) for step in defense._numbers]))
    sft = stage_of("finetune", **STEPS)
    train(sft, SFT(), sft.rows, sft.settings, tmp_path / "sft", pad=tiny.PAD)
    assert not close(sft.values(), stage.values(), 1e-3)


def test_missing_pairs_are_refused_in_both_stages() -> None:
    for name in ("align", "finetune"):
        stage = stage_of(name)
        stage.pools = Pools(alignment=POOLS.alignment, benign=POOLS.benign)
        with pytest.raises(BadInput, match=name):
            DefenseTeam(members=(Antibody(),), stage=name).gradient(stage, user_batch(stage, [0, 1]))
