"""The trainer: accumulation, the order of hooks, and interruptions that leave no trace in the result."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.data.collate import collate
from harmbench_vaccine.defenses.random_vaccine import RandomVaccine
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.trainer import Stop, assert_same, interrupting
from support.world import make_world

SEED = 7  # of tiny.stage

# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(("rows", "batch"), [(20, 4), (10, 4), (3, 8), (1, 1)])
def test_every_epoch_takes_every_row_exactly_once(rows: int, batch: int) -> None:
    order = batch_order(rows, tiny.settings(batch=batch, epochs=3), SEED)
    per_epoch = math.ceil(rows / batch)
    assert len(order) == 3 * per_epoch
    for epoch in range(3):
        batches = order[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(row for each in batches for row in each) == Counter(range(rows))
        assert [len(each) for each in batches[:-1]] == [batch] * (per_epoch - 1)


def test_epochs_are_shuffled_apart_and_by_the_seed() -> None:
    settings = tiny.settings(batch=4, epochs=2)
    order = batch_order(20, settings, SEED)
    assert order[:5] != order[5:]
    assert order[:5] != [list(range(start, start + 4)) for start in range(0, 20, 4)]
    assert batch_order(20, settings, SEED) == order
    assert batch_order(20, settings, SEED + 1) != order


def test_a_share_of_an_epoch_is_whole_batches_of_that_epoch() -> None:
    whole = batch_order(20, tiny.settings(batch=4, epochs=3), SEED)
    assert batch_order(20, tiny.settings(batch=4, epochs=2.4), SEED) == whole[:12]
    assert batch_order(20, tiny.settings(batch=4, epochs=0.2), SEED) == whole[:1]


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation


@pytest.mark.parametrize("rows", [16, 12, 10], ids=["full steps", "last step of one", "last micro-batch of two rows"])
def test_accumulation_loses_no_micro_batch(rows: int, tmp_path: Path) -> None:
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
        losses = [twin.model(**collate([data[row] for row in batch], tiny.PAD)).loss for batch in micro_batches]
        mean = torch.stack(losses).mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(mean, parameters), strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        assert entry["loss"] == pytest.approx(mean.item(), rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.5  # so that clipping acts
    for ours, theirs in zip(stage.trainable.values(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_log_has_every_step_and_the_learning_rate_of_the_schedule(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=2, batch=4, warmup=0.2, lr=1e-3)
    stage, _ = tiny.stage(trained_with=settings)
    log = train(stage, SFT(), tiny.rows(20), settings, tmp_path, pad=tiny.PAD)
    assert [entry["step"] for entry in log] == list(range(1, 11))
    rates = [1e-3 * step / 2 for step in range(2)]  # two steps of warm-up
    rates += [1e-3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [entry["learning_rate"] for entry in log] == pytest.approx(rates, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


class Recorder(Defense):
    """Notes every hook of the trainer with the stage's clock."""

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
def test_every_hook_is_called_in_order(accumulation: int, team: bool, tmp_path: Path) -> None:
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
        active = stage.model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
        self.note("edit", stage.name, adapter.rank, bool(active))
        return type(adapter)(adapter.factors, adapter.scale / 2)
"""


def test_a_defense_of_all_stages_meets_every_hook_in_a_whole_run(tmp_path: Path) -> None:
    plugin = tmp_path / "recording.py"
    plugin.write_text(RECORDING)
    protocol = make_world(tmp_path / "world")
    spec = RunSpec(protocol=str(protocol), defense=parse_plugins(str(plugin)), attack=parse_plugins("ratio=0.25"))
    run_all([spec])
    steps = {
        name: [line for step in range(1, 10) for line in
               (f"before_step {name} {step}", f"gradient {name} {step} 4", f"after_step {name} {step}")]
        for name in ("align", "finetune")
    }  # fmt: skip
    assert (tmp_path / "calls.txt").read_text().splitlines() == [
        "rows align 40 True False", "rows finetune 40 True True",  # the check before any work
        "template train", "rows align 40 True False", "before align 9", *steps["align"], "edit align 4 True",
        "template train", "rows finetune 40 True True", "before finetune 9", *steps["finetune"],
        "edit finetune 4 True", "template train", "edit repair 4 True",
    ]  # fmt: skip
    store = tmp_path / "home" / "store"
    scales = {
        stage: json.loads(next(store.glob(f"{stage}/*/adapter/adapter_config.json")).read_text())["lora_alpha"]
        for stage in ("align", "finetune", "repair")
    }
    assert scales == {"align": 4, "finetune": 4, "repair": 2}  # each edit halved what it was given


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Counting(SFT):
    """A defense with a memory: the gradient depends on how many steps it has seen, and on drawn noise."""

    name: ClassVar[str] = "counting"
    _seen: Tensor = torch.zeros(2, dtype=torch.float64)
    _prepared: int = 0

    def before(self, stage: TrainingStage) -> None:
        self._prepared += 1
        self._seen = torch.zeros(2, dtype=torch.float64)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        plain = stage.gradient(batch)
        return Gradient(plain.loss, [(1 + float(self._seen[0]) / 10) * value for value in plain.values])

    def after_step(self, stage: TrainingStage) -> None:
        self._seen = self._seen + torch.rand(2, generator=stage.generator("count")).double()

    def state(self) -> dict[str, Tensor]:
        return {"seen": self._seen}

    def restore(self, state: dict[str, Tensor]) -> None:
        assert state["seen"].dtype == torch.float64
        self._seen = state["seen"]


class StoppingProgress:
    """Interrupts from the progress bar, as Ctrl-C would between two steps."""

    def __init__(self, count: int) -> None:
        self.stop = Stop(count)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Any]:
        yield lambda steps: self.stop.reach() if steps else None

    def note(self, text: str) -> None:
        pass


def run_stage(
    folder: Path, defense: Defense, settings: TrainSettings, *, salt: int = 0, rows: int = 20, **more: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """A stage from fresh objects, as another process would make them; `salt` sets torch's generator apart."""
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
    ids=["sft", "sft-accumulated", "sft-share", "vaccine", "random-vaccine", "memory", "team"],
)
def test_an_interrupted_stage_ends_bit_equal(
    make: Callable[[], Defense], changes: dict[str, Any], hook: str, count: int, tmp_path: Path
) -> None:
    settings = tiny.settings(lora_dropout=0.1, **changes)
    whole = run_stage(tmp_path / "whole", make(), settings)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "cut", interrupting(make(), hook, count), settings, salt=1)
    assert len(checkpoints(tmp_path / "cut")) == 1  # one whole checkpoint, the older ones gone
    assert_same(run_stage(tmp_path / "cut", make(), settings, salt=2), whole)


def test_interrupted_at_the_progress_bar_again_and_again(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=3)
    whole = run_stage(tmp_path / "whole", SFT(), settings)
    for count in (5, 4, 6):  # a resumed bar first jumps to where it was
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "cut", SFT(), settings, salt=count, progress=StoppingProgress(count))
    assert checkpoints(tmp_path / "cut") == ["checkpoint-10"]
    assert_same(run_stage(tmp_path / "cut", SFT(), settings, salt=9), whole)


def test_a_stage_resumes_and_does_not_start_again(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=3)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, interrupting(SFT(), "before_step", 10), settings)
    assert checkpoints(tmp_path) == ["checkpoint-8"]  # 10 % of 15 steps is every second
    recorder = Recorder()
    run_stage(tmp_path, recorder, settings)
    assert recorder._calls[0] == ("before_step", 9)  # and `before` is not called a second time
    assert recorder._calls[-1] == ("after_step", 15)


def test_before_the_first_checkpoint_a_stage_starts_again(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    whole = run_stage(tmp_path / "whole", Counting(), settings)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "cut", interrupting(Counting(), "before_step", 3), settings, save_share=0.5)
    assert checkpoints(tmp_path / "cut") == []
    again = Counting()
    assert_same(run_stage(tmp_path / "cut", again, settings, save_share=0.5), whole)
    assert again._prepared == 1


def test_how_often_is_saved_changes_nothing(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    often = run_stage(tmp_path / "often", SFT(), settings, save_share=0.1)
    assert_same(run_stage(tmp_path / "never", SFT(), settings, save_share=1.0), often)


def test_what_a_defense_remembers_comes_back(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, interrupting(Counting(), "before_step", 6), settings)
    restored: list[Tensor] = []

    class Witness(Counting):
        name: ClassVar[str] = "counting"

        def restore(self, state: dict[str, Tensor]) -> None:
            restored.append(state["seen"].clone())
            super().restore(state)

    run_stage(tmp_path, Witness(), settings)
    stage, _ = tiny.stage()
    expected = torch.zeros(2, dtype=torch.float64)
    for stage.step in range(1, 6):
        # after_step comes after the micro-batch, so the stream is that of micro-batch 1
        stage.micro = 1
        expected = expected + torch.rand(2, generator=stage.generator("count")).double()
    assert len(restored) == 1
    assert torch.equal(restored[0], expected)


def test_members_of_a_team_keep_their_memories_apart() -> None:
    class Other(Counting):
        name: ClassVar[str] = "counting_more"  # its name begins with the other's

    team = DefenseTeam(members=(Counting(),))
    first, second = Counting(), Other()
    first._seen, second._seen = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double()
    object.__setattr__(team, "members", (first, second))
    state = team.state()
    assert len(state) == 2
    first._seen = second._seen = torch.zeros(2).double()
    team.restore(state)
    assert first._seen.tolist() == [1.0, 2.0]
    assert second._seen.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("garbage", [True, False], ids=["garbage", "cut while saving"])
def test_a_half_written_checkpoint_is_ignored(garbage: bool, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=3)
    whole = run_stage(tmp_path / "whole", Counting(), settings)
    cut = interrupting(Counting(), "before_step", 6) if garbage else interrupting(Counting(), "state", 3)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "cut", cut, settings)
    if garbage:
        for name in ("trainable.safetensors", "trainer_state.json", "optimizer.pt"):
            path = tmp_path / "cut" / "checkpoint-12" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"half")
    # What was cut while saving is cleared away at once, what a killed process left when the stage is tried again.
    assert len(checkpoints(tmp_path / "cut")) == (2 if garbage else 1)
    witness = Recorder()
    with pytest.raises(KeyError):  # stops it at once: all that is asked here is where it goes on
        run_stage(tmp_path / "cut", _raising(witness), settings)
    assert witness._calls == [("before_step", 5)]
    assert_same(run_stage(tmp_path / "cut", Counting(), settings), whole)


def _raising(recorder: Recorder) -> Defense:
    class Raising(SFT):
        def before_step(self, stage: TrainingStage) -> None:
            recorder._calls.append(("before_step", stage.step))
            raise KeyError

    return Raising()


def test_no_epochs_are_no_steps(tmp_path: Path) -> None:
    settings = tiny.settings(epochs=0)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    before = [value.detach().clone() for value in stage.trainable.values()]
    assert train(stage, SFT(), tiny.rows(8), settings, tmp_path, pad=tiny.PAD) == []
    for old, new in zip(before, stage.trainable.values(), strict=True):
        assert torch.equal(old, new)


def test_what_is_done_before_the_first_step_depends_on_nothing_that_ran_earlier(tmp_path: Path) -> None:
    """A pass over data meets no dropout and its own random numbers, and leaves the steps' random numbers alone."""

    class Looking(SFT):
        _found: Any = None

        def before(self, stage: TrainingStage) -> None:
            assert not stage.model.training
            self._found = [stage.loss(tiny.batch()).item(), torch.rand(1).item()]

    settings = tiny.settings(lora_dropout=0.5, epochs=1)
    plain = run_stage(tmp_path / "plain", SFT(), settings)
    found = []
    for salt in (0, 1):
        looking = Looking()
        assert_same(run_stage(tmp_path / str(salt), looking, settings, salt=salt), plain)
        found.append(looking._found)
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_frozen_parameter_is_not_moved_by_momentum_or_decay(tmp_path: Path) -> None:
    class Freezing(SFT):
        _kept: Any = None

        def before_step(self, stage: TrainingStage) -> None:
            first = next(iter(stage.trainable.values()))
            first.requires_grad_(stage.step < 3)
            if stage.step == 3:
                self._kept = first.detach().clone()

    settings = tiny.settings(weight_decay=0.5)
    stage, _ = tiny.stage(trained_with=settings, stirred=True)
    first = next(iter(stage.trainable.values()))
    before = first.detach().clone()
    freezing = Freezing()
    train(stage, freezing, tiny.rows(20), settings, tmp_path, pad=tiny.PAD)
    assert not torch.equal(freezing._kept, before)
    assert torch.equal(first, freezing._kept)


def test_a_norm_of_0_clips_nothing_and_the_log_still_has_the_norms(tmp_path: Path) -> None:
    log = run_stage(tmp_path, SFT(), tiny.settings(max_grad_norm=0.0, epochs=1))[1]
    assert log
    assert all(entry["grad_norm"] > 0 for entry in log)
