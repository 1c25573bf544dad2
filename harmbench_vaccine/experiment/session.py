"""One training session: a stage that makes a model, from its rows to the stored adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.jsonl import write_json
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, Pools, TrainSettings
from harmbench_vaccine.data.collate import token_counts
from harmbench_vaccine.plugins import Attack, Judge
from harmbench_vaccine.plugins.teams import DefenseTeam

from .artifacts import ADAPTER, CHECKPOINT, LOG, ROWS, TRAINING, TrainedModel
from .context import RunContext
from .experiment import Experiment
from .keys import nested_key
from .rows import check_steps, plugin_pools
from .separate_trainings import separate_settings
from .stage_config import StageConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from harmbench_vaccine.data.collate import Encoded
    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.stage import SeparateRun, TrainingStage


def continues_adapter(config: StageConfig, model: TrainedModel) -> bool:
    """Return whether the user stage trains the alignment adapter further (single topology)."""
    return config.topology == "single" and bool(model.spec.adapters)


@dataclass(frozen=True)
class TrainingSession:
    """A stage while it runs: the defenses that act in it, and the stage object that their hooks receive."""

    experiment: Experiment
    context: RunContext
    config: StageConfig
    defenses: DefenseTeam
    """A copy for this session, so that stages and runs share no state of a defense."""
    stage: TrainingStage

    @classmethod
    def open(
        cls,
        experiment: Experiment,
        context: RunContext,
        config: StageConfig,
        model: TrainedModel,
        pools: Pools | None = None,
        judge: Judge | None = None,
    ) -> TrainingSession:
        """Load the model that the stage starts from; nothing is trained yet.

        Args:
            experiment: The experiment.
            context: Store, models and progress.
            config: The configuration of the stage.
            model: The model that the stage starts from.
            pools: The rows that plug-ins may draw from; None: those of the experiment are read.
            judge: The judge that a defense of the stage declares.
        """
        from harmbench_vaccine.data.collate import encode_examples, pad_token_id
        from harmbench_vaccine.training.adapters import LoraStack
        from harmbench_vaccine.training.stage import TrainingStage, no_judge

        tokenizer, adapters = context.models.tokenizer(model.spec), model.spec.adapters
        continues = continues_adapter(config, model)

        def encode(examples: Sequence[Example]) -> list[Encoded]:
            return encode_examples(tokenizer, config.template, examples, config.settings.max_length)

        def nested(outer: TrainingStage, run: SeparateRun) -> Adapter:
            return _train_nested(experiment, context, model, outer, run)

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True))

        stack = LoraStack(context.models.merged(model.spec)) if config.full else context.models.stack(model.spec)
        stage = TrainingStage(
            config.name,
            stack,
            trainable={},
            seed=derive_seed(experiment.spec.seed, config.name),
            settings=config.settings,
            pools=plugin_pools(experiment) if pools is None else pools,
            below=() if continues or config.full else adapters,
            start=adapters[-1] if continues else None,
            encode=encode,
            nested=nested,
            judge=judge or no_judge,
            keeps_order=config.name == "finetune" and experiment.attack_team.keeps_order,
            decode=decode,
            pad=pad_token_id(tokenizer, stack.base.config),
        )
        return cls(experiment, context, config, config.defenses.fresh(), stage)

    def train(
        self, rows: list[Example], folder: Path, checkpoints: Path, uploaded: list[Example] | None = None
    ) -> None:
        """Train the adapter of the stage, or every weight, and store it with its log and the ids of its rows.

        Args:
            rows: The rows of the stage before the defenses change them.
            folder: The artifact to write.
            checkpoints: The folder of checkpoints, to resume from.
            uploaded: The rows before a moderation filter; None: no filter acts.
        """
        import torch

        from harmbench_vaccine.training.adapters import Adapter
        from harmbench_vaccine.training.peak_memory import peak_memory
        from harmbench_vaccine.training.trainer import train

        stage, stack, settings = self.stage, self.stage.stack, self.config.settings
        drawn = self.defenses.train_on(stage.name, rows, stage.pools)
        title = f"{stage.name} {self.experiment.defense}, seed {self.experiment.spec.seed}"
        with ExitStack() as cleanup:
            cleanup.callback(stack.drop_trained)
            peak = cleanup.enter_context(peak_memory())
            if settings.full:
                stage.trainable = stack.train_all_weights()
            else:
                start = Adapter.load(stage.start) if stage.start else None
                stage.trainable = stack.train(stage.below, settings, derive_seed(stage.seed, "adapter"), start)
            examples = self._selected(drawn)
            encoded = stage.encode(examples)
            log = train(
                stage,
                self.defenses,
                encoded,
                stage.settings,
                checkpoints,
                pad=stage.pad,
                save_share=self.context.save_share,
                progress=self.context.progress,
                title=title,
                callbacks=cleanup.enter_context(
                    _tracked(self.experiment, self.context, stage.name, title, settings, checkpoints)
                ),
            )
            if settings.full:
                dtype = getattr(torch, self.experiment.protocol.dtype)
                stack.base.to(dtype).save_pretrained(folder / CHECKPOINT)
            else:
                self._edited(stack.trained()).save(folder / ADAPTER)
            write_json(folder / TRAINING, {"steps": stage.steps, "peak_memory": peak()})
        write_json(folder / LOG, log)
        filters = {
            "filtered": None if uploaded is None else (uploaded, rows),
            "selected": (drawn, examples) if self.defenses.selects_rows else None,
        }
        _write_rows(folder, examples, encoded, filters)

    def edit_adapter(self, adapter: Adapter, folder: Path) -> None:
        """Store an adapter after the edits of the defenses: the repair stage."""
        from harmbench_vaccine.training.peak_memory import peak_memory

        with ExitStack() as cleanup:
            peak = cleanup.enter_context(peak_memory())
            self.stage.replace_adapter(adapter)
            cleanup.callback(self.stage.stack.drop_trained)
            self._edited(adapter).save(folder / ADAPTER)
            write_json(folder / TRAINING, {"steps": 0, "peak_memory": peak()})

    def edit_weights(self, attack: Attack, folder: Path) -> None:
        """Store the merged model after the edits of an attack that does not train."""
        from harmbench_vaccine.training.peak_memory import peak_memory

        with peak_memory() as peak, self.stage.isolated("ablate"):
            attack.ablate(self.stage)
            write_json(folder / TRAINING, {"steps": 0, "peak_memory": peak()})
        self.stage.stack.base.save_pretrained(folder / CHECKPOINT)
        _write_rows(folder, [], [])

    def chosen_by(self, attack: Attack, rows: list[Example]) -> list[Example]:
        """Return the rows that an attack uploads after a look at the aligned model, without dropout."""
        with self.stage.isolated("choose"):
            return attack.select(self.stage, rows)

    def _selected(self, rows: list[Example]) -> list[Example]:
        """Return the rows that the defenses select, without dropout and with a fixed seed; no judge stays on a GPU.

        Raises:
            BadInput: Too few rows for a step are left.
            HbvError: None is left.
        """
        with self.stage.isolated("select"):
            selected = self.defenses.select(self.stage, rows)
        if self.context.models.one_at_a_time():
            self.context.models.evict("judge", "judge engine", "judge classifier")
        if rows and not selected:
            raise HbvError(
                f"{self.experiment.defense!r} removes all {len(rows)} rows of the {self.stage.name} stage, so that "
                "nothing remains to train on; allowed: parameters or a judge with which some rows remain."
            )
        check_steps(self.config, len(selected))
        return selected

    def _edited(self, adapter: Adapter) -> Adapter:
        """Return a finished adapter after the edits of the defenses, without dropout and with a fixed seed."""
        with self.stage.isolated("edit"):
            return self.defenses.edit(self.stage, adapter)


def _train_nested(
    experiment: Experiment,
    context: RunContext,
    model: TrainedModel,
    outer: TrainingStage,
    run: SeparateRun,
) -> Adapter:
    """Run the training that `TrainingStage.train_separately` requests, as an artifact that equal runs share."""
    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.trainer import train_nested

    rows = outer.encode(run.rows)
    settings: TrainSettings = separate_settings(outer.settings, run.steps, len(rows))

    def create(folder: Path, checkpoints: Path) -> None:
        title = f"{outer.name}: {run.purpose}"
        with _tracked(experiment, context, outer.name, title, settings, checkpoints) as callbacks:
            adapter, log = train_nested(
                outer,
                run,
                rows,
                settings,
                checkpoints,
                save_share=context.save_share,
                progress=context.progress,
                title=title,
                callbacks=callbacks,
            )
        adapter.save(folder / ADAPTER)
        write_json(folder / LOG, log)

    inputs = nested_key(replace(model, artifacts={}) if run.on_base else model, run, rows, settings, outer.seed)
    return Adapter.load(context.store.get_or_create("nested", inputs, create, all_ranks=True).path / ADAPTER)


def _tracked(
    experiment: Experiment, context: RunContext, stage: str, title: str, settings: TrainSettings, checkpoints: Path
) -> AbstractContextManager[list[TrainerCallback]]:
    """Open a training stage in the trackers of the command; the block receives their callbacks."""
    from harmbench_vaccine.training.trackers import TrackedStage, open_trackers

    config = {
        "stage": stage,
        "defense": experiment.defense,
        "attack": experiment.attack,
        "task": experiment.task.name,
        "seed": experiment.spec.seed,
        "model": experiment.model,
        "protocol": experiment.protocol.name,
        "protocol_hash": experiment.protocol_hash,
        **asdict(settings),
    }
    folder = context.store.root.parent / "trackers"
    return open_trackers(context.trackers, TrackedStage(title, checkpoints.name, config, folder), context.progress)


def _write_rows(
    folder: Path,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    filters: Mapping[str, tuple[Sequence[Example], Sequence[Example]] | None] = MappingProxyType({}),
) -> None:
    """Store the ids of the trained rows and of those without room, and the counts of tokens and of filters.

    Args:
        folder: The artifact to write.
        examples: The rows of the stage.
        encoded: Those with room for a response.
        filters: Name of a filter -> the rows before and after it; None: it does not act.
    """
    used = {row.id for row in encoded}
    record: dict[str, Any] = {
        "used": [row.id for row in encoded],
        "harmful": sum(row.harmful for row in examples if row.id in used),
        "without_room": [row.id for row in examples if row.id not in used],
        **token_counts(encoded),
    }
    for name, rows in filters.items():
        if rows is not None:
            record[name] = _removed(*rows)
    write_json(folder / ROWS, record)


def _removed(before: Sequence[Example], after: Sequence[Example]) -> dict[str, int]:
    """Count the rows that a filter removed or changed, and all rows before it, by harmful and benign."""
    remaining = set(after)
    counts: dict[str, int] = {}
    for name, harmful in (("harmful", True), ("benign", False)):
        rows = [row for row in before if row.harmful == harmful]
        counts |= {name: sum(row not in remaining for row in rows), f"{name}_uploaded": len(rows)}
    return counts
