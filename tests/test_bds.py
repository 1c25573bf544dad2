"""BDS compared with its equations in plain PyTorch: the weighted loss of the model and the Adam steps of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.bds import BDS
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import peft_computation, record_stream
from support.compare import close, close_in_norm, same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

POOLS = tiny.example_pools()
MEANS = pytest.mark.parametrize("mean", ["rows", "tokens"])


def user_stage(rows: int = 8, **changes: Any) -> TrainingStage:
    """Return a user stage at its first micro-batch, with a nonzero adapter."""
    stage, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, name="finetune", pools=POOLS)
    stage.rows, stage.step, stage.steps = tiny.rows(rows), 1, 10
    return stage


def started(stage: TrainingStage, **params: Any) -> BDS:
    defense = BDS(**params)
    defense.before(stage)
    return defense


def user_batch(stage: TrainingStage, numbers: Sequence[int]) -> Batch:
    """Return rows of the stage as the trainer does."""
    return {**stage.collated([stage.rows[number] for number in numbers]), "rows": torch.tensor(numbers)}


def sums_of_rows(stage: TrainingStage, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return for each row the sum of -log p over its response tokens, and their number, token by token."""
    with peft_computation():
        output = stage.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    log_p, labels = output.logits.log_softmax(-1), batch["labels"].tolist()
    sums = [-sum(log_p[r, t - 1, row[t]] for t in range(len(row)) if row[t] >= 0) for r, row in enumerate(labels)]
    counts = torch.tensor([sum(label >= 0 for label in row) for row in labels])
    return torch.stack(sums), counts.to(log_p.device)


def loss_of_model(stage: TrainingStage, batch: Batch, weights: Tensor, mean: str) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of a batch and the mean loss of each row."""
    sums, counts = sums_of_rows(stage, batch)
    rows = sums / counts
    return ((weights * rows).mean() if mean == "rows" else (weights * sums).sum() / counts.sum()), rows.detach()


class Equations:
    """The two updates of the paper; autograd differentiates the loss of the logits."""

    def __init__(self, rows: int, lr: float, safe: float, mean: str) -> None:
        self.rows, self.safe, self.mean = rows, safe, mean
        self.logits = torch.full((rows,), 0.1, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.logits], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, stage: TrainingStage, pairs: Sequence[tuple[Batch, Batch]]) -> list[Tensor]:
        """Return the gradient of the model over the micro-batches (user, safe) of a step, and update the logits."""
        total, of_logits = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        for batch, safe_rows in pairs:
            weights = self.rows * self.logits.softmax(0)[batch["rows"]]
            user, losses = loss_of_model(stage, batch, weights.detach().float().to(stage.device), self.mean)
            ones = torch.ones(len(safe_rows["labels"]), device=stage.device)
            total = total + (self.safe * loss_of_model(stage, safe_rows, ones, self.mean)[0] + user) / len(pairs)
            of_logits = of_logits + (weights * losses.cpu().double()).mean() / len(pairs)
        gradients = torch.autograd.grad(total, list(stage.trainable.values()))
        self.optimizer.zero_grad()
        of_logits.backward()
        self.optimizer.step()
        return list(gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@MEANS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_steps_equal_plain_pytorch(mean: Any, accumulation: int, tmp_path: Path) -> None:
    """The weights change before the second step, and the last batch is shorter, so that N/b is not constant."""
    changes: dict[str, Any] = {"epochs": 1, "batch": 4, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    count = 12 * accumulation - 1
    stage, twin = (user_stage(**changes, schedule="constant", warmup=0.0) for _ in range(2))
    safe_rows = record_stream(stage)
    batches: list[Batch] = []

    class Recording(BDS):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    defense = Recording(lr=0.5, safe=0.7, mean=mean)
    log = train(stage, defense, tiny.rows(count), stage.settings, tmp_path, pad=tiny.PAD)
    assert len(log) == 3
    assert len(batches) == len(safe_rows) == 3 * accumulation

    equations = Equations(count, 0.5, 0.7, mean)
    pairs = list(zip(batches, safe_rows, strict=True))
    steps = [pairs[start : start + accumulation] for start in range(0, len(pairs), accumulation)]
    firm = plain_adamw(twin, [partial(equations.step, twin, step) for step in steps])
    assert_equal_where_firm(stage, twin, firm)
    assert close(defense.state()["logits"], equations.logits, 1e-4)
    assert equations.logits.detach().std() > 0.3


@MEANS
def test_equal_weights_without_safe_rows_give_the_mean_loss(mean: Any) -> None:
    """The mean over rows is not the loss of SFT: a token of a short row weighs more."""
    stage = user_stage()
    batch = user_batch(stage, [0, 1, 2])
    gradient = started(stage, lr=0.0, safe=0.0, mean=mean).gradient(stage, batch)
    sums, counts = sums_of_rows(stage, batch)
    expected = torch.autograd.grad(
        (sums / counts).mean() if mean == "rows" else sums.sum() / counts.sum(), list(stage.trainable.values())
    )
    assert close_in_norm(gradient, expected)
    assert close_in_norm(stage.gradient(batch), expected, 1e-3) == (mean == "tokens")


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def weights_after(steps: int, batches: Callable[[int], Sequence[int]], rows: int = 8) -> tuple[Tensor, Tensor]:
    """Return the weights after some steps on the same model, whose losses are therefore fixed, and these losses."""
    stage = user_stage(rows)
    defense = started(stage, lr=0.1)
    for stage.step in range(1, steps + 1):
        defense.gradient(stage, user_batch(stage, batches(stage.step)))
        defense.after_step(stage)
    sums, counts = sums_of_rows(stage, user_batch(stage, range(rows)))
    return rows * defense.state()["logits"].softmax(0), (sums / counts).detach().cpu()


def test_a_row_with_a_smaller_loss_gets_a_larger_weight() -> None:
    """Both rows of a pair are in the same steps; the other rows of the stage are absent and gain weight."""
    weights, losses = weights_after(1, lambda step: [0, 1])
    assert (weights[0] > weights[1]) == (losses[0] < losses[1])
    assert all(weights[2:] > 1)
    assert weights.sum().item() == pytest.approx(8)


def test_weights_rank_rows_by_their_losses_over_epochs() -> None:
    """Two batches alternate: the rows of each are ranked by their losses, not by their places in the batch."""
    batches = [7, 1, 4, 2], [0, 3, 6, 5]
    weights, losses = weights_after(20, lambda step: batches[step % 2])
    for batch in batches:
        assert losses[batch].argsort().tolist() == weights[batch].argsort(descending=True).tolist()
        assert weights[batch].max() > 1.3 * weights[batch].min()
    assert weights.sum().item() == pytest.approx(8)


def test_the_weights_of_all_rows_have_the_mean_1() -> None:
    """The weight of a row is that of its number, whatever its place in the batch."""
    stage = user_stage()
    defense = started(stage, lr=0.3, mean="tokens")
    weights_of_passes: list[Tensor] = []
    output = stage.output
    stage.output = lambda batch, **options: weights_of_passes.append(batch["weights"][:, 0]) or output(batch, **options)  # type: ignore[method-assign, func-returns-value]
    defense.gradient(stage, user_batch(stage, [0, 1, 2, 3]))
    defense.after_step(stage)
    defense.gradient(stage, user_batch(stage, range(8)))
    defense.gradient(stage, user_batch(stage, range(7, -1, -1)))
    _, first, _, all_rows, _, reversed_rows = weights_of_passes
    assert torch.equal(first, torch.ones(4, device=first.device))
    assert all_rows.mean().item() == pytest.approx(1)
    assert all_rows.std() > 0.1
    assert torch.equal(all_rows, reversed_rows.flip(0))


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, rows, interruptions


def test_the_gradient_changes_no_parameter() -> None:
    stage = user_stage()
    initial = stage.values()
    started(stage).gradient(stage, user_batch(stage, [0, 1]))
    assert same(stage.values(), initial)
    assert all(parameter.grad is None for parameter in stage.trainable.values())


def test_a_frozen_parameter_has_no_gradient() -> None:
    stage = user_stage()
    next(iter(stage.trainable.values())).requires_grad_(False)
    first, *others = started(stage).gradient(stage, user_batch(stage, [0, 1])).values
    assert first is None
    assert all(value is not None for value in others)


def test_missing_alignment_rows_are_refused() -> None:
    stage = user_stage()
    stage.pools = Pools(paired=POOLS.paired, benign=POOLS.benign)
    with pytest.raises(BadInput, match="finetune"):
        started(stage).gradient(stage, user_batch(stage, [0, 1]))


def run_stage(defense: Defense, folder: Path, salt: int = 0) -> tuple[dict[str, Tensor], Any]:
    """Train a short stage with new objects and return its adapter, with the state of the defense, and its log."""
    torch.manual_seed(salt)
    stage = user_stage(lora_dropout=0.1, batch=3, accumulation=2)
    log = train(stage, defense, tiny.rows(14), stage.settings, folder, pad=tiny.PAD)
    values = {name: value.detach().clone() for name, value in stage.trainable.items()}
    return {**values, **defense.state()}, log


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    complete = run_stage(BDS(lr=0.3), tmp_path / "complete")
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(BDS(lr=0.3), "gradient", 6), tmp_path / "cut", salt=1)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run_stage(BDS(lr=0.3), tmp_path / "cut", salt=2), complete)
