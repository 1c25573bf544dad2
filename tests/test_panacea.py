"""Panacea compared with its equations in plain PyTorch, and its final shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.panacea import Panacea
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.experiment.artifacts import ADAPTER
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
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
from support.hooks import recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.runs import run_context
from support.trainer import assert_same, interrupting
from support.world import make_world

POOLS = tiny.example_pools()


def stage(pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """Return a user stage at its first micro-batch, with a nonzero adapter."""
    result, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, pools=pools, name="finetune")
    result.step, result.steps = 1, 10
    return result


def values_of(stage: TrainingStage) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in stage.trainable.values()]


def expected_gradient(
    stage: TrainingStage, batch: Batch, harmful: Batch, rho: float, lam: float, seed: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the gradient and eps of the paper; with a seed, every pass starts from the same random state."""
    w = values_of(stage)
    g_h = gradient_at(stage, harmful, w, seed)
    eps = [rho * g / (length(g_h) + 1e-7) for g in g_h]
    g_shifted = gradient_at(stage, harmful, [value + shift for value, shift in zip(w, eps, strict=True)], seed)
    g_u = gradient_at(stage, batch, w, seed)
    return [u - lam * (t - h) for u, t, h in zip(g_u, g_shifted, g_h, strict=True)], eps


class RecordingPanacea(Panacea):
    """A Panacea that records every batch, and the parameters before and after every hook."""

    _batches: Any = None
    _at: Any = None
    _after_step: Any = None

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self._batches, self._at = [*(self._batches or []), batch], values_of(stage)
        return super().gradient(stage, batch)

    def after_step(self, stage: TrainingStage) -> None:
        initial = values_of(stage)
        super().after_step(stage)
        self._after_step = [*(self._after_step or []), (stage.step, initial, values_of(stage))]


def run_stage(
    defense: Defense, folder: Path, salt: int = 0, *, start: Path | None = None, **changes: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train 10 user steps with new objects, from random or stored values, and return the adapter and the log."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "weight_decay": 0.1, **changes})
    torch.manual_seed(salt)
    training, _ = tiny.stage(trained_with=settings, stirred=start is None, start=start, pools=POOLS, name="finetune")
    log = train(training, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in training.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@pytest.mark.parametrize(("rho", "lam"), [(1.0, 1.0), (0.1, 5.0), (5.0, 0.2)])
def test_gradient_equals_plain_autograd(rho: float, lam: float) -> None:
    training, batch = stage(), tiny.batch()
    harmful = record_stream(training)
    gradient = Panacea(rho=rho, lam=lam).gradient(training, batch)
    assert len(harmful) == 1  # both harmful passes use one batch
    expected, eps = expected_gradient(training, batch, harmful[0], rho, lam)
    assert close_in_norm(gradient, expected)
    assert not close_in_norm(training.gradient(batch), expected, 1e-2)  # the correction is large enough to test
    losses = [cross_entropy(training.model, rows).item() for rows in (batch, harmful[0])]
    with torch.no_grad():
        for parameter, shift in zip(training.trainable.values(), eps, strict=True):
            parameter.add_(shift)
    shifted_loss = cross_entropy(training.model, harmful[0]).item()
    assert shifted_loss > losses[1] + 1e-2  # the perturbation raises the loss
    assert gradient.loss.item() == pytest.approx(losses[0] - lam * (shifted_loss - losses[1]), rel=1e-4)
    assert not gradient.loss.requires_grad


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_and_the_shift_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """With accumulation, a step is the mean of two composed gradients, and the shift is that of the last one."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    settings = tiny.settings(**changes, schedule="constant", warmup=0.0)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS, name="finetune")
    harmful, defense = record_stream(training), RecordingPanacea(rho=1.0, lam=2.0)
    train(training, defense, tiny.rows(12 * accumulation), settings, tmp_path, pad=tiny.PAD)
    batches = defense._batches
    assert len(batches) == len(harmful) == 3 * accumulation
    assert len({str(rows["input_ids"].tolist()) for rows in harmful}) == 3 * accumulation

    twin, _ = tiny.stage(trained_with=settings, stirred=True)
    last: list[Tensor] = []

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [expected_gradient(twin, batches[n], harmful[n], 1.0, 2.0) for n in numbers]
        last[:] = micro[-1][1]
        return [torch.stack(gradients).mean(0) for gradients in zip(*(rows for rows, _ in micro), strict=True)]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    with torch.no_grad():
        for parameter, shift in zip(twin.trainable.values(), last, strict=True):
            parameter.add_(shift)
    assert_equal_where_firm(training, twin, firm)


# ---------------------------------------------------------------------------------------------------------------------
# Harmful losses in closed form


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["", "above 5"])
def test_quadratic_harmful_loss_in_closed_form(offset: float) -> None:
    """L_h = w'Hw/2: eps = rho Hw/||Hw||, and the gradient is grad L_u - lam rho H^2 w/||Hw||, for any value of L_h.

    The authors' code clips L_h at 5, and lowers it above 5.
    """
    training, batch = stage(), tiny.batch()
    h = [coefficient.abs() for coefficient in random_coefficients(training, 1)]
    clean = training.gradient(batch)
    replace_harmful_loss(
        training, lambda w: offset + sum((h_i * w_i**2).sum() / 2 for h_i, w_i in zip(h, w, strict=True))
    )
    gradient = Panacea(rho=0.7, lam=3.0).gradient(training, batch)
    with torch.no_grad():
        g = [h_i * w_i for h_i, w_i in zip(h, training.trainable.values(), strict=True)]
        expected = [-3.0 * 0.7 * h_i * g_i / length(g) for h_i, g_i in zip(h, g, strict=True)]
    correction = [a - c for a, c in zip(gradient.values, clean.values, strict=True)]
    assert length([a - e for a, e in zip(correction, expected, strict=True)]) < 1e-4 * length(expected)


def test_linear_harmful_loss_has_no_correction() -> None:
    training, batch = stage(), tiny.batch()
    slopes = random_coefficients(training, 1)
    clean = training.gradient(batch)
    replace_harmful_loss(training, lambda w: sum((c * w_i).sum() for c, w_i in zip(slopes, w, strict=True)))
    assert same(list(Panacea(rho=5.0, lam=50.0).gradient(training, batch).values), list(clean.values))


# ---------------------------------------------------------------------------------------------------------------------
# The shift at the end


@pytest.mark.parametrize(
    ("rho", "changes"),
    [(1.0, {}), (0.3, {"accumulation": 2}), (2.0, {"epochs": 1.4, "batch": 3})],
    ids=["", "accumulated", "part of an epoch"],
)
def test_the_last_shift_has_norm_rho_and_the_direction_of_the_last_harmful_gradient(
    rho: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny.settings(**changes, schedule="constant")  # so that the last learning rate is not 0
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS, name="finetune")
    harmful, defense = record_stream(training), RecordingPanacea(rho=rho, lam=0.1)
    train(training, defense, tiny.rows(20), settings, tmp_path, pad=tiny.PAD)
    *earlier, (last, old, new) = defense._after_step
    assert len(earlier) > 3
    assert all(same(left, right) for _, left, right in earlier)  # only the last step has the shift
    assert last == training.steps
    assert same(new, values_of(training))  # and nothing changes after it
    shift = [b - a for a, b in zip(old, new, strict=True)]
    assert length(shift).item() == pytest.approx(rho, rel=1e-4)

    def error(w: Sequence[Tensor]) -> float:
        g_h = gradient_at(training, harmful[-1], w)
        gap = [rho * g / length(g_h) - s for g, s in zip(g_h, shift, strict=True)]
        return length(gap).item() / rho

    assert error(defense._at) < 1e-4  # at w before the last update
    assert error(old) > 1e-2


def test_rho_0_equals_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    """The harmful passes therefore use no random numbers of the steps, and differ only by the shift."""
    sft = run_stage(SFT(), tmp_path / "sft")
    assert_same(run_stage(Panacea(rho=0.0, lam=5.0), tmp_path / "rho"), sft)
    assert_same(run_stage(Panacea(rho=0.0, lam=0.0), tmp_path / "neutral"), sft)
    shifted = run_stage(Panacea(rho=1.0, lam=5.0), tmp_path / "shifted")
    assert shifted[1][-1]["grad_norm"] != sft[1][-1]["grad_norm"]


def test_lam_0_equals_sft_with_a_final_shift(tmp_path: Path) -> None:
    sft = run_stage(SFT(), tmp_path / "sft")
    defense = RecordingPanacea(rho=0.5, lam=0.0)
    shifted = run_stage(defense, tmp_path / "shifted")
    assert same(defense._after_step[-1][1], list(sft[0].values()))
    assert shifted[1] == sft[1]
    gap = [shifted[0][name] - sft[0][name] for name in sft[0]]
    assert length(gap).item() == pytest.approx(0.5, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, and the rows of each pass


def test_parameters_are_bit_identical_after_the_gradient() -> None:
    training = stage()
    initial = values_of(training)
    Panacea(rho=30.0).gradient(training, tiny.batch())
    assert same(values_of(training), initial)
    assert all(parameter.grad is None for parameter in training.trainable.values())


def test_a_frozen_parameter_has_no_gradient_and_no_shift() -> None:
    # `shifted` needs one shift for every parameter, also for one without a gradient.
    training, batch = stage(), tiny.batch()
    training.steps = 1
    harmful = record_stream(training)
    next(iter(training.trainable.values())).requires_grad_(False)
    initial, defense = values_of(training), Panacea(rho=1.0, lam=2.0)
    gradient = defense.gradient(training, batch)
    defense.after_step(training)
    final = values_of(training)
    assert gradient.values[0] is None
    assert torch.equal(final[0], initial[0])
    with torch.no_grad():
        for parameter, value in zip(training.trainable.values(), initial, strict=True):
            parameter.copy_(value)
    training.trainable = dict(list(training.trainable.items())[1:])
    expected, eps = expected_gradient(training, batch, harmful[0], 1.0, 2.0)
    assert close_in_norm(Gradient(gradient.loss, gradient.values[1:]), expected)
    for new, old, shift in zip(final[1:], initial[1:], eps, strict=True):
        torch.testing.assert_close(new - old, shift, atol=1e-6, rtol=1e-4)


def test_two_passes_use_the_same_harmful_rows_and_one_uses_the_batch() -> None:
    training, batch = stage(), tiny.batch()
    with recorded_rows(training.model) as passes:
        Panacea().gradient(training, batch)
    first, second, third = passes
    assert first == second
    assert third == [[token for token in row if token != tiny.PAD] for row in batch["input_ids"].tolist()]
    pool = [row.ids for row in tiny.encode(POOLS.harmful)]  # the rows of the defender, not of the attacker
    assert len(first) == training.settings.batch
    assert all(row in pool for row in first)


def test_missing_harmful_rows_are_refused() -> None:
    with pytest.raises(BadInput):
        Panacea().gradient(stage(Pools()), tiny.batch())


def test_all_passes_start_from_the_same_random_state() -> None:
    training, batch = stage(lora_dropout=0.3), tiny.batch()
    training.model.train()
    harmful = record_stream(training)
    torch.manual_seed(5)
    gradient = Panacea(rho=1.0, lam=2.0).gradient(training, batch)
    assert close_in_norm(gradient, expected_gradient(training, batch, harmful[0], 1.0, 2.0, seed=5)[0])
    assert not close_in_norm(gradient, expected_gradient(training, batch, harmful[0], 1.0, 2.0, seed=6)[0], 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize("team", [False, True], ids=["alone", "team"])
@pytest.mark.parametrize(
    ("hook", "count", "changes"),
    [
        ("gradient", 8, {"epochs": 2}),
        ("after_step", 10, {"epochs": 2}),  # after the last step and before its shift: the shift is added once
        ("gradient", 14, {"epochs": 2, "accumulation": 2, "batch": 3}),  # the last micro-batch
    ],
    ids=["step 8", "before the shift", "last micro-batch"],
)
def test_an_interrupted_stage_gives_the_same_result(
    hook: str, count: int, changes: dict[str, Any], team: bool, tmp_path: Path
) -> None:
    def make(change: Callable[[Defense], Defense]) -> Defense:
        defense = change(Panacea(rho=1.0, lam=1.0))
        return DefenseTeam(members=(defense,), stage="finetune") if team else defense

    complete = run_stage(make(lambda defense: defense), tmp_path / "complete", **changes)
    with pytest.raises(KeyboardInterrupt):
        run_stage(make(lambda defense: interrupting(defense, hook, count)), tmp_path / "cut", salt=1, **changes)
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 1
    assert_same(run_stage(make(lambda defense: defense), tmp_path / "cut", salt=2, **changes), complete)


# ---------------------------------------------------------------------------------------------------------------------
# The adapter


def test_the_stored_adapter_is_shifted(tmp_path: Path) -> None:
    """At learning rate 0, only the shift is added to the initial adapter."""
    aligned, stack = tiny.stage(stirred=True)
    stack.trained().save(tmp_path / "aligned")
    result, _ = run_stage(Panacea(rho=0.4), tmp_path / "run", start=tmp_path / "aligned", lr=0.0)
    gap = [result[name] - value.detach() for name, value in aligned.trainable.items()]
    assert length(gap).item() == pytest.approx(0.4, rel=1e-4)


def test_the_aligned_adapter_itself_is_trained_for_any_protocol(tmp_path: Path) -> None:
    """The protocol has two adapters, and Panacea needs one; at a learning rate near 0 it only adds its shift."""
    protocol = make_world(tmp_path / "world", {"topology": "double", "finetune": {"settings": {"lr": 1e-30}}})
    experiment = Experiment.settle(
        RunSpec(protocol=str(protocol), defense=parse_plugins("panacea=0.4"), attack=parse_plugins("ratio=0.1"))
    )
    assert experiment.stages["finetune"].topology == "single"
    context = run_context(tmp_path / "store")
    aligned = align(experiment, context)
    tuned = finetune(experiment, context, aligned)
    (old,), (new,) = aligned.spec.adapters, tuned.spec.adapters
    assert new == tuned.artifacts["finetune"].path / ADAPTER
    initial, final = Adapter.load(old), Adapter.load(new)
    assert final.rank == initial.rank
    assert final.scale == initial.scale
    gap = [
        n - o for module in initial.factors for o, n in zip(initial.factors[module], final.factors[module], strict=True)
    ]
    assert length(gap).item() == pytest.approx(0.4, rel=1e-4)
    sft = Experiment.settle(RunSpec(protocol=str(protocol), attack=parse_plugins("ratio=0.1")))
    assert len(finetune(sft, context, align(sft, context)).spec.adapters) == 2
