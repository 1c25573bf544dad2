"""The words that plug-ins and stages speak in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

StageName = Literal["align", "finetune", "repair"]
"""The stages that make a model."""
STAGES: tuple[StageName, ...] = ("align", "finetune", "repair")
Topology = Literal["double", "single"]
"""In the user stage: a second adapter on the frozen alignment adapter, or the alignment adapter trained on."""


@dataclass(frozen=True)
class Example:
    """An instruction with its response, as plain text: prompt formats are applied later.

    `id` names the source row (`harmful:17`), so that a result can say what was drawn; `target` is what a task
    compares an answer with; `harmful` marks rows that an attacker mixed in (never shown to the trainer); `preface`
    is text that stands before the whole prompt of this row, as a system message would.
    """

    id: str
    instruction: str
    response: str = ""
    input: str = ""
    target: str = ""
    harmful: bool = False
    preface: str = ""


@dataclass(frozen=True)
class TrainSettings:
    """Everything that an optimizer run is told; a defense or an attack may replace what its paper changes."""

    lr: float
    epochs: float
    batch: int
    accumulation: int = 1
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lora_rank: int = 8
    lora_alpha: float = 4.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    max_length: int = 200
    full: bool = False
    """Every weight of the merged model is trained in place of an adapter."""


@dataclass(frozen=True)
class Pools:
    """What a plug-in may draw from. The defender's rows (alignment, paired), the attacker's and the benign ones share
    no question with one another, nor with the evaluation."""

    alignment: Sequence[Example] = ()
    """The rows that the alignment stage trains on."""
    paired: Sequence[tuple[Example, Example]] = ()
    """The defender's pairs: the same prompt with a safe and with a harmful answer."""
    benign: Sequence[Example] = ()
    attacker: Sequence[Example] = ()
    """Harmful rows that only the attacker has."""

    @property
    def harmful(self) -> list[Example]:
        """The defender's harmful rows: the harmful halves of the pairs."""
        return [harmful for _, harmful in self.paired]


@dataclass(frozen=True)
class Mix:
    """How many rows the user uploads and what share of them is harmful."""

    samples: int
    ratio: float | None = None
    """None: no attack has asked for harmful rows, nor for none."""

    @property
    def harmful(self) -> int:
        """round(p n), the one rounding: the task rows are the rest, so that the counts sum to n."""
        return round((self.ratio or 0.0) * self.samples)

    @property
    def task(self) -> int:
        return self.samples - self.harmful


@dataclass(frozen=True)
class Grade:
    """How well one answer does what the user wants."""

    score: float
    """From 0 to 1."""
    judge_text: str = ""
    """The judge's text; empty if no judge was used."""
    unparsed: bool = False
    """True if the judge's text contains no readable verdict."""


@dataclass(frozen=True)
class RawJudgment:
    """What a judge read off one question with its answer, before anything is decided."""

    probabilities: dict[str, float] = field(default_factory=dict)
    """Label -> probability, for every label that it gives one."""
    text: str = ""
    """What it wrote, if it writes."""
    cut: bool = False
    """It read only the beginning of the text."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one question with its answer."""

    flagged: bool
    categories: list[str]
    """The labels that it raises."""
    probabilities: dict[str, float]
    """Label -> probability, for every label; empty where the judge only writes."""
    cut: bool
    """The judge read only the beginning of the text."""
    unparsed: bool = False
    """The judge gave no verdict that could be read; the answer then counts as not flagged."""
    refused: bool | None = None
    """It finds the answer a refusal; None: it does not say."""
    score: float | None = None
    """A degree of harm from 0 to 1, where it gives one."""
