"""The attack that a check is about, the tiny world around it, and the results of its hooks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, Mix, Pools
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.stage import TrainingStage

from ..attack import Attack
from .findings import NotApplicable, Subject
from .observation import preserved_random_states, record_shared_draws
from .trials import aligned_path
from .world import PAD, RATIO, SAMPLES, TinyWorld


@dataclass
class EditedModel:
    """A model before and after an attack edits its weights."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    encoded: list[Example]
    """The rows that the attack encodes."""
    shared_draws: dict[str, str]
    """Hook that edits -> the process-wide random generator that it draws from; empty if it draws from none."""
    logits: Tensor


@dataclass
class AttackSubject(Subject):
    """An attack, and the world that it is checked in."""

    cls: type[Attack]
    world: TinyWorld
    _edits: dict[Any, EditedModel] = field(default_factory=dict)

    def plugin(self, seed: int = 0) -> Attack:
        """Create the attack with its parameters."""
        return self.cls(**self.params).seeded(seed)

    @property
    def input_mix(self) -> Mix:
        """The mix that the attack receives: with a ratio, unless the attack excludes the ratio attack."""
        return Mix(SAMPLES, None if {"ratio", "*"} & set(self.cls.excludes) else RATIO)

    def pools(self, plugin: Attack) -> Pools:
        """Return the rows that plug-ins may draw from, as the attack divides them."""
        rows = plugin.fresh().divide(self.world.row_pools)
        return Pools(rows.alignment, rows.paired, rows.benign, rows.attacker)

    def input_rows(self, plugin: Attack) -> list[Example]:
        """Draw the task rows and harmful rows that the attack requests."""
        return self.world.uploaded_rows(plugin.mix(self.input_mix), Attack(), pools=self.pools(plugin))

    def hook_results(self, plugin: Attack) -> dict[str, Any]:
        """Return the result of every hook around the user's training."""
        world, pools, mix = self.world, self.pools(plugin), plugin.mix(self.input_mix)
        rows = plugin.upload(world.uploaded_rows(mix, Attack(), pools=pools), pools)
        chosen = self.chosen_rows(plugin, rows)
        return {
            "divide": plugin.fresh().divide(world.row_pools),
            "mix": (mix.samples, mix.harmful),
            "upload": rows,
            "select": chosen,
            "filter": plugin.filter(list(chosen), world.judge),
            "settings": plugin.settings(world.settings(SAMPLES)),
            "evaluations": plugin.evaluations(list(world.questions)),
            **({"stress": self._stressed_weights(plugin)} if self.stresses else {}),
        }

    @property
    def stresses(self) -> bool:
        """The attack changes the weights of the finished model."""
        return self.cls.stress is not Attack.stress

    def _stressed_weights(self, plugin: Attack) -> str:
        """Return a hash of the weights after the hook `stress`."""
        model = self.stage(aligned=False).stack.base
        plugin.stress(model)
        weights = hashlib.sha256()
        for value in model.state_dict().values():
            weights.update(value.float().cpu().numpy().tobytes())
        return weights.hexdigest()

    def chosen_rows(self, plugin: Attack, rows: list[Example]) -> list[Example]:
        """Return the rows of `upload` after the hook `select`, which sees the aligned model."""
        if type(plugin).select is Attack.select:
            return rows
        stage = self.stage(aligned=True)
        stage.pools = self.pools(plugin)
        with stage.isolated("choose"):
            return plugin.select(stage, list(rows))

    def stage(self, dtype: str = "float32", *, aligned: bool) -> TrainingStage:
        """Create a user stage, on the aligned model or on a model without an adapter."""
        world = self.world

        def encode(examples: Sequence[Example]) -> list[Encoded]:
            return world.encode(examples, world.template, world.settings(SAMPLES).max_length)

        return TrainingStage(
            "finetune",
            LoraStack(world.base(dtype)),
            {},
            derive_seed(0, "finetune"),
            world.settings(SAMPLES),
            world.pools,
            below=(aligned_path(world),) if aligned else (),
            encode=encode,
            pad=PAD,
        )

    def edited_model(self, seed: int = 0, salt: int = 1, dtype: str = "float32") -> EditedModel:
        """Return the edited weights; `salt` seeds the process-wide random generators before the edit."""
        key = seed, salt, dtype
        if key not in self._edits:
            self._edits[key] = _edit_model(self, seed, salt, dtype)
        return self._edits[key]

    def require_edit(self) -> None:
        """Raise `NotApplicable` if the attack edits no weights."""
        if self.cls.trains and not self.stresses:
            raise NotApplicable("It trains and does not edit weights.")

    def require_training(self) -> None:
        """Raise `NotApplicable` if the attack edits weights instead of training."""
        if not self.cls.trains:
            raise NotApplicable("It edits weights instead of training.")


def _edit_model(subject: AttackSubject, seed: int, salt: int, dtype: str) -> EditedModel:
    stage, plugin = subject.stage(dtype, aligned=False), subject.plugin(seed)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    stage.pools = subject.pools(plugin)
    encoded: list[Example] = []
    encode = stage.encode

    def recording_encode(examples: Sequence[Example]) -> list[Encoded]:
        encoded.extend(examples)
        return encode(examples)

    stage.encode = recording_encode
    draws: dict[str, str] = {}
    with (
        preserved_random_states(salt),
        stage.isolated("ablate"),
        record_shared_draws(
            draws, "stress" if subject.stresses else "ablate", "torch's"
        ),  # `isolated` restores torch's
    ):
        if subject.stresses:
            plugin.stress(stage.stack.base)
        else:
            plugin.ablate(stage)
    stage.encode = encode
    with torch.no_grad():
        logits = stage.output(next(stage.batches(subject.world.user_rows[:4], 4))).logits
    after = {name: value.clone() for name, value in stage.model.state_dict().items()}
    return EditedModel(before, after, encoded, draws, logits)
