"""VAA compared with its equations in plain PyTorch: groups, draws, shifts and the probability of the groups."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.vaa import VAA
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training import lora_linear
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.dropout import draw_mask
from harmbench_vaccine.training.stage import Batch, Gradient, SeparateRun, TrainingStage, weighted
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import length, random_coefficients
from support.compare import close, same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.plain_math import Values, cross_entropy, leaves
from support.trainer import assert_same, interrupting

POOLS = tiny.example_pools()
ROWS = tiny.rows(12)


def stage(pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """Return an alignment stage of 12 rows at step 5 of 10, with a nonzero adapter."""
    result, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=pools)
    result.rows, result.step, result.steps = ROWS, 5, 10
    return result


def grouped(defense: VAA, vulnerable: Sequence[int] = range(0, 12, 2), q: float = 0.5) -> DefenseTeam:
    """Return the defense as a team, with these vulnerable rows of 12."""
    groups = torch.tensor([row in vulnerable for row in range(12)])
    defense.restore({"vulnerable": groups, "probability": torch.tensor(q, dtype=torch.float64)})
    return DefenseTeam(members=(defense,))


def probability(defense: VAA) -> float:
    return defense.state()["probability"].item()


def record_runs(stage: TrainingStage) -> list[tuple[SeparateRun, Adapter]]:
    """Return a list to which every nested training run and its adapter are appended from now on."""
    runs: list[tuple[SeparateRun, Adapter]] = []
    nested = stage.nested

    def recorded(outer: TrainingStage, run: SeparateRun) -> Adapter:
        runs.append((run, nested(outer, run)))
        return runs[-1][1]

    stage.nested = recorded
    return runs


def record_gradients(stage: TrainingStage) -> list[Batch]:
    """Return a list to which every batch is appended whose gradient the stage computes from now on."""
    batches: list[Batch] = []
    gradient_of_stage = stage.gradient

    def gradient(batch: Batch) -> Gradient:
        batches.append(batch)
        return gradient_of_stage(batch)

    stage.gradient = gradient  # type: ignore[method-assign]
    return batches


def run_stage(
    defense: Defense, folder: Path, salt: int = 0, **changes: Any
) -> tuple[tuple[dict[str, Tensor], list[Any]], list[tuple[SeparateRun, Adapter]]]:
    """Train a short stage with new objects and return the adapter with the log, and the nested runs."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "epochs": 1, **changes})
    torch.manual_seed(salt)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    runs = record_runs(training)
    log = train(training, DefenseTeam(members=(defense,)), tiny.rows(20), settings, folder, pad=tiny.PAD)
    return ({name: value.detach().clone() for name, value in training.trainable.items()}, log), runs


# ---------------------------------------------------------------------------------------------------------------------
# The equations


def shifted_gradient(w: Values, batch: Batch, rho: float) -> list[Tensor]:
    """Compute grad L(w + rho g / ||g||; B)."""
    g = torch.autograd.grad(cross_entropy(w, batch), list(w.values()))
    moved = {
        name: (value + rho * slope / length(g)).detach().requires_grad_()
        for (name, value), slope in zip(w.items(), g, strict=True)
    }
    return list(torch.autograd.grad(cross_entropy(moved, batch), list(moved.values())))


def next_probability(q: float, loss: float, is_vulnerable: bool, eta: float) -> float:
    """Compute q after a step, as two weights that are normalized."""
    weights = [q, 1 - q]
    drawn = 0 if is_vulnerable else 1
    weights[drawn] *= math.exp(eta * loss / weights[drawn])
    return sorted([0.1, weights[0] / sum(weights), 0.9])[1]


def test_three_optimizer_steps_equal_plain_adamw(tmp_path: Path) -> None:
    """Two of them are shifted; q depends on the loss before the shift."""
    changes: dict[str, Any] = {"epochs": 1, "lr": 1e-3, "weight_decay": 0.1}
    settings = tiny.settings(**changes, schedule="constant", warmup=0.0)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS, seed=20)
    batches, probabilities = record_gradients(training), []
    passes: list[list[Batch]] = []

    class RecordingVAA(VAA):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.clear()
            gradient = super().gradient(stage, batch)
            passes.append(batches.copy())
            probabilities.append(probability(self))
            return gradient

    defense = RecordingVAA(rho=0.7, eta=0.05)
    team = DefenseTeam(members=(defense,))
    train(training, team, ROWS, settings, tmp_path, pad=tiny.PAD)
    assert [len(step) for step in passes] == [1, 2, 2]
    vulnerable = defense.state()["vulnerable"].nonzero().flatten().tolist()

    twin, _ = tiny.stage(trained_with=settings, stirred=True)
    q, expected = 0.5, []

    def slopes(step: Sequence[Batch]) -> Callable[[], Sequence[Tensor]]:
        def gradient() -> Sequence[Tensor]:
            nonlocal q
            w = leaves(twin)
            loss = cross_entropy(w, step[0])
            q = next_probability(q, loss.item(), step[0]["rows"][0].item() in vulnerable, 0.05)
            expected.append(q)
            return torch.autograd.grad(loss, list(w.values())) if len(step) == 1 else shifted_gradient(w, step[0], 0.7)

        return gradient

    firm = plain_adamw(twin, [slopes(step) for step in passes])
    assert_equal_where_firm(training, twin, firm)
    assert probabilities == pytest.approx(expected, rel=1e-5)
    assert all(first is second for first, second in passes[1:])  # both passes use one batch
    assert len({step[0]["rows"][0].item() in vulnerable for step in passes}) == 2


def test_a_quadratic_loss_in_closed_form() -> None:
    """For L = h/2 w^2 the gradient is h (w + rho g / ||g||): the shift has length rho for any scale of L."""
    for scale in (1.0, 50.0):
        training = stage()
        h = [scale * value.abs() for value in random_coefficients(training, 1)]
        w = list(training.trainable.values())
        training.loss = lambda batch, h=h, w=w: sum((a * x**2).sum() / 2 for a, x in zip(h, w, strict=True))  # type: ignore
        training.step = training.steps
        gradient = grouped(VAA(rho=2.0)).gradient(training, tiny.batch())
        g = [a * x.detach() for a, x in zip(h, w, strict=True)]
        expected = [a * (x.detach() + 2.0 * slope / length(g)) for a, x, slope in zip(h, w, g, strict=True)]
        assert close(gradient.values, expected)
        assert not close(gradient.values, g, 1e-1)


def test_the_probability_of_a_shift_grows_with_the_steps() -> None:
    """It is lam t / T."""
    training = constant_losses({True: 1.0, False: 1.0})
    batches = record_gradients(training)

    def share(lam: float, part: float, rho: float = 0.4) -> float:
        batches.clear()
        for training.step in range(1, 201):
            training.steps = round(training.step / part)
            grouped(VAA(lam=lam, rho=rho)).gradient(training, tiny.batch((5,)))
        return len(batches) / 200 - 1

    assert share(1.0, 1.0) == 1
    assert share(0.0, 1.0) == share(1.0, 1.0, rho=0.0) == 0
    assert share(1.0, 0.25) == pytest.approx(0.25, abs=0.1)
    assert share(0.6, 1.0) == pytest.approx(0.6, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The groups


@cache
def attacked() -> tuple[list[SeparateRun], list[Adapter], list[bool], bool]:
    """Run `before`; return the nested runs, their adapters, the vulnerable rows, and if the adapter is unchanged."""
    training, defense = stage(), VAA(proxy_steps=7, share=0.25)
    runs, initial = record_runs(training), training.values()
    with training.isolated("before"):
        defense.before(training)
    unchanged = same(training.values(), initial) and same(
        list(training.trainable.values()), [p for p in training.model.parameters() if p.requires_grad]
    )
    return [run for run, _ in runs], [adapter for _, adapter in runs], defense.state()["vulnerable"].tolist(), unchanged


def test_the_vulnerable_half_is_that_whose_loss_rises_most() -> None:
    _, (aligned, after), vulnerable, unchanged = attacked()
    assert unchanged
    rises = []
    for row in ROWS:
        losses = [
            cross_entropy(
                {
                    f"base_model.model.{module}.lora_{letter}.weight": factor
                    for module, factors in adapter.factors.items()
                    for letter, factor in zip("AB", factors, strict=True)
                },
                tiny.collated([row]),
            ).item()
            for adapter in (aligned, after)
        ]
        rises.append(losses[1] - losses[0])
    threshold = sorted(rises)[6]
    assert threshold - sorted(rises)[5] > 1e-4  # rounding does not decide
    assert vulnerable == [rise >= threshold for rise in rises]


def test_the_proxy_attack_continues_a_plain_alignment() -> None:
    runs, (aligned, _), _, _ = attacked()
    assert [run.purpose for run in runs] == ["aligned", "proxy attack"]
    assert runs[0].rows == POOLS.alignment
    assert (runs[0].start, runs[0].steps) == (None, None)
    assert runs[1].start is aligned
    assert runs[1].steps == 7
    assert not any(run.on_base for run in runs)
    rows = list(runs[1].rows)
    assert sum(row.harmful for row in rows) == 3  # of 12
    assert len({row.id for row in rows}) == len(rows) == 12
    assert all(row in POOLS.harmful if row.harmful else row in POOLS.benign for row in rows)


@pytest.mark.parametrize(
    ("harmful", "benign", "share", "expected"),
    [
        (12, 12, 0.1, (1, 11)),
        (12, 6, 0.4, (4, 6)),
        (2, 12, 0.25, (2, 6)),
        (1, 1, 0.01, (1, 1)),
        (0, 12, 0.0, (0, 12)),
        (12, 0, 1.0, (12, 0)),
    ],
)
def test_small_pools_keep_the_share_of_harmful_rows(
    harmful: int, benign: int, share: float, expected: tuple[int, int]
) -> None:
    training = stage(Pools(POOLS.alignment, POOLS.paired[:harmful], POOLS.benign[:benign]))
    training.nested = lambda outer, run: outer.stack.trained()
    runs = record_runs(training)
    VAA(share=share).before(training)
    counts = [sum(row.harmful == kind for row in runs[1][0].rows) for kind in (True, False)]
    assert tuple(counts) == expected


@pytest.mark.parametrize("missing", ["harmful rows", "benign rows", "alignment rows"])
def test_missing_rows_are_refused_before_any_training(missing: str) -> None:
    training = stage(
        Pools(
            POOLS.alignment,
            [] if missing == "harmful rows" else POOLS.paired,
            [] if missing == "benign rows" else POOLS.benign,
        )
    )
    if missing == "alignment rows":
        training.rows = ROWS[:1]
    runs = record_runs(training)
    with pytest.raises(BadInput, match=missing):
        VAA().before(training)
    assert not runs


@pytest.mark.parametrize(("count", "vulnerable"), [(2, 1), (3, 1), (8, 4)])
def test_equal_losses_still_give_two_groups(count: int, vulnerable: int) -> None:
    """A comparison with the median would leave one group empty."""
    training, defense = stage(), VAA()
    training.nested = lambda outer, run: outer.stack.trained()  # no attack
    training.rows = ROWS[:1] * count
    defense.before(training)
    assert defense.state()["vulnerable"].sum() == vulnerable
    team, drawn = DefenseTeam(members=(defense,)), set()
    for training.step in range(1, 20):
        drawn |= set(team.batch(training, tiny.batch((5, 6)))["rows"].tolist())
    assert drawn == set(range(count))


# ---------------------------------------------------------------------------------------------------------------------
# The draws


@pytest.mark.parametrize("q", [0.1, 0.75])
def test_a_batch_is_from_a_group_drawn_by_its_probability(q: float) -> None:
    training, vulnerable = stage(), {1, 2, 3, 4, 9}
    team = grouped(VAA(), sorted(vulnerable), q)
    counts, drawn = [], torch.zeros(12)
    for number in range(300):
        training.step, training.micro = 1 + number // 2, number % 2
        batch = team.batch(training, {"labels": torch.zeros(3, 4)})
        rows = batch["rows"].tolist()
        assert len(set(rows)) == len(rows) == 3
        assert len({row in vulnerable for row in rows}) == 1
        ids = [
            ids[:size] for ids, size in zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1), strict=True)
        ]
        assert ids == [ROWS[row].ids for row in rows]
        counts.append(rows[0] in vulnerable)
        drawn[rows] += 1
    assert sum(counts) / 300 == pytest.approx(q, abs=0.08)
    assert {(True, False), (False, True)} <= set(zip(counts[0::2], counts[1::2], strict=True))  # micro-batches differ
    for group in (sorted(vulnerable), sorted(set(range(12)) - vulnerable)):
        assert drawn[group].min() > 0.5 * drawn[group].mean()


def test_a_small_group_gives_a_small_batch() -> None:
    training, team = stage(), grouped(VAA(), [3, 7], 0.9)
    sizes = set()
    for training.step in range(1, 30):
        sizes.add(len(team.batch(training, tiny.batch((5, 5, 5, 5)))["rows"]))
    assert sizes == {2, 4}


def test_the_draws_depend_on_the_seed_of_the_stage_only() -> None:
    """Neither the random numbers of Python, as in the authors' code, nor those of dropout matter or change."""
    batches = []
    for salt, seed in ((1, 7), (2, 7), (3, 8)):
        training, _ = tiny.stage(trained_with=tiny.settings(), stirred=True, seed=seed)
        training.rows, training.step, training.steps = ROWS, 10, 10
        random.seed(salt)
        torch.manual_seed(salt)
        states = random.getstate(), torch.get_rng_state()
        rows = []
        for training.micro in range(4):
            batch = grouped(VAA()).batch(training, tiny.batch())
            rows.append(batch["rows"].tolist())
            grouped(VAA()).gradient(training, tiny.batch())
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        batches.append(rows)
    assert batches[0] == batches[1] != batches[2]


class Weights(Defense):
    """A defense that doubles the weight of row 1 and drops all others."""

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        return weighted(batch, 2.0 * (batch["rows"] == 1))


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_another_defense_changes_the_drawn_rows(is_first: bool) -> None:
    training, defense = stage(), VAA(lam=0.0)
    grouped(defense, [1, 2], q=0.9)
    members = (defense, Weights()) if is_first else (Weights(), defense)
    gradient = DefenseTeam(members=members).gradient(training, {**tiny.batch(), "rows": torch.arange(3)})
    w = leaves(training)
    counts = [sum(label >= 0 for label in ROWS[row].labels) for row in (1, 2)]
    loss = 2 * counts[0] / sum(counts) * cross_entropy(w, tiny.collated([ROWS[1]]))
    assert close(gradient.values, list(torch.autograd.grad(loss, list(w.values()))))


# ---------------------------------------------------------------------------------------------------------------------
# The probability of the groups


def constant_losses(losses: dict[bool, float]) -> TrainingStage:
    """Return a stage in which each group, of even or odd rows, has a constant loss."""
    training = stage()
    training.gradient = lambda batch: Gradient(  # type: ignore[method-assign]
        torch.tensor(losses[batch["rows"][0].item() % 2 == 0]), [torch.zeros(1)] * len(training.trainable)
    )
    return training


def run_probability(losses: dict[bool, float], steps: int, **params: Any) -> list[float]:
    training, defense = constant_losses(losses), VAA(rho=0.0, **params)
    team, history = grouped(defense), []
    for training.step in range(1, steps + 1):
        team.gradient(training, tiny.batch((5,)))
        history.append(probability(defense))
    return history


def test_the_group_with_the_higher_loss_gains_probability_within_the_bounds() -> None:
    history = run_probability({True: 3.0, False: 0.5}, 300)
    mirrored = run_probability({True: 0.5, False: 3.0}, 300)
    equal = run_probability({True: 2.0, False: 2.0}, 300)
    assert torch.tensor(history[200:]).mean() > 0.7
    assert torch.tensor(mirrored[200:]).mean() < 0.3
    assert all(0.1 <= q <= 0.9 for q in [*history, *mirrored, *equal])
    assert max(history) == 0.9
    assert min(mirrored) == 0.1


@pytest.mark.parametrize("is_vulnerable", [True, False])
@pytest.mark.parametrize(("q", "loss"), [(0.5, 2.0), (0.3, 0.7), (0.85, 40.0), (0.1, 1e7), (0.9, 1e-3)])
def test_one_update_equals_its_equation(q: float, loss: float, is_vulnerable: bool) -> None:
    """A large loss reaches the bound without overflow."""
    for step in range(1, 100):
        training, defense = constant_losses({True: loss, False: loss}), VAA(rho=0.0, eta=0.05)
        training.step = step
        team = grouped(defense, q=q)
        if (team.batch(training, tiny.batch((5,)))["rows"][0].item() % 2 == 0) == is_vulnerable:
            break
    team.gradient(training, tiny.batch((5,)))
    bound = 0.9 if is_vulnerable else 0.1
    expected = bound if loss == 1e7 else next_probability(q, loss, is_vulnerable, 0.05)
    assert probability(defense) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, dropout, interruptions


def test_parameters_are_bit_identical_after_a_shifted_step() -> None:
    """A parameter without a gradient is neither shifted nor changed: the authors' code fails to restore it."""
    training, team = stage(), grouped(VAA(rho=5.0))
    training.step = training.steps
    first, *others = training.trainable.values()
    first.requires_grad_(False)
    initial = training.values()
    w = leaves(training)
    batch, moved = team.batch(training, tiny.batch()), []
    training.model.register_forward_pre_hook(lambda *args: moved.append(not torch.equal(first, initial[0])))
    gradient = team.gradient(training, tiny.batch())
    assert moved == [False, False]
    assert same(training.values(), initial)
    assert all(parameter.grad is None for parameter in (first, *others))
    assert gradient.values[0] is None
    fixed = next(iter(w))
    free = {name: value for name, value in w.items() if name != fixed}
    g = torch.autograd.grad(cross_entropy(w, batch), list(free.values()))
    shifted = {
        name: (v + 5.0 * s / length(g)).detach().requires_grad_() for (name, v), s in zip(free.items(), g, strict=True)
    }
    loss = cross_entropy({fixed: w[fixed], **shifted}, batch)
    assert close(gradient.values[1:], list(torch.autograd.grad(loss, list(shifted.values()))))


def test_both_passes_of_a_shifted_step_see_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    training = stage(lora_dropout=0.3)
    training.model.train()
    training.step = training.steps
    masks: list[list[Tensor]] = []
    training.model.register_forward_pre_hook(lambda module, args: masks.append([]))

    def draw(x: Tensor, rate: float) -> Tensor:
        mask = draw_mask(x, rate)
        masks[-1].append(mask == 0)
        return mask

    monkeypatch.setattr(lora_linear, "draw_mask", draw)
    for _ in range(2):
        grouped(VAA()).gradient(training, tiny.batch())
    first, second, again, _ = masks
    assert len(first) == 6  # three modules in two layers
    assert same(first, second)
    assert not same(first, again)  # the next step has different masks


def test_an_interrupted_stage_gives_the_same_result_without_a_second_attack(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2}
    defense = VAA(eta=0.2)
    complete, runs = run_stage(defense.fresh(), tmp_path / "complete", **changes)
    assert len(runs) == 2
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(defense.fresh(), "gradient", 6), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    resumed, runs = run_stage(defense.fresh(), tmp_path / "cut", salt=2, **changes)
    assert not runs
    assert_same(resumed, complete)
