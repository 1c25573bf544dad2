"""The `batch` hook in a team and in the trainer, and the losses of batches with weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training import stage as stage_module
from harmbench_vaccine.training.stage import Batch, TrainingStage, row_means, weighted
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import peft_computation
from support.compare import close, same

LENGTHS = (9, 5, 7)


class Doubler(Defense):
    """Doubles the weight of every row."""

    name: ClassVar[str] = "doubler"

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        return weighted(batch, torch.full((len(batch["labels"]),), 2.0, device=batch["labels"].device))


class Shortener(Defense):
    """Removes the last row."""

    name: ClassVar[str] = "shortener"

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        return {name: values[:-1] for name, values in batch.items()}


class Distributed(Doubler):
    """A doubler that supports ranks."""

    name: ClassVar[str] = "distributed"
    ranks: ClassVar[bool] = True


def stirred_stage(**changes: Any) -> TrainingStage:
    stage, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True)
    stage.step = stage.steps = 1
    return stage


# ---------------------------------------------------------------------------------------------------------------------
# The hook


def test_only_a_batch_hook_that_supports_ranks_runs_on_several() -> None:
    assert not Doubler().supports_ranks
    assert Distributed().supports_ranks
    assert SFT().supports_ranks
    assert not Doubler().is_plain


@pytest.mark.parametrize("defense", [Vaccine(rho=3.0), None], ids=["vaccine", "plain"])
def test_the_batch_changes_before_the_gradient_of_any_member(defense: Vaccine | None) -> None:
    """The order of a defense that changes the batch and of one that replaces the gradient does not matter."""
    stage, batch = stirred_stage(), tiny.batch(LENGTHS)
    shorter = {name: values[:2] for name, values in batch.items()}
    expected = defense.gradient(stage, shorter) if defense else stage.gradient(shorter)
    others = (defense,) if defense else ()
    for members in ((Shortener(), *others), (*others, Shortener())):
        actual = DefenseTeam(members=members).gradient(stage, batch)
        assert same(actual.values, expected.values)  # type: ignore[arg-type]
        assert actual.loss == expected.loss


def test_batch_hooks_run_once_and_in_the_order_of_the_command_line() -> None:
    """Each member receives the batch of the member before it, and the gradient that of the last one."""

    def member(letter: str) -> Defense:
        class Appending(Defense):
            name: ClassVar[str] = letter

            def batch(self, stage: Any, batch: Any) -> Any:
                return batch + letter

        return Appending()

    stage = Mock(gradient=lambda batch: batch)
    assert DefenseTeam(members=(member("a"), member("b"))).gradient(stage, "") == "ab"  # type: ignore[arg-type]
    assert DefenseTeam(members=(member("b"), member("a"))).gradient(stage, "") == "ba"  # type: ignore[arg-type]


def test_every_micro_batch_of_the_trainer_passes_the_hook(tmp_path: Path) -> None:
    """Doubled losses have doubled gradients; the log has the norm before clipping."""
    logs: list[list[dict[str, float]]] = []
    for defense in (SFT(), Doubler()):
        stage = stirred_stage(epochs=1, accumulation=2, lora_dropout=0.1)
        team = DefenseTeam(members=(defense,))
        logs.append(train(stage, team, tiny.rows(8), stage.settings, tmp_path / str(len(logs)), pad=tiny.PAD))
    (plain,), (doubled,) = logs
    for key in ("loss", "grad_norm"):
        assert doubled[key] == pytest.approx(2 * plain[key], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Weighted losses


@pytest.fixture(params=["packed", "padded"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run batches packed or padded."""
    if request.param == "padded":
        monkeypatch.setattr(stage_module, "FEWEST_PADS", 2.0)


def weights_of_rows(batch: Batch) -> Tensor:
    return torch.tensor([0.5, 0.0, 3.0], device=batch["labels"].device)


def weights_of_labels(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch["labels"].shape, generator=generator, dtype=torch.float64).to(batch["labels"].device)


def expected_loss(stage: TrainingStage, batch: Batch, weights: Tensor) -> Tensor:
    """Return the sum of weight times -log p over the response tokens, divided by their number, token by token."""
    with peft_computation():
        output = stage.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    log_p, labels = output.logits.log_softmax(-1), batch["labels"].tolist()
    places = [(r, t) for r, row in enumerate(labels) for t, label in enumerate(row) if label != IGNORED]
    weight = weights if weights.dim() == 2 else weights[:, None].expand(batch["labels"].shape)
    return -torch.stack([weight[r, t].float() * log_p[r, t - 1, labels[r][t]] for r, t in places]).sum() / len(places)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("weights", [weights_of_rows, weights_of_labels], ids=["rows", "labels"])
def test_a_weighted_loss_equals_its_sum_token_by_token(weights: Callable[[Batch], Tensor]) -> None:
    """The divisor is the number of response tokens, not the sum of the weights."""
    stage, batch = stirred_stage(), tiny.batch(LENGTHS)
    batch["labels"][0, 4] = IGNORED  # labels may be missing inside a response
    changed = weighted(batch, weights(batch))
    expected = expected_loss(stage, batch, weights(batch))
    gradient = stage.gradient(changed)
    assert gradient.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert close(gradient.values, torch.autograd.grad(expected, list(stage.trainable.values())))
    assert not close(gradient.values, stage.gradient(batch).values, 1e-2)
    assert changed["weights"].dtype == torch.float32
    assert "weights" not in batch


@pytest.mark.usefixtures("packing")
def test_weights_of_1_give_the_same_bits_as_no_weights() -> None:
    stage, batch = stirred_stage(), tiny.batch(LENGTHS)
    ones = stage.gradient(weighted(batch, torch.ones(3, device=stage.device)))
    plain = stage.gradient(batch)
    assert ones.loss == plain.loss
    assert same(ones.values, plain.values)  # type: ignore[arg-type]


def test_row_means_are_means_over_the_response_tokens_of_each_row() -> None:
    batch = tiny.batch(LENGTHS)
    batch["labels"][1] = IGNORED
    values = torch.arange(1.0, 13.0, device=batch["labels"].device)  # 7 and 5 response tokens
    assert row_means(values, batch).tolist() == [4.0, 0.0, 10.0]
    batch["labels"][:, 0] = 5  # no position scores the first token of a row
    assert row_means(values, batch).tolist() == [4.0, 0.0, 10.0]
