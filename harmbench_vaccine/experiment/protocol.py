"""Protocols: everything that makes two harmful scores comparable, as versioned, hashed YAML files.

A protocol fixes data, prompts, counts, optimizer settings, token limits, judge and gates. Results under two different
hashes are never compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.numbers import Count, Percentage
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.core.types import Topology, TrainSettings

from .overlays import is_protocol_file, read_protocol_values
from .spec import first_validation_error


def _is_one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("It should be one line without control characters")
    return text


Text = Annotated[str, StringConstraints(min_length=1, max_length=1000), AfterValidator(_is_one_line)]
"""A name or a location: one line."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _added(default: Any) -> Any:
    """Declare a value that older files lack: its default is not part of the hash, so their hash stays the same."""
    return Field(default, exclude_if=lambda value: value == default)


class AlignProtocol(_Strict):
    """The alignment stage."""

    rows: Count
    """Number of safe rows."""
    source: Literal["safe", "refusals"] = _added("safe")
    """`safe`: safe responses of BeaverTails. `refusals`: refusals of its harmful prompts."""
    instructions: Annotated[int, Field(strict=True, ge=0, le=10**9)] = _added(0)
    """Number of benign instructions that are trained on in addition to the safe rows; plug-ins cannot draw them."""
    settings: TrainSettings


class TaskTraining(_Strict):
    """Differences of the user stage for one task."""

    samples: Count | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of `TrainSettings`."""


class _TaskSettings(_Strict):
    settings: TrainSettings


class FinetuneProtocol(_Strict):
    """The user stage."""

    samples: Count
    """Number of rows that the user uploads, unless an attack changes it."""
    settings: TrainSettings
    tasks: dict[str, TaskTraining] = _added({})

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        for task in self.tasks:
            self.of(task)
        return self

    def of(self, task: str) -> FinetuneProtocol:
        """Return the user stage of one task.

        Raises:
            BadInput: The file overrides a setting that does not exist, or with a value that is not allowed.
        """
        override = self.tasks.get(task, TaskTraining())
        try:
            merged = _TaskSettings.model_validate({"settings": {**asdict(self.settings), **override.settings}})
        except ValidationError as error:
            raise _refused_value(error, "the protocol", _TaskSettings, f"finetune.tasks.{task}.") from error
        return FinetuneProtocol(samples=override.samples or self.samples, settings=merged.settings)


class Questions(_Strict):
    """An evaluation set: its number of prompts and the token limit of an answer."""

    prompts: Count
    max_new_tokens: Count


class AnswerProtocol(_Strict):
    """The evaluation sets: harmful, benign, and the task's test items with a token limit for each task."""

    harmful: Questions
    benign: Questions
    task_items: Count
    task_tokens: dict[Text, Count]
    items: dict[Text, Count] = _added({})
    """Task -> its number of test items, where it differs from `task_items`."""
    cut_at: str = _added("")
    """Text that ends an answer: it and everything after it are removed; empty: answers are not cut."""
    rows_in_order: Literal["unsafe", "all"] = _added("unsafe")
    """Rows of the BeaverTails test split whose prompts are the harmful prompts with `rows=paper`. With `rows=unique`,
    they are those of the unsafe rows."""
    part: Literal["report", "validation"] = _added("report")
    """`report`: the first prompts and test items. `validation`: the last ones, at most as many, without the former:
    `hbv tune` chooses parameters by them."""


class ScoreProtocol(_Strict):
    """The judge, the rule of the headline accuracy, and the rows that loss and drift are measured on."""

    scorer: Text
    judge: Text | Literal[""]
    """Location of the model of `scorer`; empty: it does not load one."""
    accuracy: Literal["strict", "flexible"]
    """The rule of the reported accuracy: `strict`, or `flexible`, the rule of the task (see `Protocol.tasks`)."""
    drift_rows: Count
    drift_batch: Count


class Gates(_Strict):
    """Limits in percent; a run outside any of them is collapsed, not safe."""

    degenerate: Percentage
    """Maximum percentage of empty or repetitive answers."""
    refusals: Percentage
    """Maximum percentage of benign prompts that are refused."""
    above_chance: Annotated[float, Field(strict=True, ge=-101, le=100)]
    """Accuracy after the user stage must exceed guessing by more than this; -101: no limit."""
    accuracy_before: Percentage | None
    """Minimum accuracy before the user stage; None where the aligned model has not learned the task yet."""
    neither_rise: Percentage = _added(20.0)
    """Maximum rise, from the aligned to the final model, of the percentage of harmful prompts whose answer is neither
    flagged nor a refusal; a run above it is hollow."""


class Splits(_Strict):
    """The splits of the data sets that training and evaluation use."""

    train: Text
    test: Text
    benign_train: Text = "train"
    benign_test: Text = "test"
    pairs: Text = _added("train")
    """The part of the refusal set that the defender has."""
    attacker: str = _added("")
    """The part of the refusal set whose harmful answers the attacker has; empty: the unsafe rows of BeaverTails."""


class TuningCost(_Strict):
    """The cost of the runs by which `hbv tune` chose the parameter of a defense."""

    runs: Annotated[int, Field(strict=True, ge=0)]
    seconds: Annotated[int, Field(strict=True, ge=0)]
    """Time of their stages; a stage of several runs counts once."""


_ABOUT = ("sources", "base", "tuning")
"""Fields about the values of a protocol, which are not part of the hash."""


class Protocol(_Strict):
    """A protocol file, validated; of an overlay, with the values of its base."""

    name: Text
    version: Count
    model: Text
    models: tuple[Text, ...] = _added(())
    """Other models of the same tables."""
    dtype: Literal["float32", "bfloat16"]
    """Data type of the base model; adapters are always float32."""
    quantization: Literal["none", "8bit", "4bit"] = _added("none")
    """Quantization of the base model's matrices, by bitsandbytes."""
    rows: Literal["unique", "paper"] = _added("unique")
    """`unique`: the seed draws the rows, and a question occurs in one pool only. `paper`: rows are taken in file order,
    and overlaps are kept and counted."""
    prompt: Text
    topology: Topology
    data: dict[Text, Text]
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
    base: str = Field("", exclude=True)
    """The protocol that an overlay changes: a name or a file; empty for a complete protocol."""
    tuning: dict[str, TuningCost] = Field(default_factory=dict, exclude=True)
    """Defense -> cost of its tuning, in an overlay of `hbv tune`."""

    @cached_property
    def hash(self) -> str:
        """The identity of the values: 12 hexadecimal digits over all except the sources."""
        return self.hash_with({})

    def hash_with(self, contents: Mapping[str, str]) -> str:
        """Return the hash with other texts for some values.

        Args:
            contents: A text, such as the path of a file -> the text to hash, such as the hash of its content.
        """
        return digest(_with_texts(self.model_dump(mode="json"), contents), 12)

    def untuned_hash_with(self, contents: Mapping[str, str]) -> str:
        """Return the hash with the name, the version and the defenses of the base; empty for a complete protocol.

        Results under this hash differ from those under `hash_with` in the parameters of defenses only.

        Args:
            contents: As for `hash_with`.
        """
        if not self.base:
            return ""
        untuned = self.model_dump(mode="json")
        untuned |= load_protocol(self.base).model_dump(mode="json", include={"name", "version", "defenses"})
        return digest(_with_texts(untuned, contents), 12)

    def replaced(self, values: Mapping[str, str]) -> Protocol:
        """Return the protocol with other values at dotted paths, such as `align.settings.lr`; each is read as YAML.

        Raises:
            BadInput: A path does not exist, or its value is not allowed.
        """
        changed = {**self.model_dump(mode="python"), **{name: getattr(self, name) for name in _ABOUT}}
        paths = _paths(Protocol)
        for path, text in values.items():
            if not any(path == known or (known.endswith(".") and f"{path}.".startswith(known)) for known in paths):
                group = path
                while group and not (siblings := [known.rstrip(".") for known in paths if known.startswith(group)]):
                    group = group.rpartition(".")[0]
                raise unknown_name("protocol value", path, siblings or [known.rstrip(".") for known in paths])
            *parents, last = path.split(".")
            container: Any = changed
            for parent in parents:
                container = container.setdefault(parent, {}) if isinstance(container, dict) else None
            if not isinstance(container, dict):
                raise BadInput(f"{path!r} cannot be set: {path.rpartition('.')[0]!r} is a single value; set that one.")
            container[last] = read_yaml(text, f"The value of {path!r}")
        try:
            return Protocol.model_validate(changed)
        except ValidationError as error:
            raise _refused_value(error, "the protocol") from error

    def source_of(self, path: str) -> str:
        """Return the source of the value at a dotted path, or of the smallest group with the value; empty if none."""
        keys = [key for key in self.sources if path == key or path.startswith(f"{key}.")]
        return self.sources[max(keys, key=len)] if keys else ""

    def location(self, dataset: str) -> str:
        """Return where a data set is read from.

        Raises:
            BadInput: The protocol does not name the data set.
        """
        if dataset not in self.data:
            raise unknown_name("data set", dataset, self.data, of=f"protocol {self.name!r}")
        return self.data[dataset]


def _with_texts(value: Any, texts: Mapping[str, str]) -> Any:
    """Return JSON with other texts for some of its values."""
    if isinstance(value, dict):
        return {key: _with_texts(nested, texts) for key, nested in value.items()}
    if isinstance(value, list):
        return [_with_texts(nested, texts) for nested in value]
    return texts.get(value, value) if isinstance(value, str) else value


def _paths(kind: Any, prefix: str = "") -> list[str]:
    """Return the dotted paths that a protocol file may set; after a path that ends in a dot, any name is allowed."""
    fields = get_type_hints(kind)
    paths = []
    for name in kind.model_fields if issubclass(kind, BaseModel) else fields:
        field = fields[name]
        if isinstance(field, type) and (issubclass(field, BaseModel) or is_dataclass(field)):
            paths += _paths(field, f"{prefix}{name}.")
        elif name not in ("name", *_ABOUT):
            paths.append(f"{prefix}{name}{'.' if get_origin(field) is dict else ''}")
    return paths


def leaf_values(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a protocol with its dotted path, defaults included."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields if name not in _ABOUT}
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        for name, nested in value.items():
            yield from leaf_values(nested, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def _refused_value(
    error: ValidationError, origin: str, kind: type[BaseModel] | None = None, group: str = ""
) -> BadInput:
    """Return the error for the first value that pydantic refuses, with its dotted path and what is allowed.

    Args:
        error: The error of pydantic.
        origin: The protocol or its file.
        kind: The class that was validated; None: `Protocol`.
        group: The dotted path of this class in a protocol, with a dot at its end.
    """
    problem = error.errors()[0]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        path = group + ".".join(str(part) for part in problem["loc"])
        return unknown_name("value", path, [known.rstrip(".") for known in _paths(kind or Protocol, group)], of=origin)
    return BadInput(f"A value of {origin} is not allowed: {group}{first_validation_error(error)}")


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
    path = protocol_file(name)
    try:
        return Protocol.model_validate(read_protocol_values(path, protocol_file))
    except ValidationError as error:
        raise _refused_value(error, f"protocol {path}") from error


def protocol_file(name: str) -> Path:
    """Return the file of a built-in protocol, or the file at a path.

    Raises:
        BadInput: It does not exist.
    """
    if is_protocol_file(name):
        path = user_path(name)
        if not path.exists():
            raise BadInput(f"Protocol file {name!r} does not exist.")
        return path
    if name not in protocol_names():
        from harmbench_vaccine.plugins.registry import unknown_plugin  # costs 0.2 s, and only an error needs it

        raise unknown_plugin("protocol", name, protocol_names())
    return Path(__file__).parent / "protocols" / f"{name}.yaml"
