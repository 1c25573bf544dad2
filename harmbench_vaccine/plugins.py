"""Plug-ins: what a defense, an attack, a task and a scorer are.

A plug-in is one class in one file, and the file's name is its name. Its parameters are class fields made by `param`;
what it does is in the hooks that it overrides.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from .data.records import Example
from .errors import BadInput, too_few, unknown
from .progress import SILENT, Progress
from .seeds import stream
from .terms import EvaluationSet, Grade, Mix, Pools, Reading, StageName, Topology, TrainSettings, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from .data.prompts import PromptTemplate
    from .training.adapters import Adapter
    from .training.stage import Batch, Gradient, TrainingStage

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def param(
    default: Any,
    doc: str,
    *,
    source: str,
    main: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """A parameter of a plug-in: its default, one line on what it is, where the default comes from, its range.

    `main` marks the one that `name=VALUE` sets on the command line.
    """
    return Field(default, description=doc, ge=ge, gt=gt, le=le, json_schema_extra={"source": source, "main": main})


class Plugin(BaseModel):
    """What all plug-ins share: parameters that are checked, and a name."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    kind: ClassVar[str] = "plug-in"
    name: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    neutral: ClassVar[Mapping[str, Any] | None] = None
    """The parameters at which it changes nothing; None: it has no such setting."""

    _seed: int = PrivateAttr(0)
    _in_order: bool = PrivateAttr(False)

    def seeded(self, seed: int, in_order: bool = False) -> Self:
        """The same object, drawing by the run's seed; `in_order`: it takes the first rows, as papers' scripts do."""
        self._seed, self._in_order = seed, in_order
        return self

    def random(self, purpose: str) -> Random:
        """Random numbers of the run's seed for one purpose: draw with them, or every seed gets the first rows."""
        return stream(self._seed, self.name, purpose)

    def draw(self, purpose: str, rows: Sequence[T], count: int) -> list[T]:
        """`count` of the rows without replacement, in random order; with `rows=paper` the first ones.

        Raises:
            BadInput: there are fewer.
        """
        if count > len(rows):
            raise too_few(count, purpose, len(rows), by=self.name)
        if self._in_order:
            return list(rows[:count])
        return self.random(purpose).sample(list(rows), count)

    @classmethod
    def main_parameter(cls) -> str | None:
        """The parameter that `name=VALUE` sets, if there is one."""
        return next((key for key in cls.model_fields if cls._extra(key)["main"]), None)

    @classmethod
    def source_of(cls, key: str) -> str:
        """Where the default of parameter `key` comes from."""
        return str(cls._extra(key)["source"])

    @classmethod
    def range_of(cls, key: str) -> str:
        """The allowed values of parameter `key`, in words."""
        info = cls.model_fields[key]
        kind: Any = info.annotation
        none = type(None) in get_args(kind)
        if none:  # X | None
            kind = next(part for part in get_args(kind) if part is not type(None))
        words = {int: "a whole number", float: "a number", bool: "true | false", str: "a text"}
        bounds = [
            f"{sign} {limit}"
            for constraint in info.metadata
            for sign, limit in ((">=", getattr(constraint, "ge", None)), (">", getattr(constraint, "gt", None)),
                                ("<=", getattr(constraint, "le", None)))
            if limit is not None
        ]  # fmt: skip
        literal = " | ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        said = literal or " ".join([words.get(kind, str(kind)), " and ".join(bounds)]).strip()
        return f"{said}, or none" if none else said

    @classmethod
    def _extra(cls, key: str) -> dict[str, Any]:
        extra = cls.model_fields[key].json_schema_extra
        return {"source": "", "main": False, **(extra if isinstance(extra, dict) else {})}

    @classmethod
    def fingerprint(cls) -> str:
        """A hash of its code and of what it inherits: an edited plug-in makes another artifact, an edited comment or
        docstring does not."""
        own = [base for base in cls.__mro__ if issubclass(base, Plugin) and base.__module__ != __name__]
        files = dict.fromkeys(inspect.getfile(base) for base in own)
        return hashlib.sha256("".join(map(_code, files)).encode()).hexdigest()[:16]


def _code(file: str) -> str:
    """A source file without comments and docstrings."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not (isinstance(line, ast.Expr) and _text(line.value))]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@dataclass(frozen=True)
class Resolved:
    """A plug-in with every parameter settled, and where each value came from."""

    plugin: Plugin
    params: dict[str, Any]
    origins: dict[str, str]


def resolve(
    cls: type[Plugin], written: Mapping[str, Any], protocol: Mapping[str, Any] | None = None, protocol_name: str = ""
) -> Resolved:
    """What the user wrote wins over the protocol, and the protocol over the class default.

    Raises:
        BadInput: an unknown parameter, or a value outside its range.
    """
    protocol = protocol or {}
    for key in [*protocol, *written]:
        if key not in cls.model_fields:
            raise unknown("parameter", key, cls.model_fields, of=f"{cls.kind} {cls.name!r}")
    written = {  # the command line has no other way to write None
        key: None if value == "none" and type(None) in get_args(cls.model_fields[key].annotation) else value
        for key, value in written.items()
    }
    try:
        plugin = cls(**{**protocol, **written})
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        value = {**protocol, **written}.get(key)
        raise BadInput(
            f"{cls.kind} {cls.name!r}: {key}={value} is not allowed; it takes {cls.range_of(key)}."
        ) from error

    def origin(key: str) -> str:
        if key in written:
            return "written"
        if key in protocol:
            return f"protocol {protocol_name}"
        return f"default: {cls.source_of(key)}"

    return Resolved(plugin, plugin.model_dump(mode="json"), {key: origin(key) for key in cls.model_fields})


# ---------------------------------------------------------------------------------------------------------------------
# The four kinds


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
    def over_ranks(self) -> bool:
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

    def evaluations(self, sets: list[EvaluationSet]) -> list[EvaluationSet]:
        """The harmful evaluation sets of a cell; add to them, or ask them differently."""
        return sets

    def state(self) -> dict[str, Tensor]:
        """What must outlive an interruption."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""


class Attack(Plugin):
    """What the user who uploads data does to the provider's model: the default of every hook is a benign user."""

    kind: ClassVar[str] = "attack"
    trains: ClassVar[bool] = True
    """False: it edits the weights in place of the user stage."""
    edits_base: ClassVar[bool] = False
    """It makes another base model, not an adapter."""
    excludes: ClassVar[tuple[str, ...]] = ()
    """Attacks that it cannot act beside; `*` stands for all."""

    ratio_unless_said: ClassVar[float] = 0.0
    """The share of harmful rows where no attack beside it says another."""

    def mix(self, mix: Mix) -> Mix:
        """How many rows, and how many of them harmful."""
        return mix

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """The rows uploaded, given the draw of task rows and harmful rows."""
        return rows

    def filter(self, rows: list[Example], judge: Judge) -> list[Example]:
        """The uploaded rows that the provider lets through; `judge` is the protocol's."""
        return rows

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """The user's training settings."""
        return settings

    def ablate(self, stage: TrainingStage) -> None:
        """Changes the weights of `stage.model`, the aligned model with its adapters merged, in place: all that the
        user does if the attack does not train."""

    def evaluations(self, sets: list[EvaluationSet]) -> list[EvaluationSet]:
        """The harmful evaluation sets of a cell, for an attack that changes how a question is put."""
        return sets


Judge = Callable[[Sequence[tuple[str, str]]], list[Verdict]]
"""(question, answer) pairs -> a judge's verdicts."""


class Task(Plugin):
    """What the benign user wants: rows to train on, test questions, and when an answer is right."""

    kind: ClassVar[str] = "task"
    dataset: ClassVar[str]
    """The data set's name in the protocol."""
    test_dataset: ClassVar[str] = ""
    """Another one that the test items are of."""
    fields: ClassVar[tuple[str, ...]]
    """The fields that a row must have."""
    chance: ClassVar[float]
    """The accuracy of guessing, in percent."""
    max_new_tokens: ClassVar[int] = 200
    """How long an answer may be where the protocol sets no limit for the task."""
    train_split: ClassVar[str] = "train"
    test_split: ClassVar[str] = "test"
    few_items: ClassVar[bool] = False
    """Where there are fewer test items than the protocol asks for, all are asked."""
    measure: ClassVar[str] = "accuracy"
    """What an item's score is, where it is not right or wrong."""
    only_scores: ClassVar[tuple[str, ...]] = ()
    """Parameters that no training row depends on but by what a data set holds."""

    def check(self) -> None:
        """Raises `BadInput` where its parameters do not fit together, before any work is spent."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names of the data sets that it reads."""
        return (self.dataset, self.test_dataset) if self.test_dataset else (self.dataset,)

    def places(self) -> dict[str, str]:
        """Data set -> location, of those that it brings itself."""
        return {}

    def rows(self, read: Callable[[str, str], list[Example]]) -> tuple[list[Example], list[Example]]:
        """Its training rows and its test items; `read` gives the examples of (data set, split)."""
        return read(self.dataset, self.train_split), read(self.test_dataset or self.dataset, self.test_split)

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """A row of the data set as an instruction with its response and target."""
        raise NotImplementedError

    def strict(self, answer: str, target: str) -> bool:
        """Whether the answer is the target and nothing else."""
        return answer.strip().lower() == target.strip().lower()

    def flexible(self, answer: str, target: str) -> bool:
        """Whether the answer is right by the rule of the papers."""
        raise NotImplementedError

    def scores(self, rule: Literal["strict", "flexible"], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The score of each answered item from 0 to 1, by a rule; a row has `instruction`, `input`, `target` and
        `answer`."""
        return [float(getattr(self, rule)(row["answer"], row["target"])) for row in rows]

    @property
    def graded(self) -> bool:
        """Its items are scored by `grade`, once, and no rule scores them."""
        return False

    def grade(self, rows: Sequence[Mapping[str, Any]], progress: Progress = SILENT) -> list[Grade]:
        """What a judge makes of each answered item."""
        raise NotImplementedError


Form = Literal["classifier", "generative", "rule"]


class Scorer(Plugin):
    """A judge of harm. Reading is apart from deciding: what it reads off an answer is kept, so that another threshold
    decides again without running a model.

    A scorer that needs a model has the parameter `model`, a folder or hub id.
    """

    kind: ClassVar[str] = "scorer"
    form: ClassVar[Form] = "classifier"
    """How it comes to a reading."""
    licence: ClassVar[str] = ""
    """The licence of the model or of the prompt, where it limits what one may do with a score."""
    unverified: ClassVar[str] = ""
    """What of its interface was not checked against its source; empty: nothing."""
    compares_only: ClassVar[bool] = False
    """It is there to compare with: its figures are no harmful scores."""
    files: ClassVar[tuple[str, ...]] = ()
    """Parameters that name a file, whose content counts in place of its name."""
    deciding: ClassVar[tuple[str, ...]] = ("threshold",)
    """Parameters that only `decide` looks at."""
    indifferent: ClassVar[tuple[str, ...]] = ("batch",)
    """Parameters that change nothing."""

    _backend: str = PrivateAttr("transformers")

    @property
    def backend(self) -> str:
        """What runs its model: transformers or vllm."""
        return self._backend

    def on(self, backend: str) -> Self:
        """The same object, whose model is run by `backend`."""
        self._backend = backend
        return self

    def check(self) -> None:
        """Raises `BadInput` where its parameters do not fit together, before any work is spent."""

    def read(self, pairs: Sequence[tuple[str, str]], progress: Progress = SILENT) -> list[Reading]:
        """What the judge says of each (question, answer), in their order."""
        raise NotImplementedError

    def decide(self, reading: Reading) -> Verdict:
        """The verdict that follows from a reading: flagged where any probability is above `threshold`."""
        named = reading.probabilities
        if not named or not all(math.isfinite(value) for value in named.values()):
            return Verdict(False, [], {}, reading.cut, unparsed=True)
        raised = [label for label, value in named.items() if value > self.threshold]  # type: ignore[attr-defined]
        return Verdict(bool(raised), raised, named, reading.cut)

    def judge(self, pairs: Sequence[tuple[str, str]], progress: Progress = SILENT) -> list[Verdict]:
        """A verdict for each (question, answer)."""
        return [self.decide(reading) for reading in self.read(pairs, progress)]
