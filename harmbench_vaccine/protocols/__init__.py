"""Protocols: everything that makes two harmful scores comparable, as versioned, hashed YAML files.

A protocol fixes data, prompts, counts, optimizer settings, token limits, judge and gates. Rows of two different hashes
never stand in one table.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import BadInput, unknown
from ..spec import digest, first_problem
from ..terms import Topology, TrainSettings


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AlignProtocol(_Strict):
    """The alignment stage: how many safe rows, trained how."""

    rows: int = Field(ge=1)
    settings: TrainSettings


class FinetuneProtocol(_Strict):
    """The user stage: how many rows a user uploads by default, trained how."""

    samples: int = Field(ge=1)
    settings: TrainSettings


class Questions(_Strict):
    """How many prompts are asked, and how long an answer may be."""

    prompts: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)


class AnswerProtocol(_Strict):
    """The three sets of questions: harmful, benign, and the task's test items with a token limit for each task."""

    harmful: Questions
    benign: Questions
    task_items: int = Field(ge=1)
    task_tokens: dict[str, int]


class ScoreProtocol(_Strict):
    """The judge, the rule of the headline accuracy, and the rows that loss and drift are measured on."""

    scorer: str
    judge: str
    accuracy: Literal["strict", "flexible"]
    drift_rows: int = Field(ge=1)
    drift_batch: int = Field(ge=1)


class Gates(_Strict):
    """A cell outside any of these is collapsed, not safe. Percentages."""

    degenerate: float
    """At most this share of empty or repetitive answers."""
    refusals: float
    """At most this share of benign prompts refused."""
    above_chance: float
    """Accuracy after the user stage must exceed guessing by this."""
    accuracy_before: float | None
    """Accuracy before the user stage must reach this; None where the aligned model has not learned the task yet."""


class Splits(_Strict):
    """Which splits are trained on and asked from: BeaverTails', and the benign instructions'."""

    train: str
    test: str
    benign_train: str = "train"
    benign_test: str = "test"
    """The splits of the benign instructions."""


class Protocol(_Strict):
    """A protocol file, validated."""

    name: str
    version: int
    model: str
    dtype: Literal["float32", "bfloat16"]
    """Of the base model; adapters are float32 always."""
    prompt: str
    topology: Topology
    data: dict[str, str]
    splits: Splits
    align: AlignProtocol
    finetune: FinetuneProtocol
    answer: AnswerProtocol
    score: ScoreProtocol
    gates: Gates
    defenses: dict[str, dict[str, Any]] = Field(default_factory=dict)
    attacks: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """The identity that a table checks: 12 hexadecimal digits over every value of the file."""
        return digest(self.model_dump(mode="json"), 12)

    def location(self, dataset: str) -> str:
        """Where a data set is read from.

        Raises:
            BadInput: the protocol does not name it.
        """
        if dataset not in self.data:
            raise unknown("data set", dataset, self.data, of=f"protocol {self.name!r}")
        return self.data[dataset]


def names() -> list[str]:
    """The protocols that come with the package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def models() -> list[str]:
    """The models that those protocols start from."""
    return sorted({load(name).model for name in names()})


def load(name: str) -> Protocol:
    """The protocol of that name, or in the YAML file at that path.

    Raises:
        BadInput: there is none, or a value of the file is not allowed.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise BadInput(f"There is no protocol file {name!r}.")
    elif name in names():
        path = Path(__file__).parent / f"{name}.yaml"
    else:
        raise unknown("protocol", name, names())
    try:
        return TypeAdapter(Protocol).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"Protocol {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    except ValidationError as error:
        raise BadInput(f"{path} is no protocol: {first_problem(error)}") from error
