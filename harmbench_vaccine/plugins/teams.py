"""Teams: several plug-ins as one. Data hooks run one after the other; two plug-ins cannot replace the same gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.seeds import random_stream
from harmbench_vaccine.core.types import Example, Mix, Pools, StageName, Topology, TrainSettings
from harmbench_vaccine.data.pools import RowPools, draw_rows
from harmbench_vaccine.data.prompts import EvalSet

from .attack import Attack, Judge
from .base import Plugin
from .defense import Defense

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from harmbench_vaccine.data.prompts import PromptTemplate
    from harmbench_vaccine.inference.answer_models import AnswerModels
    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class DefenseTeam(Defense):
    """The defenses of a run that act in one stage, in the order of the command line. Without members it is plain SFT.

    The state of each defense has its name as a prefix. At most one member replaces the gradient, all members need the
    same adapter topology, and no member acts in a stage that another one skips.
    """

    members: tuple[Defense, ...] = ()
    stage: StageName = "align"

    def model_post_init(self, context: Any) -> None:
        gradients = [member for member in self.members if member.takes_gradient(self.stage)]
        topologies = {member.topology: member for member in self.members if member.topology}
        conflicts = {
            "gradient of the same stage": gradients,
            "adapter topology of the same stage": list(topologies.values()),
            "judge of the same stage": [member for member in self.members if member.guard()],
            "first tokens of an answer": [member for member in self.members if member.chooses_tokens],
        }
        for subject, members in conflicts.items():
            if len(members) > 1:
                raise _conflict(subject, members)
        if len(self.members) > 1 and not self.runs:
            skipping = next(member for member in self.members if not member.trains)
            acting = next(member for member in self.members if member is not skipping)
            raise BadInput(
                f"{skipping.name!r} and {acting.name!r} cannot be combined: {skipping.name!r} skips the stage of both."
            )

    @property
    def runs(self) -> bool:
        """False if the stage is skipped."""
        return all(member.trains for member in self.members)

    @property
    def required_topology(self) -> Topology | None:
        """The adapter topology that a member needs."""
        return next((member.topology for member in self.members if member.topology), None)

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        for member in self.members:
            rows = member.train_on(stage, rows, pools)
        return rows

    def guard(self) -> tuple[str, dict[str, Any]] | None:
        return next((guard for member in self.members if (guard := member.guard())), None)

    @property
    def selects_rows(self) -> bool:
        """True if a member looks at the rows before it trains on them."""
        return any(type(member).select is not Defense.select for member in self.members)

    @property
    def changes_answers(self) -> bool:
        return any(member.changes_answers for member in self.members)

    @property
    def steers(self) -> bool:
        return any(member.steers for member in self.members)

    @property
    def chooses_tokens(self) -> bool:
        return any(member.chooses_tokens for member in self.members)

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        for member in self.members:
            rows = member.select(stage, rows)
        return rows

    def settings(self, stage: StageName, settings: TrainSettings) -> TrainSettings:
        for member in self.members:
            settings = member.settings(stage, settings)
        return settings

    def template(self, use: Literal["train", "answer"], template: PromptTemplate) -> PromptTemplate:
        for member in self.members:
            template = member.template(use, template)
        return template

    def before(self, stage: TrainingStage) -> None:
        for member in self.members:
            member.before(stage)

    def before_step(self, stage: TrainingStage) -> None:
        for member in self.members:
            member.before_step(stage)

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        for member in sorted(self.members, key=lambda member: not member.draws_batch):
            batch = member.batch(stage, batch)
        return batch

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        batch = self.batch(stage, batch)
        for member in self.members:
            if member.takes_gradient(self.stage):
                return member.gradient(stage, batch)
        return stage.gradient(batch)

    def after_step(self, stage: TrainingStage) -> None:
        for member in self.members:
            member.after_step(stage)

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        for member in self.members:
            edited = member.edit(stage, adapter)
            if edited is not adapter:
                stage.replace_adapter(edited)  # the next member edits and runs this adapter
            adapter = edited
        return adapter

    def first_tokens(self, models: AnswerModels, prompts: list[list[int]]) -> list[list[int]]:
        choosing = [member for member in self.members if member.chooses_tokens]
        return choosing[0].first_tokens(models, prompts) if choosing else super().first_tokens(models, prompts)

    def steering(self, stage: TrainingStage) -> dict[int, Tensor]:
        vectors: dict[int, Tensor] = {}
        for member in self.members:
            for layer, vector in member.steering(stage).items():
                vectors[layer] = vectors[layer] + vector if layer in vectors else vector
        return vectors

    def answer(self, pairs: Sequence[tuple[str, str]], judge: Judge) -> list[str]:
        answers = [answer for _, answer in pairs]
        for member in self.members:
            answers = member.answer(
                [(question, text) for (question, _), text in zip(pairs, answers, strict=True)], judge
            )
        return answers

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        for member in self.members:
            sets = member.evaluations(sets)
        return sets

    def state(self) -> dict[str, Tensor]:
        return {f"{member.name}/{key}": value for member in self.members for key, value in member.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for member in self.members:
            prefix = f"{member.name}/"
            tensors = {key: value for key, value in state.items() if key.startswith(prefix)}
            member.restore({key.removeprefix(prefix): value for key, value in tensors.items()})


class AttackTeam(Attack):
    """The attacks of a run, in the order of the command line."""

    members: tuple[Attack, ...] = ()

    def model_post_init(self, context: Any) -> None:
        for first in self.members:
            for second in self.members:
                if second is not first and (second.name in first.excludes or "*" in first.excludes):
                    excluded = "every other attack" if "*" in first.excludes else "it"
                    raise BadInput(
                        f"{first.name!r} and {second.name!r} cannot be combined: {first.name!r} excludes {excluded}."
                    )

    @property
    def editing_attack(self) -> Attack | None:
        """The attack that edits weights instead of training, if any."""
        return next((member for member in self.members if not member.trains), None)

    @property
    def keeps_order(self) -> bool:
        return any(member.keeps_order for member in self.members)

    @property
    def filters_rows(self) -> bool:
        """True if the provider moderates rows before training."""
        return any(type(member).filter is not Attack.filter for member in self.members)

    def divide(self, rows: RowPools) -> RowPools:
        for member in self.members:
            rows = member.divide(rows)
        return rows

    def mix(self, mix: Mix) -> Mix:
        for member in self.members:
            mix = member.mix(mix)
        if mix.ratio is None:
            mix = replace(mix, ratio=max((member.default_ratio for member in self.members), default=0.0))
        return mix

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        for member in self.members:
            rows = member.upload(rows, pools)
        return rows

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        for member in self.members:
            rows = member.select(stage, rows)
        return rows

    def filter(self, rows: list[Example], judge: Judge) -> list[Example]:
        for member in self.members:
            rows = member.filter(rows, judge)
        return rows

    def settings(self, settings: TrainSettings) -> TrainSettings:
        for member in self.members:
            settings = member.settings(settings)
        return settings

    @property
    def stresses_weights(self) -> bool:
        return any(member.stresses_weights for member in self.members)

    def stress(self, model: PreTrainedModel) -> None:
        for member in self.members:
            member.stress(model)

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        for member in reversed(self.members):  # text around a prompt that is added first is outermost
            sets = member.evaluations(sets)
        return sets


def _conflict(subject: str, members: Sequence[Plugin]) -> BadInput:
    first, second = members[0].name, members[1].name
    return BadInput(f"{first!r} and {second!r} cannot be combined: both set the {subject}.")


def upload_rows(
    mix: Mix, task: Sequence[Example], pools: Pools, attack: Attack, seed: int, in_order: bool = False
) -> list[Example]:
    """Draw the rows that the user uploads: n - round(p n) task rows and round(p n) harmful rows.

    Args:
        mix: The number of rows n and the proportion p of harmful rows.
        task: The task rows to draw from.
        pools: The harmful rows to draw from, and the rows that the attack may draw.
        attack: The attack, which may change the rows.
        seed: The seed of the draws and of the order.
        in_order: True for the first harmful rows and then the first task rows, without a draw; training shuffles them.

    Raises:
        BadInput: The mix requests more rows than are available.
    """
    fix = "lower `samples` of the attack, as in --attack ratio=0.1,samples=N"
    benign = draw_rows(task, mix.task, "task rows", seed, "task rows", in_order=in_order, fix=fix)
    harmful = draw_rows(pools.attacker, mix.harmful, "harmful rows", seed, "harmful rows", in_order=in_order, fix=fix)
    uploaded = [*harmful, *benign]
    if not in_order:
        uploaded = [*benign, *harmful]
        random_stream(seed, "upload").shuffle(uploaded)
    return attack.upload(uploaded, pools)
