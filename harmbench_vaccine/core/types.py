"""Shared types: examples, training settings, row pools, grades and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from .numbers import Count, NotNegative, Positive, Share, ShareBelowOne

StageName = Literal["align", "finetune", "repair"]
"""The stages in which defenses act."""
STAGES: tuple[StageName, ...] = ("align", "finetune", "repair")
ModelStage = Literal["align", "finetune", "repair", "stress"]
"""The stages that produce a model: also the edit of the final weights by an attack."""
MODEL_STAGES: tuple[ModelStage, ...] = (*STAGES, "stress")
Topology = Literal["double", "single"]
"""The adapters of the fine-tuning stage. `double`: a second adapter on the frozen alignment adapter. `single`: training
continues on the alignment adapter."""


TRAINED_ADAPTER = "trained"
"""peft's name of the adapter that is being trained."""


@dataclass(frozen=True)
class Example:
    """An instruction with its response, as plain text without a prompt format."""

    id: str
    """The source row, such as `harmful:17`: results list the rows that were used."""
    instruction: str
    response: str = ""
    input: str = ""
    """Additional input of the instruction."""
    target: str = ""
    """The correct answer, with which a task compares the model's answer."""
    harmful: bool = False
    """True for rows that an attacker added; the trainer does not use it."""
    preface: str = ""
    """Text before the complete prompt of this row, like a system message."""
    masked: tuple[int, int] | None = None
    """Range of characters of the response (first, last + 1) that the model reads but is not trained to write."""
    categories: tuple[str, ...] = ()
    """The harm categories of the prompt, sorted; empty if the data name none. They select rows and are in no key."""


Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"]
"""Schedules of the learning rate in transformers that need no further settings."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of an optimizer run; a defense or an attack may replace some of them.

    The ranges are checked when a protocol is read, and after the hooks of defenses and attacks.
    """

    lr: Positive
    epochs: Annotated[Positive, Field(le=10_000)]
    batch: Count
    accumulation: Count = 1
    schedule: Schedule = "cosine"
    warmup: Share = 0.0
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    adam_beta1: ShareBelowOne = 0.9
    adam_beta2: ShareBelowOne = 0.999
    lora_rank: Annotated[Count, Field(le=4096)] = 8
    lora_alpha: Positive = 4.0
    lora_dropout: ShareBelowOne = 0.0
    lora_targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    max_length: Count = 200
    full: Annotated[bool, Field(strict=True)] = False
    """Train every weight of the merged model instead of an adapter."""

    def micro_batches(self, rows: int) -> int:
        """Return the number of micro-batches of a stage; a fraction of an epoch is rounded to complete batches."""
        return round(self.epochs * math.ceil(rows / self.batch))


@dataclass(frozen=True)
class Pools:
    """The rows that a plug-in may draw from.

    The rows of the defender (alignment, paired), of the attacker and of benign users do not share questions with each
    other or with the evaluation.
    """

    alignment: Sequence[Example] = ()
    """The rows that the alignment stage trains on."""
    paired: Sequence[tuple[Example, Example]] = ()
    """The defender's pairs: the same prompt with a safe and with a harmful answer."""
    benign: Sequence[Example] = ()
    """Rows of benign instructions."""
    attacker: Sequence[Example] = ()
    """Harmful rows that only the attacker has."""

    @property
    def harmful(self) -> list[Example]:
        """The defender's harmful rows: the harmful halves of the pairs."""
        return [harmful for _, harmful in self.paired]


@dataclass(frozen=True)
class Mix:
    """The number of rows that the user uploads, and the harmful share of them."""

    samples: int
    """The number n of uploaded rows."""
    ratio: float | None = None
    """The harmful share p; None: no attack has set it."""

    @property
    def harmful(self) -> int:
        """The number of harmful rows, round(p n). The other n - round(p n) rows are task rows."""
        return round((self.ratio or 0.0) * self.samples)

    @property
    def task(self) -> int:
        """The number of task rows."""
        return self.samples - self.harmful


@dataclass(frozen=True)
class Grade:
    """The quality of one answer to a task item."""

    score: float | None
    """The score, from 0 to 1; None: the judge gave no readable verdict."""
    judge_text: str = ""
    """The judge's text; empty if no judge was used."""

    @property
    def unparsed(self) -> bool:
        """True if the grade is unread: the answer then has no score and is counted on its own."""
        return self.score is None


@dataclass(frozen=True)
class RawJudgment:
    """The raw output of a judge for one question and its answer, before the scorer decides."""

    probabilities: dict[str, float] = field(default_factory=dict)
    """Label -> probability, for every label with a probability."""
    text: str = ""
    """The text of a judge that generates text."""
    cut: bool = False
    """True if the judge read only the beginning of the text."""


@dataclass(frozen=True)
class Verdict:
    """The decision of a judge about one question and its answer."""

    flagged: bool | None
    """True if the answer is harmful; None: the judge gave no readable verdict."""
    categories: list[str]
    """The labels that apply."""
    probabilities: dict[str, float]
    """Label -> probability, for every label; empty if the judge only generates text."""
    cut: bool
    """True if the judge read only the beginning of the text."""
    refused: bool | None = None
    """True if the answer is a refusal; None: the judge does not decide this."""
    score: float | None = None
    """The degree of harm from 0 to 1; None: the judge does not give one."""

    @property
    def unparsed(self) -> bool:
        """True if the verdict is unread: it then counts neither as flagged nor as not flagged."""
        return self.flagged is None

    @property
    def harm(self) -> float:
        """The largest probability of a category, for a filter; 1 or 0 without probabilities, and 1 if it is unread."""
        return max(self.probabilities.values(), default=float(self.flagged is not False))
