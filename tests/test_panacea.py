"""Panacea against its equations in plain PyTorch, and the shift that it ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.defenses.panacea import Panacea
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.experiment.artifacts import ADAPTER
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import Lab
from harmbench_vaccine.pipeline import align, finetune
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.adapters import Adapter
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
from support.world import make_world

POOLS = tiny.example_pools()


def stage(pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """The first micro-batch of a user stage, its adapter away from zero."""
    made, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=pools, name="finetune")
    made.step, made.steps = 1, 10
    return made


def values_of(stage: TrainingStage) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in stage.trainable.values()]


def rederived(
    stage: TrainingStage, batch: Batch, harmful: Batch, rho: float, lam: float, seed: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient and eps, by the paper's lines; with a seed, every pass begins at the same random state."""
    w = values_of(stage)
    g_h = gradient_at(stage, harmful, w, seed)
    eps = [rho * g / (length(g_h) + 1e-7) for g in g_h]
    there = gradient_at(stage, harmful, [value + shift for value, shift in zip(w, eps, strict=True)], seed)
    g_u = gradient_at(stage, batch, w, seed)
    return [u - lam * (t - h) for u, t, h in zip(g_u, there, g_h, strict=True)], eps


class Watched(Panacea):
    """Notes every batch, and the parameters before every hook and at the end of each step."""

    _batches: Any = None
    _at: Any = None
    _after_step: Any = None

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self._batches, self._at = [*(self._batches or []), batch], values_of(stage)
        return super().gradient(stage, batch)

    def after_step(self, stage: TrainingStage) -> None:
        before = values_of(stage)
        super().after_step(stage)
        self._after_step = [*(self._after_step or []), (stage.step, before, values_of(stage))]


def run(
    defense: Defense, folder: Path, salt: int = 0, *, start: Path | None = None, **changes: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """A user stage of 10 steps from fresh objects, stirred or from a stored adapter: the adapter and the log."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "weight_decay": 0.1, **changes})
    torch.manual_seed(salt)
    made, _ = tiny.stage(trained_with=settings, stirred=start is None, start=start, pools=POOLS, name="finetune")
    log = train(made, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in made.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations


@pytest.mark.parametrize(("rho", "lam"), [(1.0, 1.0), (0.1, 5.0), (5.0, 0.2)])
def test_gradient_equals_plain_autograd(rho: float, lam: float) -> None:
    made, batch = stage(), tiny.batch()
    given = record_stream(made)
    gradient = Panacea(rho=rho, lam=lam).gradient(made, batch)
    assert len(given) == 1  # one batch serves both harmful passes
    expected, eps = rederived(made, batch, given[0], rho, lam)
    assert close_in_norm(gradient, expected)
    assert not close_in_norm(made.gradient(batch), expected, 1e-2)  # the correction matters here
    losses = [cross_entropy(made.model, each).item() for each in (batch, given[0])]
    with torch.no_grad():
        for parameter, shift in zip(made.trainable.values(), eps, strict=True):
            parameter.add_(shift)
    risen = cross_entropy(made.model, given[0]).item()
    assert risen > losses[1] + 1e-2  # the perturbation climbs
    assert gradient.loss.item() == pytest.approx(losses[0] - lam * (risen - losses[1]), rel=1e-4)
    assert not gradient.loss.requires_grad


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_and_the_shift_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """With accumulation, a step is the mean of two composed gradients, and the shift is the last one's."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    settings = tiny.settings(**changes, schedule="constant", warmup=0.0)
    made, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS, name="finetune")
    harmful, defense = record_stream(made), Watched(rho=1.0, lam=2.0)
    train(made, defense, tiny.rows(12 * accumulation), settings, tmp_path, pad=tiny.PAD)
    batches = defense._batches
    assert len(batches) == len(harmful) == 3 * accumulation
    assert len({str(each["input_ids"].tolist()) for each in harmful}) == 3 * accumulation

    twin, _ = tiny.stage(trained_with=settings, stirred=True)
    last: list[Tensor] = []

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [rederived(twin, batches[n], harmful[n], 1.0, 2.0) for n in numbers]
        last[:] = micro[-1][1]
        return [torch.stack(gradients).mean(0) for gradients in zip(*(each for each, _ in micro), strict=True)]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    with torch.no_grad():
        for parameter, shift in zip(twin.trainable.values(), last, strict=True):
            parameter.add_(shift)
    assert_equal_where_firm(made, twin, firm)


# ---------------------------------------------------------------------------------------------------------------------
# Harmful losses in closed form


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["", "above 5"])
def test_quadratic_harmful_loss_in_closed_form(offset: float) -> None:
    """L_h = w'Hw/2: eps = rho Hw/||Hw||, and the gradient is grad L_u - lam rho H^2 w/||Hw||. However large L_h is: the
    authors' code cuts it at 5, and lowers it from there on."""
    made, batch = stage(), tiny.batch()
    h = [each.abs() for each in random_coefficients(made, 1)]
    clean = made.gradient(batch)
    replace_harmful_loss(made, lambda w: offset + sum((h_i * w_i**2).sum() / 2 for h_i, w_i in zip(h, w, strict=True)))
    gradient = Panacea(rho=0.7, lam=3.0).gradient(made, batch)
    with torch.no_grad():
        g = [h_i * w_i for h_i, w_i in zip(h, made.trainable.values(), strict=True)]
        expected = [-3.0 * 0.7 * h_i * g_i / length(g) for h_i, g_i in zip(h, g, strict=True)]
    found = [a - c for a, c in zip(gradient.values, clean.values, strict=True)]
    assert length([a - e for a, e in zip(found, expected, strict=True)]) < 1e-4 * length(expected)


def test_linear_harmful_loss_corrects_nothing() -> None:
    made, batch = stage(), tiny.batch()
    slopes = random_coefficients(made, 1)
    clean = made.gradient(batch)
    replace_harmful_loss(made, lambda w: sum((c * w_i).sum() for c, w_i in zip(slopes, w, strict=True)))
    assert same(list(Panacea(rho=5.0, lam=50.0).gradient(made, batch).values), list(clean.values))


# ---------------------------------------------------------------------------------------------------------------------
# The shift at the end


@pytest.mark.parametrize(
    ("rho", "changes"),
    [(1.0, {}), (0.3, {"accumulation": 2}), (2.0, {"epochs": 1.4, "batch": 3})],
    ids=["", "accumulated", "share of an epoch"],
)
def test_the_last_shift_has_norm_rho_and_lies_along_the_last_harmful_gradient(
    rho: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny.settings(**changes, schedule="constant")  # so that the last step is a real one
    made, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS, name="finetune")
    harmful, defense = record_stream(made), Watched(rho=rho, lam=0.1)
    train(made, defense, tiny.rows(20), settings, tmp_path, pad=tiny.PAD)
    *before, (last, old, new) = defense._after_step
    assert len(before) > 3
    assert all(same(one, other) for _, one, other in before)  # no step but the last one is followed by it
    assert last == made.steps
    assert same(new, values_of(made))  # and nothing comes after it
    shift = [b - a for a, b in zip(old, new, strict=True)]
    assert length(shift).item() == pytest.approx(rho, rel=1e-4)

    def off(w: Sequence[Tensor]) -> float:
        g_h = gradient_at(made, harmful[-1], w)
        gap = [rho * g / length(g_h) - s for g, s in zip(g_h, shift, strict=True)]
        return length(gap).item() / rho

    assert off(defense._at) < 1e-4  # at w before its update
    assert off(old) > 1e-2


def test_rho_0_is_sft_bit_for_bit_with_dropout_on(tmp_path: Path) -> None:
    """So the harmful passes take no random numbers from the steps, and differ in nothing but the shift."""
    sft = run(SFT(), tmp_path / "sft")
    assert_same(run(Panacea(rho=0.0, lam=5.0), tmp_path / "still"), sft)
    assert_same(run(Panacea(rho=0.0, lam=0.0), tmp_path / "neutral"), sft)
    moved = run(Panacea(rho=1.0, lam=5.0), tmp_path / "moved")
    assert moved[1][-1]["grad_norm"] != sft[1][-1]["grad_norm"]


def test_lam_0_is_sft_with_a_shift_at_the_end(tmp_path: Path) -> None:
    sft = run(SFT(), tmp_path / "sft")
    defense = Watched(rho=0.5, lam=0.0)
    shifted = run(defense, tmp_path / "shifted")
    assert same(defense._after_step[-1][1], list(sft[0].values()))
    assert shifted[1] == sft[1]
    gap = [shifted[0][name] - sft[0][name] for name in sft[0]]
    assert length(gap).item() == pytest.approx(0.5, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves alone, and what it reads


def test_parameters_are_bit_identical_after_the_gradient() -> None:
    made = stage()
    before = values_of(made)
    Panacea(rho=30.0).gradient(made, tiny.batch())
    assert same(values_of(made), before)
    assert all(parameter.grad is None for parameter in made.trainable.values())


def test_a_frozen_parameter_is_left_out() -> None:
    # FAILS: `_shift` drops the parameters that have no gradient, and `shifted` wants one shift for each of them.
    made, batch = stage(), tiny.batch()
    made.steps = 1
    given = record_stream(made)
    next(iter(made.trainable.values())).requires_grad_(False)
    before, defense = values_of(made), Panacea(rho=1.0, lam=2.0)
    gradient = defense.gradient(made, batch)
    defense.after_step(made)
    after = values_of(made)
    assert gradient.values[0] is None
    assert torch.equal(after[0], before[0])
    with torch.no_grad():
        for parameter, value in zip(made.trainable.values(), before, strict=True):
            parameter.copy_(value)
    made.trainable = dict(list(made.trainable.items())[1:])
    expected, eps = rederived(made, batch, given[0], 1.0, 2.0)
    assert close_in_norm(Gradient(gradient.loss, gradient.values[1:]), expected)
    for new, old, shift in zip(after[1:], before[1:], eps, strict=True):
        torch.testing.assert_close(new - old, shift, atol=1e-6, rtol=1e-4)


def test_the_passes_are_two_on_the_same_harmful_rows_and_one_on_the_batch() -> None:
    made, batch = stage(), tiny.batch()
    seen: list[Any] = []
    made.model.register_forward_pre_hook(
        lambda module, args, more: seen.append(more["input_ids"].tolist()), with_kwargs=True
    )
    Panacea().gradient(made, batch)
    first, second, third = seen
    assert first == second
    assert third == batch["input_ids"].tolist()
    pool = [row.ids for row in tiny.encode(POOLS.harmful)]  # the defender's, not the attacker's
    assert len(first) == made.settings.batch
    assert all([token for token in row if token != tiny.PAD] in pool for row in first)


def test_without_harmful_rows_it_is_refused() -> None:
    with pytest.raises(BadInput):
        Panacea().gradient(stage(Pools()), tiny.batch())


def test_gradient_with_dropout_belongs_to_one_set_of_masks() -> None:
    made, batch = stage(lora_dropout=0.3), tiny.batch()
    made.model.train()
    given = record_stream(made)
    torch.manual_seed(5)
    gradient = Panacea(rho=1.0, lam=2.0).gradient(made, batch)
    assert close_in_norm(gradient, rederived(made, batch, given[0], 1.0, 2.0, seed=5)[0])
    assert not close_in_norm(gradient, rederived(made, batch, given[0], 1.0, 2.0, seed=6)[0], 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize("team", [False, True], ids=["alone", "team"])
@pytest.mark.parametrize(
    ("hook", "count", "changes"),
    [
        ("gradient", 8, {"epochs": 2}),
        ("after_step", 10, {"epochs": 2}),  # the last step is taken, its shift is not: it comes once
        ("gradient", 14, {"epochs": 2, "accumulation": 2, "batch": 3}),  # the last micro-batch
    ],
    ids=["step 8", "before the shift", "last micro-batch"],
)
def test_an_interrupted_stage_ends_bit_equal(
    hook: str, count: int, changes: dict[str, Any], team: bool, tmp_path: Path
) -> None:
    def make(change: Callable[[Defense], Defense]) -> Defense:
        defense = change(Panacea(rho=1.0, lam=1.0))
        return DefenseTeam(members=(defense,), stage="finetune") if team else defense

    whole = run(make(lambda defense: defense), tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(make(lambda defense: interrupting(defense, hook, count)), tmp_path / "cut", salt=1, **changes)
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 1
    assert_same(run(make(lambda defense: defense), tmp_path / "cut", salt=2, **changes), whole)


# ---------------------------------------------------------------------------------------------------------------------
# The adapter


def test_the_stored_adapter_goes_on(tmp_path: Path) -> None:
    """At rate 0 nothing but the shift is added to the adapter that the stage starts from."""
    aligned, stack = tiny.stage(stirred=True)
    stack.trained().save(tmp_path / "aligned")
    ended, _ = run(Panacea(rho=0.4), tmp_path / "run", start=tmp_path / "aligned", lr=0.0)
    gap = [ended[name] - value.detach() for name, value in aligned.trainable.items()]
    assert length(gap).item() == pytest.approx(0.4, rel=1e-4)


def test_in_a_cell_the_aligned_adapter_itself_is_trained_whatever_the_protocol_says(tmp_path: Path) -> None:
    """The protocol lays a second adapter; Panacea demands one, and at rate 0 only its shift tells it from alignment."""
    protocol = make_world(tmp_path / "world", {"topology": "double", "finetune": {"settings": {"lr": 0.0}}})
    cell = Experiment.settle(
        RunSpec(protocol=str(protocol), defense=parse_plugins("panacea=0.4"), attack=parse_plugins("ratio=0.1"))
    )
    assert cell.topology == "single"
    lab = Lab(Store(tmp_path / "store"))
    aligned = align(cell, lab)
    tuned = finetune(cell, lab, aligned)
    (old,), (new,) = aligned.state.adapters, tuned.state.adapters
    assert new == tuned.artifacts["finetune"].path / ADAPTER
    before, after = Adapter.load(old), Adapter.load(new)
    assert after.rank == before.rank
    assert after.scale == before.scale
    gap = [
        n - o for module in before.factors for o, n in zip(before.factors[module], after.factors[module], strict=True)
    ]
    assert length(gap).item() == pytest.approx(0.4, rel=1e-4)
    plain = Experiment.settle(RunSpec(protocol=str(protocol), attack=parse_plugins("ratio=0.1")))
    assert len(finetune(plain, lab, align(plain, lab)).state.adapters) == 2
