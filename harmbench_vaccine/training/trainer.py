"""The trainer of every stage: Hugging Face's `Trainer`, with the gradient computed by the defense's hooks.

`Trainer` supplies the optimizer, the schedule, clipping, checkpoints, devices and accumulation. The hooks decide how a
micro-batch becomes a gradient and what happens around a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.progress import SILENT, Advance, Progress
from harmbench_vaccine.core.seeds import derive_seed, random_stream
from harmbench_vaccine.core.signals import deferred_interruption, is_interrupted, stop_if_interrupted
from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.data.collate import Encoded, collate

from .adapters import Adapter
from .checkpoints import (
    check_space,
    finish_checkpoint,
    load_state,
    newest_checkpoint,
    remove_incomplete,
    save_state,
)
from .dropout import forget_masks
from .hooks import PlainFinetuning, StepHooks
from .stage import SeparateRun, TrainingStage, local_batch_rows

_READ_STEPS = {"cpu": 1, "cuda": 10}
"""Steps whose losses are read at once: reading one waits for the GPU."""
_TRAINABLE, _STATE = "trainable.safetensors", "defense.safetensors"


def train(
    stage: TrainingStage,
    hooks: StepHooks,
    rows: Sequence[Encoded],
    settings: TrainSettings,
    checkpoints: Path,
    *,
    pad: int,
    save_share: float = 0.1,
    title: str = "",
    progress: Progress = SILENT,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Run one training stage to its end, from the newest whole checkpoint in `checkpoints` if any.

    An interrupted stage that runs again ends, on a CPU, bit-equal to an uninterrupted one. Where signals are handled
    (`core.signals`), a signal ends the stage after the step that is running, with a checkpoint.

    Args:
        stage: The stage, with its trainable parameters. `train` sets its settings, rows and clock.
        hooks: The defense, or `PlainFinetuning()`.
        rows: The training rows as token ids.
        settings: The optimizer settings.
        checkpoints: Folder for checkpoints.
        pad: Id of the padding token.
        save_share: Share of the optimizer steps between two checkpoints.
        title: Title of the progress bar; the stage's name if empty.
        progress: Receives the progress bar.
        callbacks: Callbacks of trackers, which receive every entry of the log.

    Returns:
        The log. Each optimizer step has `step`, `loss` (mean over micro-batches), `grad_norm` (before clipping) and
        `learning_rate`.

    Raises:
        HbvError: The checkpoints do not fit on the disk, or the ranks end with different parameters.
    """
    stage.settings, stage.rows, stage.pad = settings, rows, pad
    batches = batch_order(len(rows), settings, stage.seed, stage.keeps_order)
    stage.steps = math.ceil(len(batches) / settings.accumulation)
    save_steps = max(1, math.ceil(stage.steps * save_share))
    if not batches:
        return []
    ranks = distributed.world_size()  # inside `from_rank0` it is 1
    checkpoint = distributed.from_rank0(lambda: newest_checkpoint(checkpoints, progress, ranks))
    if distributed.rank() == 0:
        check_space(checkpoints, stage.trainable.values(), (stage.steps - 1) // save_steps, stage.name)
        if checkpoint:
            progress.note(f"{title or stage.name}: resumed after step {Path(checkpoint).name.rpartition('-')[2]}")
    if checkpoint is None:
        with stage.isolated("before"):
            hooks.before(stage)
    with progress.bar(title or stage.name, stage.steps) as advance, _quiet_libraries():
        trainer = _StageTrainer(stage, hooks, rows, batches, settings, checkpoints, save_steps, pad)
        for callback in (_Clock(stage, hooks, advance), *callbacks):
            trainer.add_callback(callback)
        try:
            with deferred_interruption():
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if distributed.rank() == 0:
                remove_incomplete(checkpoints)
    distributed.check_equal(stage.trainable, f"the trained parameters of the {stage.name} stage")
    return [
        {key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def train_nested(
    outer: TrainingStage,
    run: SeparateRun,
    rows: Sequence[Encoded],
    settings: TrainSettings,
    checkpoints: Path,
    *,
    save_share: float = 0.1,
    title: str = "",
    progress: Progress = SILENT,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Adapter, list[dict[str, float]]]:
    """Run plain fine-tuning inside a stage, then restore the adapter of that stage.

    Args:
        outer: The stage that needs another model.
        run: The request.
        rows: Its rows as token ids.
        settings: The optimizer settings.
        checkpoints: Folder for checkpoints.
        save_share: As in `train`.
        title: As in `train`.
        progress: As in `train`.
        callbacks: As in `train`.

    Returns:
        The trained adapter and the log of `train`.
    """
    current = outer.stack.trained()
    below, origin = ((), None) if run.on_base else (outer.below, outer.start)
    stage = TrainingStage(outer.name, outer.stack, {}, derive_seed(outer.seed, run.purpose), below=below, start=origin)
    initial = run.start or (Adapter.load(origin) if origin else None)
    try:
        stage.trainable = outer.stack.train(below, settings, derive_seed(stage.seed, "adapter"), initial)
        log = train(
            stage,
            PlainFinetuning(),
            rows,
            settings,
            checkpoints,
            pad=outer.pad,
            save_share=save_share,
            title=title,
            progress=progress,
            callbacks=callbacks,
        )
        return outer.stack.trained(), log
    finally:
        outer.replace_adapter(current)


def batch_order(rows: int, settings: TrainSettings, seed: int, keeps_order: bool = False) -> list[list[int]]:
    """Return the row numbers of every micro-batch of a stage.

    Each epoch is a new shuffle, and its last batch may be shorter.

    Args:
        rows: Number of training rows.
        settings: Batch size and epochs.
        seed: Seed of the stage.
        keeps_order: Use the rows in their order instead.
    """
    random = random_stream(seed, "batches")
    count = settings.micro_batches(rows)
    order: list[list[int]] = []
    while len(order) < count:
        shuffled = range(rows) if keeps_order else random.sample(range(rows), rows)
        order += [list(shuffled[start : start + settings.batch]) for start in range(0, rows, settings.batch)]
    return order[:count]


class _Trainable(nn.Module):
    """The trainable parameters of a model under their names in it: all of the model that `Trainer` needs to see.

    Each step, it visits every module and every parameter several times, which takes a large model 10 ms.
    """

    def __init__(self, stage: TrainingStage) -> None:
        super().__init__()
        self._names = list(stage.trainable)
        self.values = nn.ParameterList(stage.trainable.values())

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return zip(self._names, self.values, strict=True)


class _StageTrainer(Trainer):
    """`Trainer`, with the gradient of the hooks and the checkpoints of a stage."""

    def __init__(
        self,
        stage: TrainingStage,
        hooks: StepHooks,
        rows: Sequence[Encoded],
        batches: list[list[int]],
        settings: TrainSettings,
        checkpoints: Path,
        save_steps: int,
        pad: int,
    ) -> None:
        self.stage, self.hooks, self.rows, self.batches, self.pad = stage, hooks, rows, batches, pad
        rank = distributed.rank()
        super().__init__(
            model=_Trainable(stage),
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
                optim="adamw_torch_fused",
                seed=derive_seed(stage.seed, "rank", rank) if rank else stage.seed,  # used by dropout only
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_steps=save_steps,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                report_to=[],
                use_cpu=device() == "cpu",
            ),
        )
        self.remove_callback(PrinterCallback)
        self._unread: list[tuple[int, float, Tensor]] = []
        """Step, learning rate, loss and gradient norm."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            range(len(self.rows)),  # type: ignore[arg-type]  # a range is a map-style data set
            batch_sampler=self.batches,
            collate_fn=lambda numbers: {
                **collate(local_batch_rows([self.rows[number] for number in numbers]), self.pad),
                "rows": torch.tensor(distributed.local_rows(numbers) or numbers[:1]),
            },
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:
        # Drop the token count of the step: the update rules take the mean of every micro-batch separately.
        samples, _ = super().get_batch_samples(*args, **kwargs)
        return samples, None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names: list[str] = super().get_decay_parameter_names(self.stage.model)  # it excludes norms by their class
        return names

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not self.stage.model.training:
            self.stage.model.train()
        gradient = self.hooks.gradient(self.stage, self._prepare_inputs(inputs))
        forget_masks()
        self.stage.micro += 1
        share = 1 / self.current_gradient_accumulation_steps
        for parameter, value in zip(self.stage.trainable.values(), gradient.values, strict=True):
            if value is not None:
                parameter.grad = share * value if parameter.grad is None else parameter.grad + share * value
        return gradient.loss * share

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        # `Trainer` reads the loss of every step here.
        if self.state.global_step > self._globalstep_last_logged:
            numbers = torch.stack([tr_loss, torch.as_tensor(grad_norm).to(tr_loss)])
            self._unread.append((self.state.global_step, kwargs["learning_rate"], numbers))
            self._globalstep_last_logged = self.state.global_step
            tr_loss.zero_()
        ends = self.control.should_save or self.state.global_step >= self.state.max_steps
        if self._unread and (ends or len(self._unread) >= _READ_STEPS[device()]):
            self._log_unread()
        self.control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _log_unread(self) -> None:
        """Log the steps whose numbers are still on the device."""
        latest = self.state.global_step
        numbers = torch.stack([values for _, _, values in self._unread]).tolist()
        for (step, rate, _), (loss, norm) in zip(self._unread, numbers, strict=True):
            self.state.global_step = step  # trackers read it
            self._total_loss_scalar += loss
            self.log({"loss": loss, "grad_norm": norm, "learning_rate": rate})
        self.state.global_step = latest
        self._unread.clear()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer assumes one pass a step; `Defense.cost` states the passes of a defense

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if distributed.rank() == 0:
            super()._save_checkpoint(model, trial)
        else:  # rank 0 stores everything except the random state of this rank's dropout
            self._save_rng_state(str(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(_rank_folder(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(_rank_folder(checkpoint) if checkpoint else None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().contiguous() for name, value in self.stage.trainable.items()}, folder / _TRAINABLE
        )
        save_state(self.hooks.state(), folder / _STATE, self.args.device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        stored = load_file(folder / _TRAINABLE)
        with torch.no_grad():
            for name, parameter in self.stage.trainable.items():
                parameter.copy_(stored[name])
        self.hooks.restore(load_state(folder / _STATE, self.args.device))


class _Clock(TrainerCallback):
    """Sets the clock of the stage, calls the hooks around a step, keeps only the newest checkpoint, and stops."""

    def __init__(self, stage: TrainingStage, hooks: StepHooks, advance: Advance) -> None:
        self.stage, self.hooks, self.advance = stage, hooks, advance
        self.stops = False
        """Whether the stage ends with the next checkpoint, on all ranks."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stage.step, self.stage.micro = state.global_step + 1, 0
        self.hooks.before_step(self.stage)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hooks.after_step(self.stage)
        if state.global_step >= state.max_steps:
            control.should_save = False  # the caller stores the finished adapter next
        elif is_interrupted():
            self.stops = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:  # of a step, not the summary at the end
            self.advance(1, f"loss {logs['loss']:.3g}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        distributed.barrier()
        if distributed.rank() == 0:
            finish_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self.stops:
            stop_if_interrupted()


def _rank_folder(checkpoint: str) -> str:
    """Return the folder of this rank's random state inside a checkpoint."""
    if not distributed.rank():
        return checkpoint
    folder = Path(checkpoint) / f"rank{distributed.rank()}"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide library warnings below errors, such as those about ranks that `core.distributed` manages itself."""
    loggers = [logging.getLogger(name) for name in ("accelerate", "transformers.training_args")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
