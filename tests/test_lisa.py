"""Lisa against its equation in plain PyTorch: which state a step belongs to, where the state began, and the pull."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import collate
from harmbench_vaccine.defenses.lisa import Lisa
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Defense, Pools, TrainSettings
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.compare import close, same
from support.plain_math import cross_entropy, leaves


def staged(settings: TrainSettings | None = None, pools: Pools | None = None) -> TrainingStage:
    return tiny.stage(trained_with=settings, stirred=True, name="finetune", pools=pools or tiny.example_pools())[0]


def trained(
    defense: Defense, folder: Path, settings: TrainSettings, rows: int = 20
) -> tuple[list[Tensor], list[dict[str, float]]]:
    stage = staged(settings)
    log = train(stage, defense, tiny.rows(rows), settings, folder, pad=tiny.PAD)
    return stage.values(), log


class Watched(Lisa):
    """Notes what it is given and what it takes: for every micro-batch the step, the user's row numbers, the alignment
    batch; for every step where the parameters stand and where its state began."""

    _steps: list[tuple[list[Tensor], list[Tensor]]] = PrivateAttr(default_factory=list)
    _users: list[list[int]] = PrivateAttr(default_factory=list)
    _aligning: list[tuple[int, Batch]] = PrivateAttr(default_factory=list)

    def before_step(self, stage: TrainingStage) -> None:
        super().before_step(stage)
        self._steps.append((stage.values(), [value.clone() for value in self.state().values()]))

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self._users.append(batch["rows"].tolist())
        plain = type(stage).stream

        def stream(purpose: str, examples: Any) -> Batch:
            drawn = plain(stage, purpose, examples)
            self._aligning.append((stage.step, drawn))
            return drawn

        stage.stream = stream
        return super().gradient(stage, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Against the equation


@pytest.mark.parametrize(
    ("k1", "k2", "states"),
    [(1, 2, "AFF"), (2, 3, "AAF"), (2, 1, "AAFAAFAAF"), (1, 1, "AFAFAF"), (0, 5, "FFF")],
)
def test_steps_equal_plain_pytorch(k1: int, k2: int, states: str, tmp_path: Path) -> None:
    """The first gradient of the proximal term is that of the second step of a state; Adam's moments go on."""
    settings = tiny.settings(
        epochs=len(states) / 5, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3
    )
    defense = Watched(k1=k1, k2=k2, rho=30.0)
    found, log = trained(defense, tmp_path, settings)
    aligning = dict(defense._aligning)
    assert sorted(aligning) == [step for step, state in enumerate(states, 1) if state == "A"]

    twin, rows = staged(), tiny.rows(20)
    values = leaves(twin)
    parameters = list(values.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    order = batch_order(20, settings, twin.seed)
    begun, last, pulls = parameters, "", []
    for step, (state, numbers) in enumerate(zip(states, order, strict=True), 1):
        if state != last:
            begun, last = [value.detach().clone() for value in parameters], state
        batch = aligning[step] if state == "A" else collate([rows[n] for n in numbers], tiny.PAD)
        away = 30.0 / 2 * sum(((w - w_s) ** 2).sum() for w, w_s in zip(parameters, begun, strict=True))
        loss = cross_entropy(values, batch) + away
        pulls.append(away.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert log[step - 1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert close(found, parameters)
    pulled = "AA" in states or "FF" in states  # or every step begins a state, and there is nothing to pull back from
    assert (max(pulls) > 0.01) == pulled
    free, _ = trained(Lisa(k1=k1, k2=k2, rho=0), tmp_path / "free", settings)
    assert close(free, parameters, 1e-3) != pulled


def test_states_and_their_starts(tmp_path: Path) -> None:
    """k1 = 2, k2 = 3: AAFFFAAFFF, and a state's anchor is the parameters after 0, 2, 5, 7 steps."""
    assert "".join("A" if Lisa(k1=2, k2=3).aligning(step) else "F" for step in range(1, 11)) == "AAFFFAAFFF"
    defense = Watched(k1=2, k2=3)
    trained(defense, tmp_path, tiny.settings(epochs=2, batch=4))
    assert [step for step, _ in defense._aligning] == [1, 2, 6, 7]
    reached = [values for values, _ in defense._steps]
    begun = [next(n for n, values in enumerate(reached) if same(values, anchor)) for _, anchor in defense._steps]
    assert begun == [0, 0, 2, 2, 2, 5, 5, 7, 7, 7]


def test_micro_batches_of_a_step_share_its_state(tmp_path: Path) -> None:
    """Under accumulation the clock counts optimizer steps; every micro-batch has rows of its own."""
    defense = Watched(k1=1, k2=2)
    trained(defense, tmp_path, tiny.settings(epochs=2, batch=4, accumulation=2))
    assert [step for step, _ in defense._aligning] == [1, 1, 4, 4]
    assert len(defense._steps) == 5
    (_, one), (_, other), *_ = defense._aligning
    assert not {tuple(row) for row in one["input_ids"].tolist()} & {tuple(row) for row in other["input_ids"].tolist()}


@pytest.mark.parametrize(("steps", "free"), [(30, 3), (25, 2), (70, 7), (9, 0)])
def test_no_pull_in_the_first_tenth_of_the_steps(steps: int, free: int) -> None:
    """Until step floor(T / 10) there is none, from the next on it is rho (w - w_s)."""
    stage, defense = staged(), Lisa(k1=0, k2=10**6, rho=0.5)
    stage.steps, stage.step = steps, 1
    defense.before_step(stage)
    begun = stage.values()
    tiny.stir(stage.trainable, seed=8)
    plain = stage.gradient(tiny.batch())
    for stage.step in range(1, free + 3):
        if stage.step > 1:
            defense.before_step(stage)
        found = defense.gradient(stage, tiny.batch())
        if stage.step <= free:
            assert same(found.values, plain.values), stage.step
            assert found.loss == plain.loss
        else:
            away = [w - w_s for w, w_s in zip(stage.values(), begun, strict=True)]
            assert close(found.values, [g + 0.5 * each for g, each in zip(plain.values, away, strict=True)])
            expected = plain.loss + 0.25 * sum((each**2).sum() for each in away)
            assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_at_the_start_of_a_state_the_pull_is_0() -> None:
    stage, defense = staged(), Lisa(k1=0, rho=1e6)
    stage.steps, stage.step = 5, 1
    defense.before_step(stage)
    found, plain = defense.gradient(stage, tiny.batch()), stage.gradient(tiny.batch())
    assert same(found.values, plain.values)


# ---------------------------------------------------------------------------------------------------------------------
# Quadratic losses


def descended(
    defense: Lisa, steps: int, losses: dict[bool, tuple[float, float]], w: float
) -> tuple[float, list[float]]:
    """Gradient descent on f = a/2 (w - u)^2, with (a, u) for aligning and for the user; also w at every switch."""
    parameter = torch.nn.Parameter(torch.tensor([w], dtype=torch.float64))
    stage = TrainingStage("finetune", SimpleNamespace(), {"w": parameter}, 0, steps=1)
    stage.loss = lambda batch: (batch[0] / 2 * (parameter - batch[1]) ** 2).sum()
    stage.stream = lambda purpose, examples: losses[True]
    switches = []
    for stage.step in range(1, steps + 1):
        if stage.step > 1 and defense.aligning(stage.step) != defense.aligning(stage.step - 1):
            switches.append(parameter.item())
        defense.before_step(stage)
        gradient = defense.gradient(stage, losses[False])
        with torch.no_grad():
            parameter -= 0.1 * gradient.values[0]
    return parameter.item(), switches


def test_one_state_ends_between_its_loss_and_its_start() -> None:
    a, u, rho, start = 3.0, 5.0, 2.0, 1.0
    for defense in (Lisa(k1=0, k2=10**6, rho=rho), Lisa(k1=10**6, rho=rho)):
        end, _ = descended(defense, 200, {False: (a, u), True: (a, u)}, start)
        assert end == pytest.approx((a * u + rho * start) / (a + rho))


def test_two_states_settle_where_each_begins_at_the_others_end() -> None:
    (a, u), (b, v), rho = (3.0, 5.0), (1.0, -2.0), 2.0
    _, switches = descended(Lisa(k1=100, k2=100, rho=rho), 6001, {True: (a, u), False: (b, v)}, 0.0)
    # x = (a u + rho y) / (a + rho) ends aligning, y = (b v + rho x) / (b + rho) ends the user's state
    x = (a * u * (b + rho) + rho * b * v) / ((a + rho) * (b + rho) - rho**2)
    y = (b * v + rho * x) / (b + rho)
    assert switches[-2:] == pytest.approx([x, y])


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_the_users_batches_stay_those_of_sft(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=3, batch=4, accumulation=2)
    defense, plain = Watched(k1=2, k2=3), []

    class Plain(SFT):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            plain.append(batch["rows"].tolist())
            return stage.gradient(batch)

    trained(Plain(), tmp_path / "sft", settings)
    trained(defense, tmp_path / "lisa", settings)
    assert defense._users == plain
    assert len(plain) == 15


def test_alignment_steps_take_alignment_rows_and_pass_the_users_over(tmp_path: Path) -> None:
    """As many rows as the user's batch has, in every epoch of three steps each of the twelve once, freshly shuffled."""
    stage = staged(tiny.settings(batch=4))
    rows = [tuple(row.ids) for row in tiny.encode(stage.pools.alignment)]
    defense, epochs = Watched(k1=10, k2=1), []
    trained(defense, tmp_path, tiny.settings(epochs=2, batch=4))
    drawn = [
        [
            tuple(ids[: sum(mask)])
            for ids, mask in zip(b["input_ids"].tolist(), b["attention_mask"].tolist(), strict=True)
        ]
        for _, b in defense._aligning
    ]
    assert [len(each) for each in drawn] == [4] * 10
    for start in (0, 3, 6):
        epochs.append([row for each in drawn[start : start + 3] for row in each])
        assert sorted(epochs[-1]) == sorted(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    stage.step, stage.steps = 1, 5
    one, other = Lisa(), Lisa()
    for each in (one, other):
        each.before_step(stage)
    assert same(one.gradient(stage, tiny.batch()).values, other.gradient(stage, tiny.batch(seed=1)).values)


def test_without_alignment_rows_it_is_refused() -> None:
    stage = staged()
    stage.pools, stage.step, stage.steps = Pools(), 1, 5
    defense = Lisa()
    defense.before_step(stage)
    with pytest.raises(BadInput, match="finetune"):
        defense.gradient(stage, tiny.batch())


# ---------------------------------------------------------------------------------------------------------------------
# In the trainer


def test_no_alignment_and_no_pull_is_sft_bit_for_bit_with_dropout_on(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    sft, sft_log = trained(SFT(), tmp_path / "sft", settings)
    free, free_log = trained(Lisa(k1=0, rho=0), tmp_path / "free", settings)
    assert same(free, sft)
    assert free_log == sft_log
    for number, other in enumerate((Lisa(k1=0, rho=1), Lisa(k1=1, k2=2, rho=0))):
        assert not same(trained(other, tmp_path / str(number), settings)[0], sft)


class Interrupted(Lisa):
    """Stops when a step is reached."""

    stop: int = 0

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == self.stop:
            raise KeyboardInterrupt
        super().before_step(stage)


@pytest.mark.parametrize("stop", [5, 6, 9], ids=["within a state", "at a switch", "in the second round"])
def test_an_interrupted_stage_ends_bit_equal(stop: int, tmp_path: Path) -> None:
    settings, params = tiny.settings(lora_dropout=0.1), {"k1": 2, "k2": 3, "rho": 20.0}
    whole, log = trained(Lisa(**params), tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        trained(Interrupted(**params, stop=stop), tmp_path / "cut", settings)
    again, log_again = trained(Lisa(**params), tmp_path / "cut", settings)
    assert same(again, whole)
    assert log_again == log


def test_a_large_pull_keeps_the_parameters_near_the_last_switch(tmp_path: Path) -> None:
    settings, far = tiny.settings(weight_decay=0.0, schedule="constant", warmup=0.0, epochs=4), []
    start = staged().values()
    for rho in (0.0, 1.0, 1e3):
        values, _ = trained(Lisa(k1=0, rho=rho), tmp_path / str(rho), settings)
        far.append(torch.stack([(w - w0).norm() for w, w0 in zip(values, start, strict=True)]).norm().item())
    assert far[0] > 1.5 * far[1] > 2.25 * far[2], far
