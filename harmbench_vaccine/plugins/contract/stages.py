"""One stage of a defense in the tiny world, run as the pipeline runs it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, StageName, Topology, TrainSettings
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.trainer import train, train_nested

from ..teams import DefenseTeam
from .watch import Seen, Watched, own_random_states
from .world import LONGEST, PAD, TinyWorld

NESTED = 8
"""Steps at which a training run inside a stage is cut."""
ALIGNING = 48
"""Micro-batches that the aligned model is trained for."""


@dataclass(frozen=True)
class Trial:
    """A stage, begun or run to its end."""

    stage: TrainingStage
    team: DefenseTeam
    examples: list[Example]
    rows: list[Encoded]
    settings: TrainSettings
    nested: Nested
    adapter: Adapter
    """What the stage began with, then what it made."""
    start: list[Tensor]
    """The trained parameters at the beginning."""
    values: list[Tensor]
    """The same at the end of training."""
    log: list[dict[str, float]]


class Nested:
    """Training runs inside a stage, as `TrainingStage.train_apart` asks for them: nothing is stored."""

    def __init__(self, world: TinyWorld) -> None:
        self.world = world
        self.micro_batches = 0
        """Of all runs."""

    def __call__(
        self, outer: TrainingStage, purpose: str, examples: Sequence[Example], start: Adapter | None, steps: int | None
    ) -> Adapter:
        """The adapter that plain fine-tuning makes, on the model that the outer stage started from, or of `start`."""
        assert outer.encode is not None
        rows, settings = outer.encode(examples), outer.settings
        per_epoch = math.ceil(len(rows) / settings.batch)
        wanted = settings.epochs * per_epoch if steps is None else steps * settings.accumulation
        settings = replace(settings, epochs=min(wanted, NESTED * settings.accumulation) / per_epoch)
        self.micro_batches += round(settings.epochs * per_epoch)
        with own_random_states():  # Trainer seeds them: what the plug-in itself does to them must show
            adapter, _ = train_nested(outer, purpose, rows, settings, start, self.world.new_folder(), save_share=1.0)
        return adapter


def begin(
    world: TinyWorld, name: StageName, team: DefenseTeam, topology: Topology | None, *,
    seed: int = 0, dtype: str = "float32", longest: int = LONGEST, **changes: float,
) -> Trial:  # fmt: skip
    """A stage before its first hook around training, of at most `longest` micro-batches. `changes` are laid over the
    protocol's settings."""
    given = world.given(name)
    examples = [] if name == "repair" else team.train_on(name, list(given), world.pools)
    settings = team.settings(name, world.settings(len(given), **changes))
    prompt = team.template("train", world.template)

    def encode(examples: Sequence[Example]) -> list[Encoded]:
        return world.encode(examples, prompt, settings.max_length)

    rows = encode(examples)
    if rows:
        settings = replace(settings, epochs=min(settings.epochs, longest / math.ceil(len(rows) / settings.batch)))
    single = topology == "single" and name == "finetune"
    nested = Nested(world)
    stage = TrainingStage(
        name, LoraStack(world.base(dtype)), {}, derive_seed(seed, name), settings, world.pools,
        below=() if single or name == "align" else (world.aligned,), start=world.aligned if single else None,
        encode=encode, nested=nested, pad=PAD,
    )  # fmt: skip
    if name == "repair":
        stage.replace_adapter(world.adapter(3))
    else:
        start = Adapter.load(stage.start) if stage.start else None
        stage.trainable = stage.stack.train(stage.below, settings, derive_seed(stage.seed, "adapter"), start)
    values = stage.values()
    return Trial(stage, team, examples, rows, settings, nested, stage.stack.trained(), values, values, [])


def trained(trial: Trial, folder: Path, *, save_share: float = 1.0, progress: Progress = SILENT) -> Trial:
    """The stage after its last step, from the last checkpoint if the folder holds one; a repair stage as it was."""
    stage = trial.stage
    if stage.name == "repair":
        return trial
    log = train(
        stage, trial.team, trial.rows, trial.settings, folder, pad=PAD, save_share=save_share, progress=progress
    )
    return replace(trial, adapter=stage.stack.trained(), values=stage.values(), log=log)


def edited(trial: Trial) -> Trial:
    """A finished stage with its adapter as the team leaves it."""
    with trial.stage.isolated("edit"):
        return replace(trial, adapter=trial.team.edit(trial.stage, trial.adapter))


@cache
def aligned() -> Adapter:
    """What plain alignment adds to the base model: enough steps for a user's gradient to be at odds with it at times,
    which some defenses wait for."""
    with tempfile.TemporaryDirectory() as folder, own_random_states(1):
        world = TinyWorld(Path(folder))
        trial = begin(world, "align", DefenseTeam(), None, longest=ALIGNING, epochs=float(ALIGNING), lora_dropout=0.0)
        return trained(trial, world.new_folder()).adapter


def watched(trial: Trial) -> tuple[Trial, Seen]:
    """`trained`, for a team that is `Watched`, with what was seen."""
    stage, team = trial.stage, trial.team
    assert isinstance(team, Watched)
    seen, encode = team.seen, stage.encode
    assert encode is not None

    def encoding(examples: Sequence[Example]) -> list[Encoded]:
        seen.encoded.extend(examples)
        return encode(examples)

    def training(*args: Any) -> Adapter:
        seen.draws.paused = True
        try:
            return trial.nested(*args)
        finally:
            seen.draws.paused = False

    stage.encode, stage.nested = encoding, training
    seen.keep(stage)
    with team.optimizer(stage):
        return trained(trial, trial.nested.world.new_folder()), seen
