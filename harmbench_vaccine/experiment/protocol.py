"""Protocols: everything that makes two harmful scores comparable, as versioned, hashed YAML files.

A protocol fixes data, prompts, counts, optimizer settings, token limits, judge and gates. Results under two different
hashes are never compared.
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


def _added(default: Any) -> Any:
    """Declare a value that older files lack: its default is not part of the hash, so their hash stays the same."""
    return Field(default, exclude_if=lambda value: value == default)


class AlignProtocol(_Strict):
    """The alignment stage."""

    rows: int = Field(ge=1)
    """Number of safe rows."""
    source: Literal["safe", "refusals"] = _added("safe")
    """`safe`: safe responses of BeaverTails. `refusals`: refusals of its harmful prompts."""
    settings: TrainSettings


class TaskTraining(_Strict):
    """Differences of the user stage for one task."""

    samples: int | None = Field(default=None, ge=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of `TrainSettings`."""


class FinetuneProtocol(_Strict):
    """The user stage."""

    samples: int = Field(ge=1)
    """Number of rows that the user uploads, unless an attack changes it."""
    settings: TrainSettings
    tasks: dict[str, TaskTraining] = _added({})

    def of(self, task: str) -> FinetuneProtocol:
        """Return the user stage of one task.

        Raises:
            BadInput: The file overrides a setting that does not exist, or with a value that is not allowed.
        """
        override = self.tasks.get(task, TaskTraining())
        settings = {**asdict(self.settings), **override.settings}
        try:
            return FinetuneProtocol.model_validate({"samples": override.samples or self.samples, "settings": settings})
        except ValidationError as error:
            raise BadInput(f"The protocol's settings for task {task!r}: {first_validation_error(error)}") from error


class Questions(_Strict):
    """An evaluation set: its number of prompts and the token limit of an answer."""

    prompts: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)


class AnswerProtocol(_Strict):
    """The evaluation sets: harmful, benign, and the task's test items with a token limit for each task."""

    harmful: Questions
    benign: Questions
    task_items: int = Field(ge=1)
    task_tokens: dict[str, int]
    items: dict[str, int] = _added({})
    """Task -> its number of test items, where it differs from `task_items`."""
    cut_at: str = _added("")
    """Text that ends an answer: it and everything after it are removed; empty: answers are not cut."""
    rows_in_order: Literal["unsafe", "all"] = _added("unsafe")
    """Rows of the BeaverTails test split whose prompts are the harmful prompts with `rows=paper`. With `rows=unique`,
    they are those of the unsafe rows."""


class ScoreProtocol(_Strict):
    """The judge, the rule of the headline accuracy, and the rows that loss and drift are measured on."""

    scorer: str
    judge: str
    """Location of the model of `scorer`."""
    accuracy: Literal["strict", "flexible"]
    """The rule of the reported accuracy: `strict`, or `flexible`, the rule of the task (see `Protocol.tasks`)."""
    drift_rows: int = Field(ge=1)
    drift_batch: int = Field(ge=1)


class Gates(_Strict):
    """Limits in percent; a run outside any of them is collapsed, not safe."""

    degenerate: float
    """Maximum percentage of empty or repetitive answers."""
    refusals: float
    """Maximum percentage of benign prompts that are refused."""
    above_chance: float
    """Accuracy after the user stage must exceed guessing by more than this."""
    accuracy_before: float | None
    """Minimum accuracy before the user stage; None where the aligned model has not learned the task yet."""


class Splits(_Strict):
    """The splits of the data sets that training and evaluation use."""

    train: str
    test: str
    benign_train: str = "train"
    benign_test: str = "test"
    pairs: str = _added("train")
    """The part of the refusal set that the defender has."""
    attacker: str = _added("")
    """The part of the refusal set whose harmful answers the attacker has; empty: the unsafe rows of BeaverTails."""


class Protocol(_Strict):
    """A protocol file, validated."""

    name: str
    version: int
    model: str
    models: tuple[str, ...] = _added(())
    """Other models of the same tables."""
    dtype: Literal["float32", "bfloat16"]
    """Data type of the base model; adapters are always float32."""
    quantization: Literal["none", "8bit", "4bit"] = _added("none")
    """Quantization of the base model's matrices, by bitsandbytes."""
    rows: Literal["unique", "paper"] = _added("unique")
    """`unique`: the seed draws the rows, and a question occurs in one pool only. `paper`: rows are taken in file order,
    and overlaps are kept and counted."""
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
    """Defense -> parameter -> value that overrides the class default; `attacks`, `scorers` and `tasks` likewise."""
    attacks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    scorers: dict[str, dict[str, Any]] = _added({})
    tasks: dict[str, dict[str, Any]] = _added({})
    sources: dict[str, str] = Field(default_factory=dict, exclude=True)
    """Dotted path of a value, or of a group of values -> its source."""

    @cached_property
    def hash(self) -> str:
        """The identity that tables compare: 12 hexadecimal digits over every value except the sources."""
        return digest(self.model_dump(mode="json"), 12)

    def replaced(self, values: Mapping[str, str]) -> Protocol:
        """Return the protocol with other values at dotted paths, such as `align.settings.lr`; each is read as YAML.

        Raises:
            BadInput: A path does not exist, or its value is not allowed.
        """
        changed = {**self.model_dump(mode="python"), "sources": self.sources}
        paths = _paths(Protocol)
        for path, text in values.items():
            if not any(path == known or (known.endswith(".") and f"{path}.".startswith(known)) for known in paths):
                group = path
                while group and not (siblings := [known.rstrip(".") for known in paths if known.startswith(group)]):
                    group = group.rpartition(".")[0]
                raise unknown_name("protocol value", path, siblings or [known.rstrip(".") for known in paths])
            *parents, last = path.split(".")
            container = changed
            for parent in parents:
                container = container.setdefault(parent, {})
            container[last] = _read(path, text)
        try:
            return Protocol.model_validate(changed)
        except ValidationError as error:
            raise BadInput(f"A protocol value is not allowed: {first_validation_error(error)}") from error

    def location(self, dataset: str) -> str:
        """Return where a data set is read from.

        Raises:
            BadInput: The protocol does not name the data set.
        """
        if dataset not in self.data:
            raise unknown_name("data set", dataset, self.data, of=f"protocol {self.name!r}")
        return self.data[dataset]


def _paths(kind: Any, prefix: str = "") -> list[str]:
    """Return the dotted paths that a protocol file may set; after a path that ends in a dot, any name is allowed."""
    fields = get_type_hints(kind)
    paths = []
    for name in kind.model_fields if issubclass(kind, BaseModel) else fields:
        field = fields[name]
        if isinstance(field, type) and (issubclass(field, BaseModel) or is_dataclass(field)):
            paths += _paths(field, f"{prefix}{name}.")
        elif name not in ("name", "sources"):
            paths.append(f"{prefix}{name}{'.' if get_origin(field) is dict else ''}")
    return paths


def leaf_values(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a protocol with its dotted path, defaults included."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields if name != "sources"}
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        for name, nested in value.items():
            yield from leaf_values(nested, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def _read(path: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BadInput(f"The value of {path!r} cannot be read as YAML: {_yaml_problem(error)}.") from error


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return the problem and its line as one phrase."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number; YAML 1.1 requires a decimal point in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def protocol_names() -> list[str]:
    """Return the names of the built-in protocols."""
    return sorted(path.stem for path in (Path(__file__).parent / "protocols").glob("*.yaml"))


def protocol_models() -> list[str]:
    """Return the base models of the built-in protocols."""
    protocols = map(load_protocol, protocol_names())
    return sorted({model for protocol in protocols for model in (protocol.model, *protocol.models)})


def load_protocol(name: str) -> Protocol:
    """Load a built-in protocol by name, or a YAML file by path.

    Raises:
        BadInput: It does not exist, or a value of the file is not allowed.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise BadInput(f"Protocol file {name!r} does not exist.")
    elif name in protocol_names():
        path = Path(__file__).parent / "protocols" / f"{name}.yaml"
    else:
        raise unknown_name("protocol", name, protocol_names())
    try:
        return TypeAdapter(Protocol).validate_python(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"Protocol {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {_yaml_problem(error)}.") from error
    except ValidationError as error:
        raise BadInput(f"{path} is not a protocol: {first_validation_error(error)}") from error
