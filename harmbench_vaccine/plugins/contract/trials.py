"""Run one stage of a defense in the tiny world, in the same order as the pipeline."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from torch import Tensor

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, StageName, Topology, TrainSettings
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.stage import SeparateRun, TrainingStage
from harmbench_vaccine.training.trainer import train, train_nested

from ..teams import DefenseTeam
from .observation import Observation, ObservedTeam, preserved_random_states
from .world import LONGEST, PAD, TinyWorld

NESTED = 8
"""Maximum number of steps of a nested training run."""
ALIGNING = 48
"""Number of micro-batches that the aligned model is trained for."""


@dataclass(frozen=True)
class Trial:
    """One run of a stage, before or after training."""

    stage: TrainingStage
    team: DefenseTeam
    examples: list[Example]
    rows: list[Encoded]
    settings: TrainSettings
    nested: NestedTraining
    adapter: Adapter
    """The adapter before training; after training, the trained one."""
    start: list[Tensor]
    """The trainable parameters before training."""
    values: list[Tensor]
    """The trainable parameters after training."""
    log: list[dict[str, float]]


class NestedTraining:
    """The training runs that `TrainingStage.train_separately` requests; nothing is stored."""

    def __init__(self, world: TinyWorld) -> None:
        self.world = world
        self.micro_batches = 0
        """The sum over all runs."""
        self.requests: list[SeparateRun] = []
        """The requests, in their order."""

    def __call__(self, outer: TrainingStage, run: SeparateRun) -> Adapter:
        """Train with plain SFT, for a few steps only."""
        self.requests.append(run)
        rows, settings = outer.encode(run.rows), outer.settings
        per_epoch = math.ceil(len(rows) / settings.batch)
        micro_batches = settings.epochs * per_epoch if run.steps is None else run.steps * settings.accumulation
        settings = replace(settings, epochs=min(micro_batches, NESTED * settings.accumulation) / per_epoch)
        self.micro_batches += round(settings.epochs * per_epoch)
        with preserved_random_states():  # Trainer seeds them; only draws of the plug-in itself must be visible
            adapter, _ = train_nested(outer, run, rows, settings, self.world.new_folder(), save_share=1.0)
        return adapter


def begin_trial(
    world: TinyWorld,
    name: StageName,
    team: DefenseTeam,
    topology: Topology | None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    longest: int = LONGEST,
    **changes: float,
) -> Trial:
    """Prepare a stage up to its first hook around training.

    Args:
        world: The model, the rows and the judge.
        name: The stage.
        team: The defenses that act in it.
        topology: The adapter topology that they need.
        seed: The seed of the run.
        dtype: The precision of the base model.
        longest: The maximum number of micro-batches.
        changes: Overrides of the protocol's settings.
    """
    inputs = world.stage_rows(name)
    examples = [] if name == "repair" else team.train_on(name, list(inputs), world.pools)
    settings = team.settings(name, world.settings(len(inputs), **changes))
    prompt = team.template("train", world.template)

    def encode(examples: Sequence[Example]) -> list[Encoded]:
        return world.encode(examples, prompt, settings.max_length)

    single = topology == "single" and name == "finetune"
    nested = NestedTraining(world)
    stage = TrainingStage(
        name,
        LoraStack(world.base(dtype)),
        {},
        derive_seed(seed, name),
        settings,
        world.pools,
        below=() if single or name == "align" else (aligned_path(world),),
        start=aligned_path(world) if single else None,
        encode=encode,
        nested=nested,
        judge=world.judge,
        decode=lambda ids: " ".join(map(str, ids)),
        pad=PAD,
    )
    if name == "repair":
        stage.replace_adapter(world.random_adapter(3))
    else:
        start = Adapter.load(stage.start) if stage.start else None
        stage.trainable = stage.stack.train(stage.below, settings, derive_seed(stage.seed, "adapter"), start)
        with stage.isolated("select"):
            examples = team.select(stage, examples)
        settings = stage.settings
    rows = encode(examples)
    if rows:
        settings = replace(settings, epochs=min(settings.epochs, longest / math.ceil(len(rows) / settings.batch)))
    values = stage.values()
    return Trial(stage, team, examples, rows, settings, nested, stage.stack.trained(), values, values, [])


def train_trial(trial: Trial, folder: Path, *, save_share: float = 1.0, progress: Progress = SILENT) -> Trial:
    """Train a stage to its last step; a repair stage is returned unchanged.

    Args:
        trial: A prepared stage.
        folder: The folder of the checkpoints; training goes on from the last one.
        save_share: The proportion of steps between two checkpoints.
        progress: The progress bar.
    """
    stage = trial.stage
    if stage.name == "repair":
        return trial
    log = train(
        stage, trial.team, trial.rows, trial.settings, folder, pad=PAD, save_share=save_share, progress=progress
    )
    return replace(trial, adapter=stage.stack.trained(), values=stage.values(), log=log)


def edit_trial(trial: Trial) -> Trial:
    """Apply the `edit` hook of the team to the adapter of a finished stage."""
    with trial.stage.isolated("edit"):
        return replace(trial, adapter=trial.team.edit(trial.stage, trial.adapter))


@cache
def aligned_adapter() -> Adapter:
    """Train the adapter of the aligned model with plain SFT.

    It takes enough steps that the gradient of a user batch sometimes conflicts with the alignment: some defenses act
    only on such a conflict.
    """
    with tempfile.TemporaryDirectory() as folder, preserved_random_states(1):
        world = TinyWorld(Path(folder))
        team = DefenseTeam()
        trial = begin_trial(world, "align", team, None, longest=ALIGNING, epochs=float(ALIGNING), lora_dropout=0.0)
        return train_trial(trial, world.new_folder()).adapter


def aligned_path(world: TinyWorld) -> Path:
    """Return the folder of the aligned model's adapter in a world; the first call writes it."""
    path = world.folder / "aligned"
    if not path.exists():
        aligned_adapter().save(path)
    return path


def observe_trial(trial: Trial) -> tuple[Trial, Observation]:
    """Train a stage whose team is an `ObservedTeam`, and return the finished stage with the observation."""
    stage, team = trial.stage, trial.team
    assert isinstance(team, ObservedTeam)
    observation, encode = team.observation, stage.encode

    def recording_encode(examples: Sequence[Example]) -> list[Encoded]:
        observation.encoded.extend(examples)
        return encode(examples)

    def unrecorded_training(outer: TrainingStage, run: SeparateRun) -> Adapter:
        observation.draws.paused = True
        try:
            return trial.nested(outer, run)
        finally:
            observation.draws.paused = False

    stage.encode, stage.nested = recording_encode, unrecorded_training
    observation.copy_frozen(stage)
    with team.observe_optimizer(stage):
        return train_trial(trial, trial.nested.world.new_folder()), observation
