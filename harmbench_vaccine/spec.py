"""What a run is: validated, hashable, and the same after a round trip through YAML or JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import BadInput
from .plugins import Plugin, Resolved, resolve
from .registry import Registry, is_path

KEYWORDS = {"lambda": "lam"}
"""Parameters that the papers name by a word Python reserves."""


class Component(BaseModel):
    """One plug-in as the user wrote it. A value under the empty key belongs to the main parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    params: dict[str, str | int | float | bool] = Field(default_factory=dict)


Composition = tuple[Component, ...]

_GRAMMAR = "Write name, name=VALUE or name:key=value,key=value; + composes."


def parse(text: str) -> Composition:
    """Reads `vaccine:rho=5+ewc`, `ratio=0.1,samples=500`, `./mine.py:lambda=3`.

    Raises:
        BadInput: the text does not follow the grammar.
    """
    components: list[Component] = []
    for part in re.split(r"\+(?!\d)", text):  # not inside a number such as 1e+09
        head, colon, rest = part.strip().partition(":")
        if colon:
            components.append(Component(name=_name(head, text), params=_params(rest, text)))
            continue
        for item in part.split(","):
            name, equals, value = item.strip().partition("=")
            components.append(Component(name=_name(name, text), params={"": _value(value, text)} if equals else {}))
    return tuple(components)


def _name(name: str, text: str) -> str:
    name = name.strip()
    if not (is_path(name) or re.fullmatch(r"[A-Za-z_][\w-]*", name)):
        raise BadInput(f"{text!r} cannot be read: {name!r} is not a name. {_GRAMMAR}")
    return name if is_path(name) else name.replace("-", "_")


def _params(written: str, text: str) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for item in written.split(","):
        key, value = _pair(item, text)
        if key in params:
            raise BadInput(f"{text!r} gives {key!r} twice. {_GRAMMAR}")
        params[key] = value
    return params


def _pair(item: str, text: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"{text!r} cannot be read at {item!r}. {_GRAMMAR}")
    return KEYWORDS.get(key.strip(), key.strip()), _value(value, text)


def _value(value: str, text: str) -> str:
    if not value.strip():
        raise BadInput(f"{text!r} lacks a value after '='. {_GRAMMAR}")
    return value.strip()


class RunSpec(BaseModel):
    """One cell: a model, a defense, an attack, a task, under a protocol, with a seed.

    What the protocol settles and the user did not write stays empty here; `protocols.load` has the rest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str = "testbed"
    defense: Composition = (Component(name="sft"),)
    attack: Composition = (Component(name="ratio", params={"": "0"}),)
    task: str = "sst2"
    seed: int = Field(default=0, ge=0)
    model: str | None = None
    """A hub id or folder; None: the protocol's."""
    scorers: tuple[str, ...] = ()
    """Judges in place of the protocol's; the first one's harmful score is the headline."""
    data: dict[str, str] = Field(default_factory=dict)
    """Data set name -> folder, file or hub id, in place of the protocol's."""
    values: dict[str, str] = Field(default_factory=dict)
    """Dotted path of a value of the protocol -> what stands in its place."""
    backend: Literal["transformers", "vllm"] | None = None
    """What generates answers; None: vLLM where it and a GPU are there."""

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """Raises `BadInput` where the text is no spec."""
        try:
            return cls._read(json.loads(text))
        except json.JSONDecodeError as error:
            raise BadInput(f"Not a run: not JSON: {error}.") from error

    def to_yaml(self) -> str:
        """The spec as YAML, defaults included."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> RunSpec:
        """Raises `BadInput` where the text is no spec."""
        import yaml

        try:
            return cls._read(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise BadInput(f"Not a run: not YAML: {str(error).splitlines()[0]}.") from error

    @classmethod
    def _read(cls, values: Any) -> RunSpec:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise BadInput(f"Not a run: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic objects to, as a sentence."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{where}: {problem['msg']}."


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the text that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 20) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def settle(
    composition: Composition, registry: Registry[Any], protocol: Mapping[str, Mapping[str, Any]], protocol_name: str
) -> list[Resolved]:
    """Every component with its class found and its parameters resolved.

    Raises:
        BadInput: an unknown name or parameter, a value out of range, or one name twice.
    """
    settled: list[Resolved] = []
    for component in composition:
        cls: type[Plugin] = registry.get(component.name)
        written: dict[str, Any] = {}
        for key, value in component.params.items():
            if key == "" and cls.main_parameter() is None:
                raise BadInput(f"{cls.kind} {cls.name!r} takes no bare value: it has no main parameter. {_GRAMMAR}")
            written[key or str(cls.main_parameter())] = value
        resolved = resolve(cls, written, protocol.get(cls.name), protocol_name)
        if any(other.plugin.name == cls.name for other in settled):
            raise BadInput(f"{cls.kind} {cls.name!r} is named twice; give it its parameters once.")
        settled.append(resolved)
    return settled


def canonical(settled: list[Resolved]) -> str:
    """The composition as a command line would name it: only what departs from the protocol and the defaults."""
    return "+".join(_canonical_component(resolved) for resolved in settled)


def _canonical_component(resolved: Resolved) -> str:
    plugin = resolved.plugin
    written = {key: _plain(value) for key, value in resolved.params.items() if resolved.origins[key] == "written"}
    main = plugin.main_parameter()
    if main in written and len(written) == 1:
        return f"{plugin.name}={written[main]}"
    listed = ",".join(f"{key}={value}" for key, value in written.items())
    return f"{plugin.name}:{listed}" if listed else plugin.name


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()  # as a command line writes it
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
