"""Lisa compared with its equation in plain PyTorch: the state of every step, its first parameters, and the pull."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.lisa import Lisa
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Defense, Pools, TrainSettings
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.compare import close, same
from support.plain_math import cross_entropy, leaves


def user_stage(settings: TrainSettings | None = None, pools: Pools | None = None) -> TrainingStage:
    return tiny.stage(trained_with=settings, stirred=True, name="finetune", pools=pools or tiny.example_pools())[0]


def train_adapter(
    defense: Defense, folder: Path, settings: TrainSettings, rows: int = 20
) -> tuple[list[Tensor], list[dict[str, float]]]:
    stage = user_stage(settings)
    log = train(stage, defense, tiny.rows(rows), settings, folder, pad=tiny.PAD)
    return stage.values(), log


class RecordingLisa(Lisa):
    """A Lisa that records its inputs.

    For every micro-batch: the step, the row numbers of the user batch, the alignment batch. For every step: the
    parameters, and those at the first step of its state.
    """

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
            rows = plain(stage, purpose, examples)
            self._aligning.append((stage.step, rows))
            return rows

        stage.stream = stream
        return super().gradient(stage, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equation


@pytest.mark.parametrize(
    ("k1", "k2", "states"),
    [(1, 2, "AFF"), (2, 3, "AAF"), (2, 1, "AAFAAFAAF"), (1, 1, "AFAFAF"), (0, 5, "FFF")],
)
def test_steps_equal_plain_pytorch(k1: int, k2: int, states: str, tmp_path: Path) -> None:
    """The proximal term is nonzero from the second step of a state; the moments of Adam continue over states."""
    settings = tiny.settings(
        epochs=len(states) / 5, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3
    )
    defense = RecordingLisa(k1=k1, k2=k2, rho=30.0)
    result, log = train_adapter(defense, tmp_path, settings)
    aligning = dict(defense._aligning)
    assert sorted(aligning) == [step for step, state in enumerate(states, 1) if state == "A"]

    twin, rows = user_stage(), tiny.rows(20)
    values = leaves(twin)
    parameters = list(values.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    order = batch_order(20, settings, twin.seed)
    anchor, last, pulls = parameters, "", []
    for step, (state, numbers) in enumerate(zip(states, order, strict=True), 1):
        if state != last:
            anchor, last = [value.detach().clone() for value in parameters], state
        batch = aligning[step] if state == "A" else tiny.collated([rows[n] for n in numbers])
        pull = 30.0 / 2 * sum(((w - w_s) ** 2).sum() for w, w_s in zip(parameters, anchor, strict=True))
        loss = cross_entropy(values, batch) + pull
        pulls.append(pull.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert log[step - 1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert close(result, parameters)
    has_pull = "AA" in states or "FF" in states  # otherwise every step is the first of a state, and the pull is 0
    assert (max(pulls) > 0.01) == has_pull
    without_pull, _ = train_adapter(Lisa(k1=k1, k2=k2, rho=0), tmp_path / "free", settings)
    assert close(without_pull, parameters, 1e-3) != has_pull


def test_states_and_their_starts(tmp_path: Path) -> None:
    """k1 = 2, k2 = 3: AAFFFAAFFF, and the anchors are the parameters after 0, 2, 5, 7 steps."""
    assert "".join("A" if Lisa(k1=2, k2=3).aligning(step) else "F" for step in range(1, 11)) == "AAFFFAAFFF"
    defense = RecordingLisa(k1=2, k2=3)
    train_adapter(defense, tmp_path, tiny.settings(epochs=2, batch=4))
    assert [step for step, _ in defense._aligning] == [1, 2, 6, 7]
    parameters = [values for values, _ in defense._steps]
    starts = [next(n for n, values in enumerate(parameters) if same(values, anchor)) for _, anchor in defense._steps]
    assert starts == [0, 0, 2, 2, 2, 5, 5, 7, 7, 7]


def test_micro_batches_of_a_step_share_its_state(tmp_path: Path) -> None:
    """Under accumulation k1 and k2 count optimizer steps; every micro-batch has different rows."""
    defense = RecordingLisa(k1=1, k2=2)
    train_adapter(defense, tmp_path, tiny.settings(epochs=2, batch=4, accumulation=2))
    assert [step for step, _ in defense._aligning] == [1, 1, 4, 4]
    assert len(defense._steps) == 5
    (_, first), (_, second), *_ = defense._aligning
    assert not {tuple(row) for row in first["input_ids"].tolist()} & {
        tuple(row) for row in second["input_ids"].tolist()
    }


@pytest.mark.parametrize(("steps", "free"), [(30, 3), (25, 2), (70, 7), (9, 0)])
def test_no_pull_in_the_first_tenth_of_the_steps(steps: int, free: int) -> None:
    """The pull is 0 until step floor(T / 10), and rho (w - w_s) from the next step on."""
    stage, defense = user_stage(), Lisa(k1=0, k2=10**6, rho=0.5)
    stage.steps, stage.step = steps, 1
    defense.before_step(stage)
    anchor = stage.values()
    tiny.stir(stage.trainable, seed=8)
    plain = stage.gradient(tiny.batch())
    for stage.step in range(1, free + 3):
        if stage.step > 1:
            defense.before_step(stage)
        gradient = defense.gradient(stage, tiny.batch())
        if stage.step <= free:
            assert same(gradient.values, plain.values), stage.step
            assert gradient.loss == plain.loss
        else:
            shifts = [w - w_s for w, w_s in zip(stage.values(), anchor, strict=True)]
            assert close(gradient.values, [g + 0.5 * shift for g, shift in zip(plain.values, shifts, strict=True)])
            expected = plain.loss + 0.25 * sum((shift**2).sum() for shift in shifts)
            assert gradient.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_pull_is_0_at_the_first_step_of_a_state() -> None:
    stage, defense = user_stage(), Lisa(k1=0, rho=1e6)
    stage.steps, stage.step = 5, 1
    defense.before_step(stage)
    gradient, plain = defense.gradient(stage, tiny.batch()), stage.gradient(tiny.batch())
    assert same(gradient.values, plain.values)


# ---------------------------------------------------------------------------------------------------------------------
# Quadratic losses


def descend(defense: Lisa, steps: int, losses: dict[bool, tuple[float, float]], w: float) -> tuple[float, list[float]]:
    """Run gradient descent on f = a/2 (w - u)^2, with one (a, u) for alignment steps and one for user steps.

    Returns:
        The final w, and w at every switch of the state.
    """
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


def test_one_state_converges_to_the_closed_form() -> None:
    a, u, rho, start = 3.0, 5.0, 2.0, 1.0
    for defense in (Lisa(k1=0, k2=10**6, rho=rho), Lisa(k1=10**6, rho=rho)):
        end, _ = descend(defense, 200, {False: (a, u), True: (a, u)}, start)
        assert end == pytest.approx((a * u + rho * start) / (a + rho))


def test_two_states_converge_to_a_cycle() -> None:
    (a, u), (b, v), rho = (3.0, 5.0), (1.0, -2.0), 2.0
    _, switches = descend(Lisa(k1=100, k2=100, rho=rho), 6001, {True: (a, u), False: (b, v)}, 0.0)
    # alignment ends at x = (a u + rho y) / (a + rho), the user's state at y = (b v + rho x) / (b + rho)
    x = (a * u * (b + rho) + rho * b * v) / ((a + rho) * (b + rho) - rho**2)
    y = (b * v + rho * x) / (b + rho)
    assert switches[-2:] == pytest.approx([x, y])


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_the_user_batches_equal_those_of_sft(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=3, batch=4, accumulation=2)
    defense, plain = RecordingLisa(k1=2, k2=3), []

    class Plain(SFT):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            plain.append(batch["rows"].tolist())
            return stage.gradient(batch)

    train_adapter(Plain(), tmp_path / "sft", settings)
    train_adapter(defense, tmp_path / "lisa", settings)
    assert defense._users == plain
    assert len(plain) == 15


def test_alignment_steps_use_alignment_rows_and_skip_the_user_rows(tmp_path: Path) -> None:
    """A batch is as large as the user's; each epoch of three steps has each of the twelve rows once, in a new order."""
    stage = user_stage(tiny.settings(batch=4))
    rows = [tuple(row.ids) for row in tiny.encode(stage.pools.alignment)]
    defense, epochs = RecordingLisa(k1=10, k2=1), []
    train_adapter(defense, tmp_path, tiny.settings(epochs=2, batch=4))
    batches = [
        [
            tuple(tokens[: sum(mask)])
            for tokens, mask in zip(encoded["input_ids"].tolist(), encoded["attention_mask"].tolist(), strict=True)
        ]
        for _, encoded in defense._aligning
    ]
    assert [len(batch) for batch in batches] == [4] * 10
    for start in (0, 3, 6):
        epochs.append([row for batch in batches[start : start + 3] for row in batch])
        assert sorted(epochs[-1]) == sorted(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    stage.step, stage.steps = 1, 5
    first, second = Lisa(), Lisa()
    for batch in (first, second):
        batch.before_step(stage)
    assert same(first.gradient(stage, tiny.batch()).values, second.gradient(stage, tiny.batch(seed=1)).values)


def test_missing_alignment_rows_are_refused() -> None:
    stage = user_stage()
    stage.pools, stage.step, stage.steps = Pools(), 1, 5
    defense = Lisa()
    defense.before_step(stage)
    with pytest.raises(BadInput, match="finetune"):
        defense.gradient(stage, tiny.batch())


# ---------------------------------------------------------------------------------------------------------------------
# In the trainer


def test_k1_0_and_rho_0_equal_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    sft, sft_log = train_adapter(SFT(), tmp_path / "sft", settings)
    neutral, neutral_log = train_adapter(Lisa(k1=0, rho=0), tmp_path / "free", settings)
    assert same(neutral, sft)
    assert neutral_log == sft_log
    for number, defense in enumerate((Lisa(k1=0, rho=1), Lisa(k1=1, k2=2, rho=0))):
        assert not same(train_adapter(defense, tmp_path / str(number), settings)[0], sft)


class Interrupted(Lisa):
    """A Lisa that stops at a step."""

    stop: int = 0

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == self.stop:
            raise KeyboardInterrupt
        super().before_step(stage)


@pytest.mark.parametrize("stop", [5, 6, 9], ids=["within a state", "at a switch", "in the second cycle"])
def test_an_interrupted_stage_gives_the_same_result(stop: int, tmp_path: Path) -> None:
    settings, params = tiny.settings(lora_dropout=0.1), {"k1": 2, "k2": 3, "rho": 20.0}
    complete, log = train_adapter(Lisa(**params), tmp_path / "complete", settings)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(Interrupted(**params, stop=stop), tmp_path / "cut", settings)
    resumed, resumed_log = train_adapter(Lisa(**params), tmp_path / "cut", settings)
    assert same(resumed, complete)
    assert resumed_log == log


def test_a_larger_rho_keeps_the_parameters_closer_to_the_last_switch(tmp_path: Path) -> None:
    settings, distances = tiny.settings(weight_decay=0.0, schedule="constant", warmup=0.0, epochs=4), []
    start = user_stage().values()
    for rho in (0.0, 1.0, 1e3):
        values, _ = train_adapter(Lisa(k1=0, rho=rho), tmp_path / str(rho), settings)
        distances.append(torch.stack([(w - w0).norm() for w, w0 in zip(values, start, strict=True)]).norm().item())
    assert distances[0] > 1.5 * distances[1] > 2.25 * distances[2], distances
