"""EWC against its equations in plain PyTorch, and what its pass over the alignment rows leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import Encoded, collate
from harmbench_vaccine.defenses.ewc import EWC
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Defense, Pools, TrainSettings
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.compare import close, same
from support.plain_math import Values, cross_entropy, leaves


def slopes(values: Values, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(cross_entropy(values, batch), list(values.values())))


def fisher(values: Values, rows: Sequence[Encoded], kind: str) -> list[Tensor]:
    """batch: sum over batches of 5 of squares; sample: mean over rows of squares."""
    size = 5 if kind == "batch" else 1
    squares = []
    for start in range(0, len(rows), size):
        squares.append([g**2 for g in slopes(values, collate(rows[start : start + size], tiny.PAD))])
    totals = [torch.stack(parts).sum(0) for parts in zip(*squares, strict=True)]
    return totals if kind == "batch" else [total / len(rows) for total in totals]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An alignment adapter on disk, with weights everywhere."""
    folder = tmp_path_factory.mktemp("aligned") / "adapter"
    _, stack = tiny.stage(stirred=True)
    stack.trained().save(folder)
    return folder


def staged(aligned: Path, settings: TrainSettings | None = None, pools: Pools | None = None) -> TrainingStage:
    """The user stage in single topology."""
    stage, _ = tiny.stage(trained_with=settings, start=aligned, name="finetune", pools=pools or tiny.example_pools())
    return stage


def trained(
    defense: Defense, aligned: Path, folder: Path, settings: TrainSettings, rows: int = 12
) -> tuple[TrainingStage, list[dict[str, float]]]:
    stage = staged(aligned, settings)
    log = train(stage, defense, tiny.rows(rows), settings, folder, pad=tiny.PAD)
    return stage, log


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("kind", "lam"), [("batch", 300.0), ("sample", 5000.0)])
def test_three_steps_equal_plain_pytorch(
    kind: str, lam: float, accumulation: int, aligned: Path, tmp_path: Path
) -> None:
    """Under accumulation a step takes the mean of the micro-batches' gradients and the pull once."""
    settings = tiny.settings(
        epochs=1, batch=4, accumulation=accumulation, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3
    )
    count = 12 * accumulation
    stage, log = trained(EWC(lam=lam, fisher=kind), aligned, tmp_path / "ewc", settings, count)

    twin = staged(aligned)
    values, rows = leaves(twin), tiny.rows(count)
    parameters, begun = list(values.values()), [value.detach().clone() for value in values.values()]
    f = fisher(values, tiny.encode(twin.pools.alignment), kind)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    order = batch_order(count, settings, twin.seed)
    pulls = []
    for step in range(3):
        micro = [collate([rows[n] for n in numbers], tiny.PAD) for numbers in
                 order[step * accumulation : (step + 1) * accumulation]]  # fmt: skip
        task = torch.stack([cross_entropy(values, batch) for batch in micro]).mean()
        penalty = sum(((fi * (w - w0) ** 2).sum() for fi, w, w0 in zip(f, parameters, begun, strict=True)))
        optimizer.zero_grad()
        (task + lam * penalty).backward()
        pulls.append((lam * penalty / task).item())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert log[step]["loss"] == pytest.approx((task + lam * penalty).item(), rel=1e-4)
        assert log[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(log) == 3
    assert pulls[0] == 0
    assert min(pulls[1:]) > 0.003  # the penalty matters here
    assert close(list(stage.trainable.values()), parameters)
    free, _ = trained(SFT(), aligned, tmp_path / "sft", settings, count)
    assert not close(list(free.trainable.values()), parameters, 1e-3)


@pytest.mark.parametrize("kind", ["batch", "sample"])
def test_gradient_away_from_the_start_equals_plain_autograd(kind: str, aligned: Path) -> None:
    stage = staged(aligned)
    defense = EWC(lam=2.0, fisher=kind)
    values = leaves(stage)
    f, begun = fisher(values, tiny.encode(stage.pools.alignment), kind), [v.detach().clone() for v in values.values()]
    defense.before(stage)
    tiny.stir(stage.trainable, seed=8)
    values = leaves(stage)
    penalty = sum((fi * (w - w0) ** 2).sum() for fi, w, w0 in zip(f, values.values(), begun, strict=True))
    loss = cross_entropy(values, tiny.batch()) + 2.0 * penalty
    found = defense.gradient(stage, tiny.batch())
    expected = list(torch.autograd.grad(loss, list(values.values())))
    assert close(found.values, expected)
    assert not close(stage.gradient(tiny.batch()).values, expected, 1e-2)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_scalar_losses_meet_where_the_two_pulls_balance() -> None:
    """L = h/2 (w - u)^2 for the user, a/2 (w - v)^2 for alignment: w* = (h u + 2 lam F w0) / (h + 2 lam F)."""
    h, u, a, v, w0, lam = 3.0, 5.0, 2.0, 0.25, 1.0, 0.5
    w = torch.nn.Parameter(torch.tensor([w0]))
    stage = TrainingStage("finetune", SimpleNamespace(), {"w": w}, 0, pools=Pools(alignment=[Example("safe", "")]))
    stage.loss = lambda batch: (batch["weight"] / 2 * (w - batch["centre"]) ** 2).sum()
    stage.batches = lambda examples, size: iter([{"weight": a, "centre": v}])
    defense = EWC(lam=lam)
    defense.before(stage)
    for _ in range(200):
        gradient = defense.gradient(stage, {"weight": h, "centre": u})
        with torch.no_grad():
            w -= 0.1 * gradient.values[0]
    f = (a * (w0 - v)) ** 2
    assert w.item() == pytest.approx((h * u + 2 * lam * f * w0) / (h + 2 * lam * f), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The Fisher diagonal


def diagonals(defense: EWC) -> list[Tensor]:
    state = defense.state()
    return [state[f"fisher/{number}"] for number in range(len(state) // 2)]


def test_fisher_of_rows_with_known_gradients(aligned: Path) -> None:
    """Seven rows of gradients 1..7, a batch's gradient their mean: batches of 5 give 3^2 + 6.5^2, rows give 140 / 7."""
    examples = [Example(f"safe:{number}", "ab", chr(ord("a") + number)) for number in range(7)]
    first = tiny.encode(examples[:1])[0].ids[-1]
    for kind, expected in {"batch": 3.0**2 + 6.5**2, "sample": 20.0}.items():
        stage = staged(aligned, pools=Pools(alignment=examples))

        def known(batch: Batch, stage: TrainingStage = stage) -> Gradient:
            size = (batch["input_ids"][:, -1] - first + 1).float().mean()
            return Gradient(size, [size * torch.ones_like(value) for value in stage.trainable.values()])

        stage.gradient = known
        defense = EWC(fisher=kind)
        defense.before(stage)
        for value in diagonals(defense):
            torch.testing.assert_close(value, torch.full_like(value, expected))


def test_two_rows_of_one_length_are_averaged_before_or_after_the_square(aligned: Path) -> None:
    examples = [Example("one", "abc", "hello"), Example("two", "xyz", "world")]
    stage = staged(aligned, pools=Pools(alignment=examples))
    one, two = (slopes(leaves(stage), collate([row], tiny.PAD)) for row in tiny.encode(examples))
    pairs = list(zip(one, two, strict=True))
    for kind, expected in {"batch": [((a + b) / 2) ** 2 for a, b in pairs],
                           "sample": [(a**2 + b**2) / 2 for a, b in pairs]}.items():  # fmt: skip
        defense = EWC(fisher=kind)
        defense.before(stage)
        assert close(diagonals(defense), expected), kind


def test_fisher_of_samples_is_a_mean_over_the_rows_that_have_room(aligned: Path) -> None:
    """A row that `encode` leaves out has no gradient and counts nowhere."""
    stage = staged(aligned)
    kept = list(stage.pools.alignment)[::2]
    stage.encode = lambda examples: tiny.encode([example for example in examples if example in kept])
    expected = fisher(leaves(stage), tiny.encode(kept), "sample")
    defense = EWC(fisher="sample")
    defense.before(stage)
    assert close(diagonals(defense), expected)


def test_a_fresh_adapter_has_no_fisher_on_any_a() -> None:
    """With B = 0 the loss does not depend on A: in double topology A would be free."""
    stage, _ = tiny.stage(name="finetune", pools=tiny.example_pools())
    defense = EWC()
    defense.before(stage)
    for name, value in zip(stage.trainable, diagonals(defense), strict=True):
        assert bool(value.any()) == (".lora_B." in name), name


def test_the_topology_is_the_single_one_whatever_the_protocol_says() -> None:
    assert Experiment.settle(RunSpec(defense=parse_plugins("sft"))).topology == "double"
    assert Experiment.settle(RunSpec(defense=parse_plugins("ewc"))).topology == "single"


def test_the_pass_leaves_no_gradient_and_moves_nothing(aligned: Path) -> None:
    stage = staged(aligned)
    before = stage.values()
    EWC().before(stage)
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    assert same(stage.values(), before)


def test_the_first_step_is_that_of_sft_bit_for_bit(aligned: Path, tmp_path: Path) -> None:
    """At w0 the pull is 0, so whatever the first step has besides the user's gradient leaked out of the pass."""
    settings = tiny.settings(epochs=1, warmup=0.0, lora_dropout=0.3)
    plain, _ = trained(SFT(), aligned, tmp_path / "sft", settings, rows=4)
    held, log = trained(EWC(lam=1e9), aligned, tmp_path / "ewc", settings, rows=4)
    assert len(log) == 1
    assert same(held.values(), plain.values())
    assert not same(plain.values(), staged(aligned).values())


def test_fisher_and_start_stay_as_they_were_taken_without_dropout(aligned: Path, tmp_path: Path) -> None:
    twin = staged(aligned)
    expected = fisher(leaves(twin), tiny.encode(twin.pools.alignment), "batch")
    defense = EWC(lam=1.0)
    stage, _ = trained(defense, aligned, tmp_path, tiny.settings(lora_dropout=0.5))
    assert close(diagonals(defense), expected)
    assert same([defense.state()[f"start/{n}"] for n in range(len(expected))], twin.values())
    assert not same(stage.values(), twin.values())


def test_no_weight_is_sft_of_the_same_topology_bit_for_bit(aligned: Path, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    plain, plain_log = trained(SFT(), aligned, tmp_path / "sft", settings)
    free, free_log = trained(EWC(lam=0), aligned, tmp_path / "free", settings)
    held, _ = trained(EWC(lam=1e3), aligned, tmp_path / "held", settings)
    assert same(free.values(), plain.values())
    assert free_log == plain_log
    assert not same(held.values(), plain.values())


def test_a_larger_weight_keeps_the_adapter_nearer_to_its_start(aligned: Path, tmp_path: Path) -> None:
    settings, far = tiny.settings(epochs=6, weight_decay=0.0), []
    start, f = staged(aligned).values(), None
    for lam in (0.0, 1e3, 1e6):
        defense = EWC(lam=lam)
        stage, _ = trained(defense, aligned, tmp_path / str(lam), settings)
        f = f or diagonals(defense)
        moved = [(fi * (w - w0) ** 2).sum() for fi, w, w0 in zip(f, stage.values(), start, strict=True)]
        far.append(torch.stack(moved).sum().item())
    assert far[0] > 2 * far[1] > 4 * far[2]


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Interrupted(EWC):
    """Stops when a step is reached."""

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == 5:
            raise KeyboardInterrupt


class Resumed(EWC):
    """Must not look at the data a second time."""

    def before(self, stage: TrainingStage) -> None:
        raise AssertionError("the start is gone by now")


def test_an_interrupted_stage_ends_bit_equal(aligned: Path, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=3)
    whole, log = trained(EWC(lam=1e3), aligned, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        trained(Interrupted(lam=1e3), aligned, tmp_path / "cut", settings)
    again, log_again = trained(Resumed(lam=1e3), aligned, tmp_path / "cut", settings)
    assert same(again.values(), whole.values())
    assert log_again == log


def test_state_comes_back_from_a_file(aligned: Path, tmp_path: Path) -> None:
    stage = staged(aligned)
    defense, other = EWC(lam=10.0), EWC(lam=10.0)
    defense.before(stage)
    save_file(defense.state(), tmp_path / "state")
    other.restore(load_file(tmp_path / "state"))
    tiny.stir(stage.trainable, seed=8)
    found, expected = (each.gradient(stage, tiny.batch()) for each in (other, defense))
    assert same(list(found.values), list(expected.values))
    assert other.state().keys() == defense.state().keys()
    assert len(defense.state()) == 2 * len(stage.trainable)
