"""Protocols: everything that makes two harmful scores comparable, as versioned, hashed YAML files.

A protocol fixes data, prompts, counts, optimizer settings, token limits, judge and gates. Rows of two different hashes
never stand in one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.types import Topology, TrainSettings

from .spec import first_validation_error


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _later(default: Any) -> Any:
    """A value that files written before it was added do not have: at its default it is not part of the hash, so that
    the rows of those files keep theirs."""
    return Field(default, exclude_if=lambda value: value == default)


class AlignProtocol(_Strict):
    """The alignment stage: how many safe rows, trained how."""

    rows: int = Field(ge=1)
    source: Literal["safe", "refusals"] = _later("safe")
    """BeaverTails' own safe responses, or refusals of its harmful prompts."""
    settings: TrainSettings


class TaskTraining(_Strict):
    """What the user stage of one task does in another way."""

    samples: int | None = Field(default=None, ge=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of `TrainSettings`."""


class FinetuneProtocol(_Strict):
    """The user stage: how many rows a user uploads by default, trained how."""

    samples: int = Field(ge=1)
    settings: TrainSettings
    tasks: dict[str, TaskTraining] = _later({})

    def of(self, task: str) -> FinetuneProtocol:
        """The user stage of one task.

        Raises:
            BadInput: the file changes a setting that there is not, or gives it a value that is not allowed.
        """
        own = self.tasks.get(task, TaskTraining())
        try:
            return FinetuneProtocol.model_validate(
                {"samples": own.samples or self.samples, "settings": {**asdict(self.settings), **own.settings}}
            )
        except ValidationError as error:
            raise BadInput(f"The protocol's settings for task {task!r}: {first_validation_error(error)}") from error


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
    items: dict[str, int] = _later({})
    """Task -> its number of test items, where it is another than `task_items`."""


class ScoreProtocol(_Strict):
    """The judge, the rule of the headline accuracy, and the rows that loss and drift are measured on."""

    scorer: str
    judge: str
    """Where the model of `scorer` lies."""
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
    pairs: str = _later("train")
    """The part of the refusal set that the defender has, or aligns on."""
    attacker: str = _later("")
    """The part of the refusal set whose harmful answers the attacker has; empty: BeaverTails' own unsafe rows."""


class Protocol(_Strict):
    """A protocol file, validated."""

    name: str
    version: int
    model: str
    models: tuple[str, ...] = _later(())
    """Other models of the same tables."""
    dtype: Literal["float32", "bfloat16"]
    """Of the base model; adapters are float32 always."""
    quantization: Literal["none", "8bit", "4bit"] = _later("none")
    """Of the base model's matrices, by bitsandbytes."""
    rows: Literal["unique", "paper"] = _later("unique")
    """unique: drawn by the seed, no question in two pools. paper: in the order of the files, overlaps kept and
    counted."""
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
    scorers: dict[str, dict[str, Any]] = _later({})
    sources: dict[str, str] = Field(default_factory=dict, exclude=True)
    """Dotted path of a value, or of a group of them -> where it is from."""

    @cached_property
    def hash(self) -> str:
        """The identity that a table checks: 12 hexadecimal digits over every value of the file."""
        return digest(self.model_dump(mode="json"), 12)

    def replaced(self, values: Mapping[str, str]) -> Protocol:
        """The protocol with other values at dotted paths, such as `align.settings.lr`; each is read as YAML.

        Raises:
            BadInput: there is no such path, or the value is not allowed there.
        """
        changed = {**self.model_dump(mode="python"), "sources": self.sources}
        paths = _paths(Protocol)
        for path, text in values.items():
            if not any(path == known or (known.endswith(".") and f"{path}.".startswith(known)) for known in paths):
                group = path
                while group and not (beside := [known.rstrip(".") for known in paths if known.startswith(group)]):
                    group = group.rpartition(".")[0]
                raise unknown_name("value", path, beside or [known.rstrip(".") for known in paths], of="a protocol")
            *way, last = path.split(".")
            place = changed
            for step in way:
                place = place.setdefault(step, {})
            place[last] = _read(path, text)
        try:
            return Protocol.model_validate(changed)
        except ValidationError as error:
            raise BadInput(f"The protocol cannot be changed so: {first_validation_error(error)}") from error

    def location(self, dataset: str) -> str:
        """Where a data set is read from.

        Raises:
            BadInput: the protocol does not name it.
        """
        if dataset not in self.data:
            raise unknown_name("data set", dataset, self.data, of=f"protocol {self.name!r}")
        return self.data[dataset]


def _paths(kind: Any, above: str = "") -> list[str]:
    """The dotted paths of everything that a protocol file may say; one that ends in a dot takes any name after it."""
    fields = get_type_hints(kind)
    found = []
    for name in kind.model_fields if issubclass(kind, BaseModel) else fields:
        inner = fields[name]
        if isinstance(inner, type) and (issubclass(inner, BaseModel) or is_dataclass(inner)):
            found += _paths(inner, f"{above}{name}.")
        elif name not in ("name", "sources"):
            found.append(f"{above}{name}{'.' if get_origin(inner) is dict else ''}")
    return found


def leaf_values(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a protocol with its dotted path, those at their defaults too."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields if name != "sources"}
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaf_values(inner, f"{above}.{name}" if above else name)
    else:
        yield above, value


def _read(path: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BadInput(f"The value of {path!r} cannot be read: {str(error).splitlines()[0]}.") from error


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as a command line writes it; YAML 1.1 wants a point in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def protocol_names() -> list[str]:
    """The protocols that come with the package."""
    return sorted(path.stem for path in (Path(__file__).parent / "protocols").glob("*.yaml"))


def protocol_models() -> list[str]:
    """The models that those protocols start from."""
    return sorted(
        {model for name in protocol_names() for model in (load_protocol(name).model, *load_protocol(name).models)}
    )


def load_protocol(name: str) -> Protocol:
    """The protocol of that name, or in the YAML file at that path.

    Raises:
        BadInput: there is none, or a value of the file is not allowed.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise BadInput(f"There is no protocol file {name!r}.")
    elif name in protocol_names():
        path = Path(__file__).parent / "protocols" / f"{name}.yaml"
    else:
        raise unknown_name("protocol", name, protocol_names())
    try:
        return TypeAdapter(Protocol).validate_python(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"Protocol {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    except ValidationError as error:
        raise BadInput(f"{path} is no protocol: {first_validation_error(error)}") from error
