"""Defenses: the hooks by which one departs from plain supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from harmbench_vaccine.core.types import Example, Pools, StageName, Topology, TrainSettings
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate

from .base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class Defense(Plugin):
    """A defense: the default of every hook is plain supervised fine-tuning, so override what your paper changes.

    One object serves one stage of one cell; what it remembers between steps lives in private attributes, and
    `state`/`restore` carry it over an interruption. Hooks are called only in the stages that the class names.
    """

    kind: ClassVar[str] = "defense"
    stages: ClassVar[tuple[StageName, ...]] = ("align",)
    """When it acts."""
    trains: ClassVar[bool] = True
    """False: the alignment stage is left out (`none`)."""
    topology: ClassVar[Topology | None] = None
    """The adapter topology that it needs in the user stage; None: whatever the protocol says."""
    needs_adapter: ClassVar[bool] = False
    """It refers to the model below the user's adapter, so it cannot act where every weight is trained."""
    needs_alignment: ClassVar[bool] = False
    """It refers to what alignment added to the base model, so it cannot act where the alignment stage is left out."""
    edits_base: ClassVar[bool] = False
    """It changes weights of the base model. No hook of a defense does, so far."""
    ranks: ClassVar[bool] = False
    """Its own gradient, and its work around steps, are right where every rank sees a part of the rows (`TrainingStage`
    says how); if it has neither, that goes without saying."""
    cost: ClassVar[str] = "1F 1B"
    """Forward and backward passes a step."""
    once: ClassVar[str] = ""
    """Passes besides the steps, over the whole stage."""
    memory: ClassVar[str] = "none"
    """What it keeps in memory besides what SFT keeps."""
    data: ClassVar[tuple[str, ...]] = ()
    """Rows that it needs besides those of its stage."""

    def passes(self) -> str:
        """`cost` at its parameters: override it where a parameter changes how often the model runs."""
        return self.cost

    @property
    def supports_ranks(self) -> bool:
        """Whether it is right where every rank sees a part of the rows."""
        own = any(getattr(type(self), hook) is not getattr(Defense, hook) for hook in ("before_step", "after_step"))
        return self.ranks or not (own or any(self.takes_gradient(stage) for stage in self.stages))

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """The rows that a training stage learns from, given what it would learn from without the defense."""
        return rows

    def settings(self, stage: StageName, settings: TrainSettings) -> TrainSettings:
        """The optimizer's settings of a training stage."""
        return settings

    def template(self, use: Literal["train", "answer"], template: PromptTemplate) -> PromptTemplate:
        """The prompt that rows are trained with, or questions asked with."""
        return template

    def before(self, stage: TrainingStage) -> None:
        """Once, before the first step, without dropout: a pass over data, a snapshot. It must leave no gradient behind.

        A resumed stage does not come here again: what it found belongs into `state`.
        """

    def before_step(self, stage: TrainingStage) -> None:
        """Before the first micro-batch of every optimizer step; `stage.step` counts from 1."""

    def takes_gradient(self, stage: StageName) -> bool:
        """Whether `gradient` is its own in that stage: two defenses that both take it cannot act together."""
        return type(self).gradient is not Defense.gradient

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """The loss and gradient of one micro-batch, which the trainer averages over the micro-batches of a step."""
        return stage.gradient(batch)

    def after_step(self, stage: TrainingStage) -> None:
        """After every optimizer step."""

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """A finished adapter, changed: the one that a stage trained, after its last step; in the repair stage, what
        the user stage added to the aligned model. `stage.model` runs with it, without dropout."""
        return adapter

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """The harmful evaluation sets of a cell; add to them, or ask them differently."""
        return sets

    def state(self) -> dict[str, Tensor]:
        """What must outlive an interruption."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
