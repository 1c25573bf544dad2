"""EWC compared with its equations in plain PyTorch, and the side effects of its pass over the alignment rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import Encoded
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
    """Compute F: the sum of squares over batches of 5 (batch), or the mean of squares over rows (sample)."""
    size = 5 if kind == "batch" else 1
    squares = []
    for start in range(0, len(rows), size):
        squares.append([g**2 for g in slopes(values, tiny.collated(rows[start : start + size]))])
    totals = [torch.stack(parts).sum(0) for parts in zip(*squares, strict=True)]
    return totals if kind == "batch" else [total / len(rows) for total in totals]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of an alignment adapter with nonzero weights."""
    folder = tmp_path_factory.mktemp("aligned") / "adapter"
    _, stack = tiny.stage(stirred=True)
    stack.trained().save(folder)
    return folder


def user_stage(aligned: Path, settings: TrainSettings | None = None, pools: Pools | None = None) -> TrainingStage:
    """Return the user stage in single topology."""
    stage, _ = tiny.stage(trained_with=settings, start=aligned, name="finetune", pools=pools or tiny.example_pools())
    return stage


def train_stage(
    defense: Defense, aligned: Path, folder: Path, settings: TrainSettings, rows: int = 12
) -> tuple[TrainingStage, list[dict[str, float]]]:
    stage = user_stage(aligned, settings)
    log = train(stage, defense, tiny.rows(rows), settings, folder, pad=tiny.PAD)
    return stage, log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("kind", "lam"), [("batch", 300.0), ("sample", 5000.0)])
def test_three_steps_equal_plain_pytorch(
    kind: str, lam: float, accumulation: int, aligned: Path, tmp_path: Path
) -> None:
    """Under accumulation a step uses the mean gradient of the micro-batches and adds the pull once."""
    settings = tiny.settings(
        epochs=1, batch=4, accumulation=accumulation, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3
    )
    count = 12 * accumulation
    stage, log = train_stage(EWC(lam=lam, fisher=kind), aligned, tmp_path / "ewc", settings, count)

    twin = user_stage(aligned)
    values, rows = leaves(twin), tiny.rows(count)
    parameters, initial = list(values.values()), [value.detach().clone() for value in values.values()]
    f = fisher(values, tiny.encode(twin.pools.alignment), kind)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    order = batch_order(count, settings, twin.seed)
    pulls = []
    for step in range(3):
        micro = [
            tiny.collated([rows[n] for n in numbers])
            for numbers in order[step * accumulation : (step + 1) * accumulation]
        ]
        task = torch.stack([cross_entropy(values, batch) for batch in micro]).mean()
        penalty = sum(((fi * (w - w0) ** 2).sum() for fi, w, w0 in zip(f, parameters, initial, strict=True)))
        optimizer.zero_grad()
        (task + lam * penalty).backward()
        pulls.append((lam * penalty / task).item())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert log[step]["loss"] == pytest.approx((task + lam * penalty).item(), rel=1e-4)
        assert log[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(log) == 3
    assert pulls[0] == 0
    assert min(pulls[1:]) > 0.003  # the penalty is large enough to test
    assert close(list(stage.trainable.values()), parameters)
    sft, _ = train_stage(SFT(), aligned, tmp_path / "sft", settings, count)
    assert not close(list(sft.trainable.values()), parameters, 1e-3)


@pytest.mark.parametrize("kind", ["batch", "sample"])
def test_gradient_at_other_parameters_equals_plain_autograd(kind: str, aligned: Path) -> None:
    stage = user_stage(aligned)
    defense = EWC(lam=2.0, fisher=kind)
    values = leaves(stage)
    f, initial = fisher(values, tiny.encode(stage.pools.alignment), kind), [v.detach().clone() for v in values.values()]
    defense.before(stage)
    tiny.stir(stage.trainable, seed=8)
    values = leaves(stage)
    penalty = sum((fi * (w - w0) ** 2).sum() for fi, w, w0 in zip(f, values.values(), initial, strict=True))
    loss = cross_entropy(values, tiny.batch()) + 2.0 * penalty
    gradient = defense.gradient(stage, tiny.batch())
    expected = list(torch.autograd.grad(loss, list(values.values())))
    assert close(gradient.values, expected)
    assert not close(stage.gradient(tiny.batch()).values, expected, 1e-2)
    assert gradient.loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_scalar_losses_converge_to_the_closed_form() -> None:
    """L = h/2 (w - u)^2 for the user, a/2 (w - v)^2 for alignment: w* = (h u + 2 lam F w0) / (h + 2 lam F)."""
    h, u, a, v, w0, lam = 3.0, 5.0, 2.0, 0.25, 1.0, 0.5
    w = torch.nn.Parameter(torch.tensor([w0]))
    stage = TrainingStage("finetune", SimpleNamespace(), {"w": w}, 0, pools=Pools(alignment=[Example("safe", "")]))
    stage.loss = lambda batch: (batch["weight"] / 2 * (w - batch["center"]) ** 2).sum()
    stage.batches = lambda examples, size: iter([{"weight": a, "center": v}])
    defense = EWC(lam=lam)
    defense.before(stage)
    for _ in range(200):
        gradient = defense.gradient(stage, {"weight": h, "center": u})
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
    """Seven rows have gradients 1..7, a batch their mean: batches of 5 give 3^2 + 6.5^2, rows give 140 / 7."""
    examples = [Example(f"safe:{number}", "ab", chr(ord("a") + number)) for number in range(7)]
    first = tiny.encode(examples[:1])[0].ids[-1]
    for kind, expected in {"batch": 3.0**2 + 6.5**2, "sample": 20.0}.items():
        stage = user_stage(aligned, pools=Pools(alignment=examples))

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
    stage = user_stage(aligned, pools=Pools(alignment=examples))
    first, second = (slopes(leaves(stage), tiny.collated([row])) for row in tiny.encode(examples))
    pairs = list(zip(first, second, strict=True))
    squares = {"batch": [((a + b) / 2) ** 2 for a, b in pairs], "sample": [(a**2 + b**2) / 2 for a, b in pairs]}
    for kind, expected in squares.items():
        defense = EWC(fisher=kind)
        defense.before(stage)
        assert close(diagonals(defense), expected), kind


def test_fisher_of_samples_is_a_mean_over_the_encoded_rows(aligned: Path) -> None:
    """A row that `encode` skips has no gradient and does not count."""
    stage = user_stage(aligned)
    rows = list(stage.pools.alignment)[::2]
    stage.encode = lambda examples: tiny.encode([example for example in examples if example in rows])
    expected = fisher(leaves(stage), tiny.encode(rows), "sample")
    defense = EWC(fisher="sample")
    defense.before(stage)
    assert close(diagonals(defense), expected)


def test_a_fresh_adapter_has_no_fisher_on_any_a() -> None:
    """With B = 0 the loss does not depend on A, so double topology has no penalty on A."""
    stage, _ = tiny.stage(name="finetune", pools=tiny.example_pools())
    defense = EWC()
    defense.before(stage)
    for name, value in zip(stage.trainable, diagonals(defense), strict=True):
        assert bool(value.any()) == (".lora_B." in name), name


def test_the_topology_is_single_for_any_protocol() -> None:
    assert Experiment.settle(RunSpec(defense=parse_plugins("sft"))).stages["finetune"].topology == "double"
    assert Experiment.settle(RunSpec(defense=parse_plugins("ewc"))).stages["finetune"].topology == "single"


def test_the_pass_leaves_no_gradient_and_changes_no_parameter(aligned: Path) -> None:
    stage = user_stage(aligned)
    initial = stage.values()
    EWC().before(stage)
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    assert same(stage.values(), initial)


def test_the_first_step_equals_sft_bit_for_bit(aligned: Path, tmp_path: Path) -> None:
    """At w0 the pull is 0, so any difference to SFT is a leaked gradient of the Fisher pass."""
    settings = tiny.settings(epochs=1, warmup=0.0, lora_dropout=0.3)
    plain, _ = train_stage(SFT(), aligned, tmp_path / "sft", settings, rows=4)
    ewc, log = train_stage(EWC(lam=1e9), aligned, tmp_path / "ewc", settings, rows=4)
    assert len(log) == 1
    assert same(ewc.values(), plain.values())
    assert not same(plain.values(), user_stage(aligned).values())


def test_fisher_and_start_are_computed_without_dropout_and_stay_constant(aligned: Path, tmp_path: Path) -> None:
    twin = user_stage(aligned)
    expected = fisher(leaves(twin), tiny.encode(twin.pools.alignment), "batch")
    defense = EWC(lam=1.0)
    stage, _ = train_stage(defense, aligned, tmp_path, tiny.settings(lora_dropout=0.5))
    assert close(diagonals(defense), expected)
    assert same([defense.state()[f"start/{n}"] for n in range(len(expected))], twin.values())
    assert not same(stage.values(), twin.values())


def test_lam_0_equals_sft_of_the_same_topology_bit_for_bit(aligned: Path, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    plain, plain_log = train_stage(SFT(), aligned, tmp_path / "sft", settings)
    neutral, neutral_log = train_stage(EWC(lam=0), aligned, tmp_path / "free", settings)
    ewc, _ = train_stage(EWC(lam=1e3), aligned, tmp_path / "held", settings)
    assert same(neutral.values(), plain.values())
    assert neutral_log == plain_log
    assert not same(ewc.values(), plain.values())


def test_a_larger_lam_keeps_the_adapter_closer_to_its_start(aligned: Path, tmp_path: Path) -> None:
    settings, distances = tiny.settings(epochs=6, weight_decay=0.0), []
    start, f = user_stage(aligned).values(), None
    for lam in (0.0, 1e3, 1e6):
        defense = EWC(lam=lam)
        stage, _ = train_stage(defense, aligned, tmp_path / str(lam), settings)
        f = f or diagonals(defense)
        penalties = [(fi * (w - w0) ** 2).sum() for fi, w, w0 in zip(f, stage.values(), start, strict=True)]
        distances.append(torch.stack(penalties).sum().item())
    assert distances[0] > 2 * distances[1] > 4 * distances[2]


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Interrupted(EWC):
    """An EWC that stops at step 5."""

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == 5:
            raise KeyboardInterrupt


class Resumed(EWC):
    """An EWC that refuses a second Fisher pass."""

    def before(self, stage: TrainingStage) -> None:
        raise AssertionError("a resumed stage must not repeat the Fisher pass")


def test_an_interrupted_stage_gives_the_same_result(aligned: Path, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=3)
    complete, log = train_stage(EWC(lam=1e3), aligned, tmp_path / "complete", settings)
    with pytest.raises(KeyboardInterrupt):
        train_stage(Interrupted(lam=1e3), aligned, tmp_path / "cut", settings)
    resumed, resumed_log = train_stage(Resumed(lam=1e3), aligned, tmp_path / "cut", settings)
    assert same(resumed.values(), complete.values())
    assert resumed_log == log


def test_state_is_restored_from_a_file(aligned: Path, tmp_path: Path) -> None:
    stage = user_stage(aligned)
    defense, restored = EWC(lam=10.0), EWC(lam=10.0)
    defense.before(stage)
    save_file(defense.state(), tmp_path / "state")
    restored.restore(load_file(tmp_path / "state"))
    tiny.stir(stage.trainable, seed=8)
    gradient, expected = (member.gradient(stage, tiny.batch()) for member in (restored, defense))
    assert same(list(gradient.values), list(expected.values))
    assert restored.state().keys() == defense.state().keys()
    assert len(defense.state()) == 2 * len(stage.trainable)
