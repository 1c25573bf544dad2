"""Several plug-ins acting as one: each data hook runs in turn, and two that want the same gradient are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.seeds import random_stream
from harmbench_vaccine.core.types import Example, Mix, Pools, StageName, Topology, TrainSettings
from harmbench_vaccine.data.pools import draw_rows
from harmbench_vaccine.data.prompts import EvalSet

from .attack import Attack, Judge
from .base import Plugin
from .defense import Defense

if TYPE_CHECKING:
    from torch import Tensor

    from harmbench_vaccine.data.prompts import PromptTemplate
    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class DefenseTeam(Defense):
    """The defenses of one cell that act in one stage, in the order they were written. Without members it is plain SFT.

    State is kept apart by the defense's name. At most one of them may take the gradient, they must agree on the adapter
    topology, and none acts in a stage that another leaves out.
    """

    members: tuple[Defense, ...] = ()
    stage: StageName = "align"

    def model_post_init(self, context: Any) -> None:
        taking = [member for member in self.members if member.takes_gradient(self.stage)]
        demanding = {member.topology: member for member in self.members if member.topology}
        for what, deciding in {"gradient": taking, "adapter topology": list(demanding.values())}.items():
            if len(deciding) > 1:
                raise _conflict(what, deciding)
        if len(self.members) > 1 and not self.runs:
            idle = next(member for member in self.members if not member.trains)
            other = next(member for member in self.members if member is not idle)
            raise BadInput(
                f"{idle.name!r} and {other.name!r} cannot be combined: {idle.name!r} leaves out the stage of both."
            )

    @property
    def runs(self) -> bool:
        """False if the stage is left out."""
        return all(member.trains for member in self.members)

    @property
    def required_topology(self) -> Topology | None:
        """The adapter topology that a member needs."""
        return next((member.topology for member in self.members if member.topology), None)

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        for member in self.members:
            rows = member.train_on(stage, rows, pools)
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

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
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
                stage.replace_adapter(edited)  # the next one edits, and runs, what this one made
            adapter = edited
        return adapter

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        for member in self.members:
            sets = member.evaluations(sets)
        return sets

    def state(self) -> dict[str, Tensor]:
        return {f"{member.name}/{key}": value for member in self.members for key, value in member.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for member in self.members:
            own = f"{member.name}/"
            member.restore({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})


class AttackTeam(Attack):
    """The attacks of one cell, acting in the order they were written."""

    members: tuple[Attack, ...] = ()

    def model_post_init(self, context: Any) -> None:
        for one in self.members:
            for other in self.members:
                if other is not one and (other.name in one.excludes or "*" in one.excludes):
                    raise BadInput(
                        f"{one.name!r} and {other.name!r} cannot be combined: {one.name!r} acts "
                        f"{'alone' if '*' in one.excludes else 'without it'}."
                    )

    @property
    def editing_attack(self) -> Attack | None:
        """The one that edits weights in place of the user stage, if there is one."""
        return next((member for member in self.members if not member.trains), None)

    @property
    def filters_rows(self) -> bool:
        """Whether rows are moderated before they are trained on."""
        return any(type(member).filter is not Attack.filter for member in self.members)

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

    def filter(self, rows: list[Example], judge: Judge) -> list[Example]:
        for member in self.members:
            rows = member.filter(rows, judge)
        return rows

    def settings(self, settings: TrainSettings) -> TrainSettings:
        for member in self.members:
            settings = member.settings(settings)
        return settings

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        for member in self.members:
            sets = member.evaluations(sets)
        return sets


def _conflict(what: str, members: Sequence[Plugin]) -> BadInput:
    first, second = members[0].name, members[1].name
    return BadInput(f"{first!r} and {second!r} cannot be combined: both decide the {what} of the same stage.")


def upload_rows(
    mix: Mix, task: Sequence[Example], pools: Pools, attack: Attack, seed: int, in_order: bool = False
) -> list[Example]:
    """What the user uploads: n - round(p n) task rows and round(p n) harmful ones, drawn and shuffled by the seed;
    `in_order`, the first harmful ones and then the first task rows, which training shuffles.

    Raises:
        BadInput: more rows are asked for than there are.
    """
    benign = draw_rows(task, mix.task, "task rows", seed, "task rows", in_order=in_order)
    harmful = draw_rows(pools.attacker, mix.harmful, "harmful rows", seed, "harmful rows", in_order=in_order)
    uploaded = [*harmful, *benign]
    if not in_order:
        uploaded = [*benign, *harmful]
        random_stream(seed, "upload").shuffle(uploaded)
    return attack.upload(uploaded, pools)
