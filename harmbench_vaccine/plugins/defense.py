"""The defense interface: hooks that change plain supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harmbench_vaccine.core.types import Example, Pools, StageName, Topology, TrainSettings
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate

from .attack import Judge
from .base import Plugin
from .grid import TuningGrid

if TYPE_CHECKING:
    from torch import Tensor

    from harmbench_vaccine.inference.answer_models import AnswerModels
    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


HOOKS = (
    *("train_on", "guard", "select", "settings", "template", "before", "before_step", "batch", "takes_gradient"),
    *("gradient", "after_step", "edit", "first_tokens", "steering", "answer", "evaluations", "state", "restore"),
)
"""The methods by which a defense departs from plain supervised fine-tuning."""

ROW_KINDS = {
    "alignment rows": "pools.alignment",
    "harmful rows": "pools.harmful",
    "refusals": "the first rows of pools.paired",
    "paired safe and harmful rows": "pools.paired",
    "benign rows": "pools.benign",
}
"""The texts allowed in `Defense.data`, and the pool of each."""


TrainedPool = Literal["alignment", "harmful", "benign"]
"""The attributes of `Pools` whose rows a separate training may use."""


@dataclass(frozen=True)
class SeparateTraining:
    """A training inside a stage, by the arguments of `TrainingStage.train_separately`.

    Raises:
        ValueError: It has neither rows nor steps, so that its length is unknown.
    """

    purpose: str
    """Its name."""
    rows: TrainedPool | int | None
    """All rows of a pool, or the number of other rows; None: any number, which needs `steps`."""
    steps: int | None = None
    """Number of optimizer steps; None: the epochs of the stage's settings."""
    start: bool = False
    """True: it continues from an adapter."""
    on_base: bool = False
    """True: it trains the base model instead of the model that the stage started from."""

    def __post_init__(self) -> None:
        if self.rows is None and self.steps is None:
            raise ValueError(f"SeparateTraining {self.purpose!r} has neither rows nor steps")

    @property
    def uses_pool(self) -> bool:
        """True if it trains a new adapter on all rows of a pool, so that its rows and its start are known early."""
        return isinstance(self.rows, str) and not self.start

    def __str__(self) -> str:
        parts = ["chosen rows" if self.rows is None else f"{self.rows} rows"]
        parts += [] if self.steps is None else [f"{self.steps} steps"]
        parts += ["from an adapter"] if self.start else []
        parts += ["on the base model"] if self.on_base else []
        return f"{self.purpose!r} ({', '.join(parts)})"


class Defense(Plugin):
    """A defense. The default of every hook is plain supervised fine-tuning, so override only what your paper changes.

    One object serves one stage of one run. Values that it stores between steps are private attributes; `state` and
    `restore` save them in a checkpoint. Hooks are called only in the stages listed in `stages`.
    """

    kind: ClassVar[str] = "defense"
    stages: ClassVar[tuple[StageName, ...]] = ("align",)
    """The stages in which the defense acts; none for a defense that acts on answers only."""
    trains: ClassVar[bool] = True
    """False: the alignment stage is skipped (`none`)."""
    topology: ClassVar[Topology | None] = None
    """The adapter topology that the defense needs in the user stage; None: the topology of the protocol."""
    needs_adapter: ClassVar[bool] = False
    """True: the defense uses the model below the user's adapter, so it does not support full fine-tuning."""
    needs_alignment: ClassVar[bool] = False
    """True: the defense uses the update of the alignment stage, so it does not support a skipped alignment stage."""
    self_destructs: ClassVar[bool] = False
    """True: harmful training is meant to destroy the model, so that a run that collapses in a user stage with harmful
    rows has the verdict *self-destruct*."""
    draws_batch: ClassVar[bool] = False
    """True: `batch` draws other rows than the trainer's, so it runs before the `batch` hooks of other defenses."""
    ranks: ClassVar[bool] = False
    """True: `batch`, `gradient`, `before_step` and `after_step` support multi-GPU training, where every rank has a part
    of the rows (see `TrainingStage`). A defense that overrides none of these hooks supports it without this flag."""
    cost: ClassVar[str] = "1F 1B"
    """Forward and backward passes in each step, e.g. "2F 2B"."""
    once: ClassVar[str] = ""
    """Passes in addition to the steps, for the entire stage."""
    memory: ClassVar[str] = "none"
    """Memory in addition to that of SFT."""
    data: ClassVar[tuple[str, ...]] = ()
    """Rows that the defense needs in addition to the rows of its stage: keys of `ROW_KINDS`."""
    grid: ClassVar[TuningGrid | None] = None
    """The parameter that `hbv tune` chooses, with the spacing of its values; None: it has no parameter to tune. It does
    not change what the defense computes, so it is not part of the fingerprint."""

    def passes(self, stage: StageName) -> str:
        """Return the forward and backward passes in each step of a stage for these parameters.

        Override it if a parameter or the stage changes the number of passes; the default is `cost`.
        """
        return self.cost

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        """Return the trainings that the defense requests inside a stage, in their order, for these parameters.

        The cost estimate of a run counts them. The method does not change what the defense computes, so it is not part
        of the fingerprint.
        """
        return ()

    @property
    def is_plain(self) -> bool:
        """It overrides no hook: plain supervised fine-tuning, as `sft`."""
        return self.trains and all(getattr(type(self), hook) is getattr(Defense, hook) for hook in HOOKS)

    @property
    def changes_answers(self) -> bool:
        """It replaces generated answers."""
        return type(self).answer is not Defense.answer

    @property
    def steers(self) -> bool:
        """It changes hidden states while the model answers."""
        return type(self).steering is not Defense.steering

    @property
    def chooses_tokens(self) -> bool:
        """It chooses the first tokens of an answer."""
        return type(self).first_tokens is not Defense.first_tokens

    @property
    def changes_generation(self) -> bool:
        """It changes how the model generates an answer."""
        return self.steers or self.chooses_tokens

    @property
    def supports_ranks(self) -> bool:
        """True if the defense supports multi-GPU training, where every rank has a part of the rows."""
        has_step_hooks = any(
            getattr(type(self), hook) is not getattr(Defense, hook) for hook in ("before_step", "batch", "after_step")
        )
        return self.ranks or not (has_step_hooks or any(self.takes_gradient(stage) for stage in self.stages))

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the training rows of a stage.

        Args:
            stage: The training stage.
            rows: The training rows without the defense.
            pools: The rows from which a defense may draw.
        """
        return rows

    def guard(self) -> tuple[str, dict[str, Any]] | None:
        """Return the name and the parameters of the judge that the defense uses; None: it uses no judge.

        It must differ from the judges that score the run. At most one defense of a stage may use a judge.
        """
        return None

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        """Return the rows of `train_on` that remain after a look at them with the model or with `stage.judge`.

        It runs before the rows are encoded, without dropout and again when a stage resumes, so that the same rows must
        remain. The model has its trained adapter in its initial state. Rows that another defense of the stage adds are
        among `rows`.
        """
        return rows

    def settings(self, stage: StageName, settings: TrainSettings) -> TrainSettings:
        """Return the optimizer settings of a training stage."""
        return settings

    def template(self, use: Literal["train", "answer"], template: PromptTemplate) -> PromptTemplate:
        """Return the prompt format for training rows (`use` is "train") or for evaluation questions ("answer")."""
        return template

    def before(self, stage: TrainingStage) -> None:
        """Run once before the first step, without dropout: a pass over data or a copy of the parameters.

        It must not leave a gradient in the parameters. It does not run again when a stage resumes, so `state` must
        contain its results.
        """

    def before_step(self, stage: TrainingStage) -> None:
        """Run before the first micro-batch of every optimizer step; `stage.step` counts from 1."""

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        """Return the micro-batch that the step trains on: other rows, other labels, or weights (`weighted`).

        It runs before `gradient`, which receives the returned batch, also if another defense replaces the gradient.
        `DefenseTeam` calls it, not the trainer.
        """
        return batch

    def takes_gradient(self, stage: StageName) -> bool:
        """Return whether the defense replaces the gradient in a stage.

        Two defenses that both replace it cannot be combined.
        """
        return type(self).gradient is not Defense.gradient

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the loss and gradient of one micro-batch; the trainer averages over the micro-batches of a step."""
        return stage.gradient(batch)

    def after_step(self, stage: TrainingStage) -> None:
        """Run after every optimizer step."""

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        """Return the final adapter of a stage.

        Args:
            stage: The stage after its last step; `stage.model` runs with `adapter`, without dropout.
            adapter: The adapter that the stage trained; in the repair stage, the update that the user stage added to
                the aligned model.
        """
        return adapter

    def first_tokens(self, models: AnswerModels, prompts: list[list[int]]) -> list[list[int]]:
        """Return the first tokens of each answer; the model continues them, by any backend.

        At most one defense of a run may choose them.

        Args:
            models: The model that answers and the aligned model.
            prompts: The token ids of each prompt, with the tokens of the answer that an attack already wrote.
        """
        return [[] for _ in prompts]

    def steering(self, stage: TrainingStage) -> dict[int, Tensor]:
        """Return the vectors that are added to the residual stream at every position while a model answers.

        vLLM cannot add them, so that such a defense needs the backend transformers.

        Args:
            stage: The aligned model with the rows of the defender, without dropout.

        Returns:
            Decoder layer, from 0 -> the vector that is added to its output (width).
        """
        return {}

    def answer(self, pairs: Sequence[tuple[str, str]], judge: Judge) -> list[str]:
        """Return the answers that the user of the defended model receives.

        Args:
            pairs: Question and generated answer.
            judge: The judge of `guard`.
        """
        return [answer for _, answer in pairs]

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """Return the harmful evaluation sets of a run: add sets, or change their prompts."""
        return sets

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must contain."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load the tensors that `state` returned."""
