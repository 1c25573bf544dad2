"""The one trainer of every stage and defense: Hugging Face's Trainer, with the gradient left to the defense.

Trainer brings the optimizer, the schedule, clipping, checkpoints, devices and accumulation; a defense decides which
rows a stage sees, how a micro-batch becomes a gradient, and what happens around a step.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.seeds import derive_seed, random_stream
from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.data.collate import Encoded, collate
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.teams import DefenseTeam

from .adapters import Adapter
from .stage import TrainingStage, local_batch_rows

_TRAINABLE, _STATE, _WHOLE = "trainable.safetensors", "defense.safetensors", "whole"


def train(
    stage: TrainingStage,
    defense: Defense,
    rows: Sequence[Encoded],
    settings: TrainSettings,
    checkpoints: Path,
    *,
    pad: int,
    save_share: float = 0.1,
    title: str = "",
    progress: Progress = SILENT,
) -> list[dict[str, float]]:
    """Runs one training stage to its end, from its last checkpoint if `checkpoints` holds one.

    Returns the log: for every optimizer step its `step`, `loss` (mean over micro-batches), `grad_norm` (before
    clipping) and `learning_rate`. An interrupted stage that is run again ends, on a CPU, bit-equal to an
    uninterrupted one.
    """
    stage.settings, stage.rows, stage.pad = settings, rows, pad
    batches = batch_order(len(rows), settings, stage.seed)
    stage.steps = math.ceil(len(batches) / settings.accumulation)
    every = max(1, math.ceil(stage.steps * save_share))
    if not batches:
        return []
    resume = distributed.from_rank0(lambda: _last_whole(checkpoints))
    if resume is None:
        with stage.isolated("before"):
            defense.before(stage)
    with progress.bar(title or stage.name, stage.steps) as advance:
        trainer = _StageTrainer(stage, defense, rows, batches, settings, checkpoints, every, pad)
        trainer.add_callback(_Clock(stage, defense, advance))
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            if distributed.rank() == 0:
                _remove_broken(checkpoints)
    distributed.check_equal(stage.trainable, f"what the {stage.name} stage trained")
    return [
        {key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def train_nested(
    outer: TrainingStage,
    purpose: str,
    rows: Sequence[Encoded],
    settings: TrainSettings,
    start: Adapter | None,
    checkpoints: Path,
    **options: Any,
) -> tuple[Adapter, list[dict[str, float]]]:
    """Plain fine-tuning inside a stage, whose own adapter is put back afterwards: of `start`, or of what the stage
    started from. `options` are those of `train`. Returns the adapter and the log."""
    current = outer.stack.trained()
    stage = TrainingStage(
        outer.name, outer.stack, {}, derive_seed(outer.seed, purpose), below=outer.below, start=outer.start
    )
    own = start or (Adapter.load(outer.start) if outer.start else None)
    try:
        stage.trainable = outer.stack.train(outer.below, settings, derive_seed(stage.seed, "adapter"), own)
        log = train(stage, DefenseTeam(), rows, settings, checkpoints, pad=outer.pad, **options)
        return outer.stack.trained(), log
    finally:
        outer.replace_adapter(current)


def batch_order(rows: int, settings: TrainSettings, seed: int) -> list[list[int]]:
    """The row numbers of every micro-batch of the whole stage: each epoch a fresh shuffle, the last batch of an epoch
    as short as it comes; a share of an epoch at the end is cut to whole batches."""
    random = random_stream(seed, "batches")
    per_epoch = math.ceil(rows / settings.batch)
    wanted = round(settings.epochs * per_epoch)
    order: list[list[int]] = []
    while len(order) < wanted:
        shuffled = random.sample(range(rows), rows)
        order += [shuffled[start : start + settings.batch] for start in range(0, rows, settings.batch)]
    return order[:wanted]


class _StageTrainer(Trainer):
    def __init__(
        self,
        stage: TrainingStage,
        defense: Defense,
        rows: Sequence[Encoded],
        batches: list[list[int]],
        settings: TrainSettings,
        checkpoints: Path,
        every: int,
        pad: int,
    ) -> None:
        self.stage, self.defense, self.rows, self.batches, self.pad = stage, defense, rows, batches, pad
        super().__init__(
            model=stage.model,
            args=TrainingArguments(
                output_dir=str(checkpoints),
                max_steps=stage.steps,
                per_device_train_batch_size=settings.batch,
                gradient_accumulation_steps=settings.accumulation,
                learning_rate=settings.lr,
                lr_scheduler_type=settings.schedule,
                warmup_steps=round(settings.warmup * stage.steps),
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                optim="adamw_torch",
                seed=derive_seed(stage.seed, "rank", distributed.rank())
                if distributed.rank()
                else stage.seed,  # of dropout alone
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_steps=every,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
            ),
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            range(len(self.rows)),  # type: ignore[arg-type]  # a sequence is a map-style data set
            batch_sampler=self.batches,
            collate_fn=lambda numbers: {
                **collate(local_batch_rows([self.rows[number] for number in numbers]), self.pad),
                "rows": torch.tensor(distributed.local_rows(numbers) or numbers[:1]),
            },
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:
        # Without a token count of the whole step: every micro-batch is a mean of its own, as the update rules have it.
        samples, _ = super().get_batch_samples(*args, **kwargs)
        return samples, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        gradient = self.defense.gradient(self.stage, self._prepare_inputs(inputs))
        self.stage.micro += 1
        share = 1 / self.current_gradient_accumulation_steps
        for parameter, value in zip(self.stage.trainable.values(), gradient.values, strict=True):
            if value is not None:
                parameter.grad = share * value if parameter.grad is None else parameter.grad + share * value
        return gradient.loss * share

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate knows one pass a step; `cost` tells the passes of a defense

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if distributed.rank() == 0:
            super()._save_checkpoint(model, trial)
        else:  # all but the dropout of its rows is rank 0's
            self._save_rng_state(str(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(_own(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(_own(checkpoint) if checkpoint else None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().contiguous() for name, value in self.stage.trainable.items()}, folder / _TRAINABLE
        )
        save_file(self.defense.state(), folder / _STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        stored = load_file(folder / _TRAINABLE)
        with torch.no_grad():
            for name, parameter in self.stage.trainable.items():
                parameter.copy_(stored[name])
        self.defense.restore(load_file(folder / _STATE, device=str(self.args.device)))


class _Clock(TrainerCallback):
    """Keeps the stage's clock, calls the hooks around a step, and keeps one whole checkpoint."""

    def __init__(self, stage: TrainingStage, defense: Defense, advance: Any) -> None:
        self.stage, self.defense, self.advance = stage, defense, advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stage.step, self.stage.micro = state.global_step + 1, 0
        self.defense.before_step(self.stage)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.defense.after_step(self.stage)
        self.advance(1)
        if state.global_step >= state.max_steps:
            control.should_save = False  # the stage's artifact is about to be written

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        distributed.barrier()
        if distributed.rank():
            return
        new = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (new / _WHOLE).touch()
        for old in Path(args.output_dir).glob("checkpoint-*"):
            if old != new:
                shutil.rmtree(old)


def _own(checkpoint: str) -> str:
    """Where a rank keeps what is its own in a checkpoint."""
    if not distributed.rank():
        return checkpoint
    folder = Path(checkpoint) / f"rank{distributed.rank()}"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _last_whole(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end, after those that were not are gone."""
    _remove_broken(checkpoints)
    whole = [path.parent for path in checkpoints.glob(f"checkpoint-*/{_WHOLE}")]
    newest = max(whole, key=lambda path: int(re.sub(r"\D", "", path.name)), default=None)
    return str(newest) if newest else None


def _remove_broken(checkpoints: Path) -> None:
    """Removes checkpoints that were not written to their end: of a killed process, or on a full disk."""
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / _WHOLE).exists():
            shutil.rmtree(path, ignore_errors=True)


for _library in ("accelerate", "transformers.training_args"):  # the latter wonders about ranks that it is not told of
    logging.getLogger(_library).setLevel(logging.ERROR)
