"""The trainer: accumulation, the order of hooks, and interruptions that do not change the result."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor
from transformers import TrainerCallback

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.durable import seal
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import Lines, Silent
from harmbench_vaccine.defenses.random_vaccine import RandomVaccine
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training import trainer
from harmbench_vaccine.training.checkpoints import newest_checkpoint
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.runs import Notes
from support.trainer import Stop, assert_same, interrupting
from support.world import make_world

SEED = 7  # the seed of tiny.stage

# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(("rows", "batch"), [(20, 4), (10, 4), (3, 8), (1, 1)])
def test_every_epoch_uses_every_row_once(rows: int, batch: int) -> None:
    order = batch_order(rows, tiny.settings(batch=batch, epochs=3), SEED)
    per_epoch = math.ceil(rows / batch)
    assert len(order) == 3 * per_epoch
    for epoch in range(3):
        batches = order[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(row for rows_of_batch in batches for row in rows_of_batch) == Counter(range(rows))
        assert [len(rows_of_batch) for rows_of_batch in batches[:-1]] == [batch] * (per_epoch - 1)


def test_seed_shuffles_every_epoch_differently() -> None:
    settings = tiny.settings(batch=4, epochs=2)
    order = batch_order(20, settings, SEED)
    assert order[:5] != order[5:]
    assert order[:5] != [list(range(start, start + 4)) for start in range(0, 20, 4)]
    assert batch_order(20, settings, SEED) == order
    assert batch_order(20, settings, SEED + 1) != order


def test_fraction_of_an_epoch_is_complete_batches() -> None:
    complete = batch_order(20, tiny.settings(batch=4, epochs=3), SEED)
    assert batch_order(20, tiny.settings(batch=4, epochs=2.4), SEED) == complete[:12]
    assert batch_order(20, tiny.settings(batch=4, epochs=0.2), SEED) == complete[:1]


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation


@pytest.mark.parametrize("rows", [16, 12, 10], ids=["full steps", "last step of one", "last micro-batch of two rows"])
def test_accumulation_uses_every_micro_batch(rows: int, tmp_path: Path) -> None:
    settings = tiny.settings(
        batch=4, accumulation=2, epochs=1, schedule="constant", warmup=0.0, weight_decay=0.1, max_grad_norm=0.5
    )
    data = tiny.rows(rows)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    log = train(stage, SFT(), data, settings, tmp_path, pad=tiny.PAD)

    twin, _ = tiny.stage(trained_with=settings, stirred=True)
    parameters = list(twin.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    twin.model.train()
    order = batch_order(rows, settings, SEED)
    steps = [order[start : start + 2] for start in range(0, len(order), 2)]
    assert len(log) == len(steps)
    for entry, micro_batches in zip(log, steps, strict=True):
        losses = [twin.model(**tiny.collated([data[row] for row in batch])).loss for batch in micro_batches]
        mean = torch.stack(losses).mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(mean, parameters), strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        assert entry["loss"] == pytest.approx(mean.item(), rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.5  # clipping changes the step
    for parameter, expected in zip(stage.trainable.values(), parameters, strict=True):
        torch.testing.assert_close(parameter, expected, atol=2e-5, rtol=1e-4)


def test_log_has_every_step_and_learning_rate(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=2, batch=4, warmup=0.2, lr=1e-3)
    stage, _ = tiny.stage(trained_with=settings)
    log = train(stage, SFT(), tiny.rows(20), settings, tmp_path, pad=tiny.PAD)
    assert [entry["step"] for entry in log] == list(range(1, 11))
    rates = [1e-3 * step / 2 for step in range(2)]  # two warm-up steps
    rates += [1e-3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [entry["learning_rate"] for entry in log] == pytest.approx(rates, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


class Recorder(Defense):
    """Records every hook call with the clock of the stage."""

    _calls: list[Any] = PrivateAttr(default_factory=list)

    def note(self, hook: str, stage: TrainingStage) -> None:
        assert all(parameter.grad is None for parameter in stage.trainable.values()) or stage.micro
        self._calls.append((hook, stage.step, stage.micro) if hook == "gradient" else (hook, stage.step))

    def before(self, stage: TrainingStage) -> None:
        self._calls.append("before")

    def before_step(self, stage: TrainingStage) -> None:
        self.note("before_step", stage)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self.note("gradient", stage)
        assert stage.model.training
        return stage.gradient(batch)

    def after_step(self, stage: TrainingStage) -> None:
        self.note("after_step", stage)


@pytest.mark.parametrize("team", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_hooks_are_called_in_order(accumulation: int, team: bool, tmp_path: Path) -> None:
    settings = tiny.settings(batch=4, epochs=1, accumulation=accumulation)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    recorder = Recorder()
    defense = DefenseTeam(members=(SFT(), recorder)) if team else recorder
    if isinstance(defense, DefenseTeam):
        recorder = defense.members[1]  # type: ignore[assignment]
    train(stage, defense, tiny.rows(20), settings, tmp_path, pad=tiny.PAD)
    expected: list[Any] = ["before"]
    micro_batches = [2, 2, 1] if accumulation == 2 else [1] * 5
    assert stage.steps == len(micro_batches)
    for step, count in enumerate(micro_batches, 1):
        expected += [
            ("before_step", step),
            *(("gradient", step, micro) for micro in range(count)),
            ("after_step", step),
        ]
    assert recorder._calls == expected


RECORDING = """
from harmbench_vaccine.plugins import Defense
from pathlib import Path

class Recording(Defense):
    stages = ("align", "finetune", "repair")
    def note(self, *what):
        with Path(__file__).with_name("calls.txt").open("a") as file:
            print(*what, file=file)
    def train_on(self, stage, rows, pools):
        self.note("rows", stage, len(rows), len(pools.attacker) > 0, any(row.harmful for row in rows))
        return rows[:-4]
    def settings(self, stage, settings):
        from dataclasses import replace
        return replace(settings, epochs=1)
    def template(self, use, template):
        if use == "train":
            self.note("template", use)
        return template
    def before(self, stage):
        self.note("before", stage.name, stage.steps)
    def before_step(self, stage):
        self.note("before_step", stage.name, stage.step)
    def gradient(self, stage, batch):
        self.note("gradient", stage.name, stage.step, len(batch["input_ids"]))
        return stage.gradient(batch)
    def after_step(self, stage):
        self.note("after_step", stage.name, stage.step)
    def edit(self, stage, adapter):
        import torch
        active = stage.model(input_ids=torch.tensor([[5, 6, 7]], device=stage.model.device)).logits.isfinite().all()
        self.note("edit", stage.name, adapter.rank, bool(active))
        return type(adapter)(adapter.factors, adapter.scale / 2)
"""


def test_complete_run_calls_every_hook_in_order(tmp_path: Path) -> None:
    plugin = tmp_path / "recording.py"
    plugin.write_text(RECORDING)
    protocol = make_world(tmp_path / "world")
    spec = RunSpec(protocol=str(protocol), defense=parse_plugins(str(plugin)), attack=parse_plugins("ratio=0.25"))
    run_all([spec])
    steps = {
        name: [
            line
            for step in range(1, 10)
            for line in (f"before_step {name} {step}", f"gradient {name} {step} 4", f"after_step {name} {step}")
        ]
        for name in ("align", "finetune")
    }
    assert (tmp_path / "calls.txt").read_text().splitlines() == [
        *("template train", "template train", "template train"),  # the configuration of the stages
        *("rows align 40 True False", "rows finetune 40 True True"),  # the check before any work
        *("rows align 40 True False", "before align 9", *steps["align"], "edit align 4 True"),
        *("rows finetune 40 True True", "before finetune 9", *steps["finetune"], "edit finetune 4 True"),
        "edit repair 4 True",
    ]
    store = tmp_path / "home" / "store"
    scales = {
        stage: json.loads(next(store.glob(f"{stage}/*/adapter/adapter_config.json")).read_text())["lora_alpha"]
        for stage in ("align", "finetune", "repair")
    }
    assert scales == {"align": 4, "finetune": 4, "repair": 2}  # each edit halves the scale


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Counting(SFT):
    """A defense with state: the gradient depends on the number of steps and on random noise."""

    name: ClassVar[str] = "counting"
    _sums: Tensor = torch.zeros(2, dtype=torch.float64)
    _prepared: int = 0

    def before(self, stage: TrainingStage) -> None:
        self._prepared += 1
        self._sums = torch.zeros(2, dtype=torch.float64)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        plain = stage.gradient(batch)
        return Gradient(plain.loss, [(1 + float(self._sums[0]) / 10) * value for value in plain.values])

    def after_step(self, stage: TrainingStage) -> None:
        self._sums = self._sums + torch.rand(2, generator=stage.generator("count")).double()

    def state(self) -> dict[str, Tensor]:
        return {"sums": self._sums}

    def restore(self, state: dict[str, Tensor]) -> None:
        assert state["sums"].dtype == torch.float64
        self._sums = state["sums"]


class StoppingProgress(Silent):
    """Interrupts from the progress bar, like Ctrl-C between two steps."""

    def __init__(self, count: int) -> None:
        self.stop = Stop(count)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Any]:
        yield lambda steps, *more: self.stop.reach() if steps else None


def run_stage(
    folder: Path, defense: Defense, settings: TrainSettings, *, salt: int = 0, rows: int = 20, **more: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train a stage from new objects, like another process; `salt` seeds torch's generator."""
    torch.manual_seed(salt)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    log = train(stage, defense, tiny.rows(rows), settings, folder, pad=tiny.PAD, **more)
    return {name: value.detach().clone() for name, value in stage.trainable.items()}, log


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


PLAIN, ACCUMULATED = {"epochs": 3}, {"epochs": 3, "accumulation": 2, "batch": 3}  # 15 steps; 11 of up to two


@pytest.mark.parametrize(
    ("make", "changes", "hook", "count"),
    [
        (SFT, PLAIN, "before_step", 8),  # in the second epoch
        (SFT, ACCUMULATED, "gradient", 14),  # between two micro-batches of step 7
        (SFT, {**PLAIN, "epochs": 2.6}, "after_step", 11),
        (lambda: Vaccine(rho=2.0, tau=2), PLAIN, "gradient", 12),
        (lambda: RandomVaccine(variance=0.1), ACCUMULATED, "before_step", 9),
        (Counting, ACCUMULATED, "after_step", 8),
        (lambda: DefenseTeam(members=(Counting(),)), PLAIN, "after_step", 11),
    ],
    ids=["sft", "sft-accumulated", "sft-share", "vaccine", "random-vaccine", "state", "team"],
)
def test_interrupted_stage_ends_bit_equal(
    make: Callable[[], Defense], changes: dict[str, Any], hook: str, count: int, tmp_path: Path
) -> None:
    settings = tiny.settings(lora_dropout=0.1, **changes)
    complete = run_stage(tmp_path / "complete", make(), settings)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "cut", interrupting(make(), hook, count), settings, salt=1)
    assert len(checkpoints(tmp_path / "cut")) == 1  # only the newest checkpoint
    assert_same(run_stage(tmp_path / "cut", make(), settings, salt=2), complete)


def test_repeated_interruptions_end_bit_equal(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=3)
    complete = run_stage(tmp_path / "complete", SFT(), settings)
    for count in (5, 4, 6):  # a resumed bar first jumps to its previous position
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "cut", SFT(), settings, salt=count, progress=StoppingProgress(count))
    assert checkpoints(tmp_path / "cut") == ["checkpoint-10"]
    assert_same(run_stage(tmp_path / "cut", SFT(), settings, salt=9), complete)


def test_stage_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=3)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, interrupting(SFT(), "before_step", 10), settings)
    assert checkpoints(tmp_path) == ["checkpoint-8"]  # 10% of 15 steps: every second step
    recorder, lines = Recorder(), list[str]()
    run_stage(tmp_path, recorder, settings, progress=Lines(lines.append))
    assert lines[0] == "align: resumed after step 8"
    assert recorder._calls[0] == ("before_step", 9)  # `before` is not called again
    assert recorder._calls[-1] == ("after_step", 15)


def test_stage_without_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    complete = run_stage(tmp_path / "complete", Counting(), settings)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "cut", interrupting(Counting(), "before_step", 3), settings, save_share=0.5)
    assert checkpoints(tmp_path / "cut") == []
    second = Counting()
    assert_same(run_stage(tmp_path / "cut", second, settings, save_share=0.5), complete)
    assert second._prepared == 1


def test_checkpoint_frequency_does_not_change_the_result(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    often = run_stage(tmp_path / "often", SFT(), settings, save_share=0.1)
    assert_same(run_stage(tmp_path / "never", SFT(), settings, save_share=1.0), often)


def test_state_of_a_defense_is_restored(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, interrupting(Counting(), "before_step", 6), settings)
    restored: list[Tensor] = []

    class Witness(Counting):
        name: ClassVar[str] = "counting"

        def restore(self, state: dict[str, Tensor]) -> None:
            restored.append(state["sums"].clone())
            super().restore(state)

    run_stage(tmp_path, Witness(), settings)
    stage, _ = tiny.stage()
    expected = torch.zeros(2, dtype=torch.float64)
    for stage.step in range(1, 6):
        # after_step follows the micro-batch, so it uses the stream of micro-batch 1
        stage.micro = 1
        expected = expected + torch.rand(2, generator=stage.generator("count")).double()
    assert len(restored) == 1
    assert torch.equal(restored[0], expected)


def test_team_members_have_separate_state() -> None:
    class Other(Counting):
        name: ClassVar[str] = "counting_more"  # the first name is a prefix of this one

    team = DefenseTeam(members=(Counting(),))
    first, second = Counting(), Other()
    first._sums, second._sums = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double()
    object.__setattr__(team, "members", (first, second))
    state = team.state()
    assert len(state) == 2
    first._sums = second._sums = torch.zeros(2).double()
    team.restore(state)
    assert first._sums.tolist() == [1.0, 2.0]
    assert second._sums.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("garbage", [True, False], ids=["garbage", "cut while saving"])
def test_incomplete_checkpoint_is_ignored(garbage: bool, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=3)
    complete = run_stage(tmp_path / "complete", Counting(), settings)
    cut = interrupting(Counting(), "before_step", 6) if garbage else interrupting(Counting(), "state", 3)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "cut", cut, settings)
    if garbage:
        for name in ("trainable.safetensors", "trainer_state.json", "optimizer.pt"):
            path = tmp_path / "cut" / "checkpoint-12" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"half")
    # An interrupted save is removed at once; files of a killed process are removed when the stage runs again.
    assert len(checkpoints(tmp_path / "cut")) == (2 if garbage else 1)
    witness = Recorder()
    with pytest.raises(KeyError):  # stops at once: only the first step matters here
        run_stage(tmp_path / "cut", raising(witness), settings)
    assert witness._calls == [("before_step", 5)]
    assert_same(run_stage(tmp_path / "cut", Counting(), settings), complete)


def raising(recorder: Recorder) -> Defense:
    class Raising(SFT):
        def before_step(self, stage: TrainingStage) -> None:
            recorder._calls.append(("before_step", stage.step))
            raise KeyError

    return Raising()


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The folder of a stage that was interrupted after checkpoint 8 of 15 steps."""
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "cut", interrupting(Counting(), "before_step", 10), CHECKPOINTED)
    return tmp_path / "cut"


CHECKPOINTED = tiny.settings(lora_dropout=0.1, epochs=3)
CHECKPOINT_FILES = {
    *("trainable.safetensors", "defense.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "whole"),
}


def test_every_damage_of_a_checkpoint_is_noticed(interrupted: Path) -> None:
    checkpoint = interrupted / "checkpoint-8"
    intact = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert intact.keys() == CHECKPOINT_FILES
    for name, content in intact.items():
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 0x08]) + content[half + 1 :]
        for damaged in (content[:half], b"", flipped, content + b"\n", None):
            notes = Notes()
            if damaged is None:
                (checkpoint / name).unlink()
            else:
                (checkpoint / name).write_bytes(damaged)
            harmless = name == "whole" and damaged == content + b"\n"
            assert (newest_checkpoint(interrupted, notes) is None) != harmless, (name, damaged)
            assert len(notes.texts) == (0 if harmless else 1)
            assert all("cut: checkpoint 8 is " in text for text in notes.texts)
            assert checkpoint.exists() == harmless
            checkpoint.mkdir(exist_ok=True)
            for other, content_of_other in intact.items():
                (checkpoint / other).write_bytes(content_of_other)
    assert newest_checkpoint(interrupted) == str(checkpoint)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "rng_state.pth"])
def test_stage_with_a_damaged_checkpoint_ends_bit_equal(name: str, interrupted: Path, tmp_path: Path) -> None:
    content = bytearray((interrupted / "checkpoint-8" / name).read_bytes())
    content[-100] ^= 0x08
    (interrupted / "checkpoint-8" / name).write_bytes(content)
    complete = run_stage(tmp_path / "complete", Counting(), CHECKPOINTED)
    assert_same(run_stage(interrupted, Counting(), CHECKPOINTED, salt=3), complete)


def test_older_whole_checkpoint_replaces_a_damaged_one(interrupted: Path, tmp_path: Path) -> None:
    """A process was killed after it had completed a checkpoint and before it removed the older one."""
    shutil.copytree(interrupted / "checkpoint-8", tmp_path / "checkpoint-8")
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupted, interrupting(Counting(), "before_step", 4), CHECKPOINTED)
    shutil.copytree(tmp_path / "checkpoint-8", interrupted / "checkpoint-8")
    assert checkpoints(interrupted) == ["checkpoint-10", "checkpoint-8"]
    (interrupted / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    notes = Notes()
    assert newest_checkpoint(interrupted, notes) == str(interrupted / "checkpoint-8")
    assert notes.texts == ["cut: checkpoint 10 is damaged; training starts without it"]
    assert checkpoints(interrupted) == ["checkpoint-8"]


def test_checkpoint_of_another_number_of_ranks_is_not_used(interrupted: Path) -> None:
    notes = Notes()
    (interrupted / "checkpoint-8" / "whole").unlink()
    seal(interrupted / "checkpoint-8", "whole", {"ranks": 2})
    assert newest_checkpoint(interrupted, notes, ranks=2) == str(interrupted / "checkpoint-8")
    assert newest_checkpoint(interrupted, notes) is None
    assert notes.texts == ["cut: checkpoint 8 is of 2 ranks; training starts without it"]


def test_file_in_the_place_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=1)
    (tmp_path / "checkpoint-2").write_text("foreign")
    run_stage(tmp_path, SFT(), settings, save_share=0.4)
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_space_for_checkpoints_is_checked_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = tiny.stage()
    trainable = sum(4 * value.numel() for value in stage.trainable.values())
    free = 6 * trainable  # two checkpoints of weights and two moments each
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    run_stage(tmp_path / "enough", SFT(), tiny.settings(epochs=1))
    recorder, free = Recorder(), free - 1
    with pytest.raises(HbvError, match="The disk is full: the align stage needs about"):
        run_stage(tmp_path / "full", recorder, tiny.settings(epochs=1))
    assert recorder._calls == []


@pytest.mark.parametrize("steps", [3, 4, 100])
def test_losses_that_are_read_together_equal_those_read_one_by_one(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's losses are read for several steps at once; an interrupted stage keeps those before its checkpoint."""
    defense, settings = Counting(), tiny.settings(**PLAIN)
    expected = run_stage(tmp_path / "one by one", defense, settings)
    monkeypatch.setitem(trainer._READ_STEPS, device(), steps)
    reported: list[tuple[int, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append((state.global_step, logs.get("loss", logs.get("train_loss"))))

    actual = run_stage(tmp_path / "together", Counting(), settings, callbacks=[Tracker()])
    assert_same(actual, expected)
    *of_steps, (_, mean) = reported
    assert of_steps == [(entry["step"], entry["loss"]) for entry in expected[1]]
    assert mean == pytest.approx(sum(entry["loss"] for entry in expected[1]) / len(expected[1]), rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "stopped", interrupting(Counting(), "before_step", 9), settings, save_share=0.2)
    assert_same(run_stage(tmp_path / "stopped", Counting(), settings), expected)


def test_zero_epochs_change_nothing(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=0)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    before = [value.detach().clone() for value in stage.trainable.values()]
    assert train(stage, SFT(), tiny.rows(8), settings, tmp_path, pad=tiny.PAD) == []
    for old, new in zip(before, stage.trainable.values(), strict=True):
        assert torch.equal(old, new)


def test_before_hook_has_separate_random_numbers(tmp_path: Path) -> None:
    """A pass over data has no dropout and separate random numbers; the random numbers of the steps do not change."""

    class Looking(SFT):
        _numbers: Any = None

        def before(self, stage: TrainingStage) -> None:
            assert not stage.model.training
            self._numbers = [stage.loss(tiny.batch()).item(), torch.rand(1).item()]

    settings = tiny.settings(lora_dropout=0.5, epochs=1)
    plain = run_stage(tmp_path / "plain", SFT(), settings)
    numbers = []
    for salt in (0, 1):
        looking = Looking()
        assert_same(run_stage(tmp_path / str(salt), looking, settings, salt=salt), plain)
        numbers.append(looking._numbers)
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 2


def test_momentum_and_decay_do_not_change_a_frozen_parameter(tmp_path: Path) -> None:
    class Freezing(SFT):
        _frozen: Any = None

        def before_step(self, stage: TrainingStage) -> None:
            first = next(iter(stage.trainable.values()))
            first.requires_grad_(stage.step < 3)
            if stage.step == 3:
                self._frozen = first.detach().clone()

    settings = tiny.settings(weight_decay=0.5)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    first = next(iter(stage.trainable.values()))
    before = first.detach().clone()
    freezing = Freezing()
    train(stage, freezing, tiny.rows(20), settings, tmp_path, pad=tiny.PAD)
    assert not torch.equal(freezing._frozen, before)
    assert torch.equal(first, freezing._frozen)


def test_max_grad_norm_of_0_does_not_clip_but_logs_norms(tmp_path: Path) -> None:
    log = run_stage(tmp_path, SFT(), tiny.settings(max_grad_norm=0.0, epochs=1))[1]
    assert log
    assert all(entry["grad_norm"] > 0 for entry in log)
