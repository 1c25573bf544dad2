"""The base class of plug-ins (defenses, attacks, tasks, scorers) and their parameters.

A plug-in is one class in one file, and the name of the file is its name. Its parameters are class fields that `param`
creates, and its behavior is defined by the hooks that it overrides.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from harmbench_vaccine.core.errors import BadInput, shortened, too_few_rows, unknown_name
from harmbench_vaccine.core.hashing import content_hash, digest
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.core.seeds import random_stream

from .source_code import CONTRACT, code_of_definitions, code_of_modules

if TYPE_CHECKING:
    from harmbench_vaccine.inference.model_pool import ModelPool

T = TypeVar("T")
P = TypeVar("P", bound="Plugin", covariant=True)

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
    """Declare a parameter of a plug-in.

    Args:
        default: The default value.
        doc: Description in one line, which `hbv info` prints.
        source: Source of the default: a section of the paper, a script of the authors.
        main: Whether `PLUGIN=VALUE` on the command line sets this parameter.
        ge: Smallest allowed value.
        gt: Exclusive lower bound.
        le: Largest allowed value.
    """
    return Field(default, description=doc, ge=ge, gt=gt, le=le, json_schema_extra={"source": source, "main": main})


class Plugin(BaseModel):
    """A plug-in: a name, a citation and validated parameters."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    kind: ClassVar[str] = "plug-in"
    name: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    neutral: ClassVar[Mapping[str, Any] | None] = None
    """Parameters at which the plug-in has no effect; None: no such setting exists."""

    file_params: ClassVar[tuple[str, ...]] = ()
    """Parameters that name a file; in keys, the content of the file counts, not its name."""

    fixed_texts: ClassVar[tuple[str, ...]] = ()
    """Texts of its prompts that other files contain; they are part of the fingerprint."""

    _seed: int = PrivateAttr(0)
    _in_order: bool = PrivateAttr(False)
    _models: ModelPool | None = PrivateAttr(None)

    def __init__(self, /, **params: Any) -> None:
        """Create a plug-in; a parameter that is left out has its default.

        Raises:
            BadInput: A parameter does not exist, or a value is outside its range.
        """
        type(self).require_parameters(params)
        try:
            super().__init__(**params)
        except ValidationError as error:
            raise self._refused_value(params, error) from error

    def seeded(self, seed: int, in_order: bool = False) -> Self:
        """Return a copy that draws rows with the seed of the run.

        Args:
            seed: The seed of the run.
            in_order: Take the first rows instead of random ones, as the scripts of the papers do.
        """
        copy = self.model_copy()
        copy._seed, copy._in_order = seed, in_order
        return copy

    def fresh(self) -> Self:
        """Return a deep copy for one stage, so that stages share no state."""
        return self.model_copy(deep=True)

    @property
    def models(self) -> ModelPool:
        """The pool that loads models for this plug-in: the attached pool, or a new one."""
        if self._models is None:
            from harmbench_vaccine.inference.model_pool import ModelPool

            self._models = ModelPool()
        return self._models

    def with_models(self, models: ModelPool) -> Self:
        """Return a copy that loads its models with `models`."""
        copy = self.model_copy()
        copy._models = models
        return copy

    def random(self, purpose: str) -> Random:
        """Return the random stream of the run's seed for one purpose."""
        return random_stream(self._seed, self.name, purpose)

    def draw(self, purpose: str, rows: Sequence[T], count: int) -> list[T]:
        """Draw rows without replacement, in random order; with `rows=paper`, return the first rows.

        Args:
            purpose: Name of the rows; it selects the random stream and appears in the error.
            rows: The available rows.
            count: The number of rows to draw.

        Raises:
            BadInput: Fewer than `count` rows are available.
        """
        if count > len(rows):
            raise too_few_rows(count, purpose, len(rows), by=self.name)
        if self._in_order:
            return list(rows[:count])
        return self.random(purpose).sample(list(rows), count)

    @classmethod
    def required_methods(cls) -> tuple[str, ...]:
        """Return the methods without a default, which the class must define."""
        return ()

    @classmethod
    def main_parameter(cls) -> str | None:
        """Return the parameter that `name=VALUE` sets, or None."""
        return next((key for key in cls.model_fields if cls._extra(key)["main"]), None)

    @classmethod
    def source_of(cls, key: str) -> str:
        """Return the source of the default of parameter `key`."""
        return str(cls._extra(key)["source"])

    @classmethod
    def range_of(cls, key: str) -> str:
        """Describe the allowed values of parameter `key`, e.g. "a number >= 0, or none"."""
        info = cls.model_fields[key]
        kind: Any = info.annotation
        optional = type(None) in get_args(kind)
        if optional:  # X | None
            kind = next(part for part in get_args(kind) if part is not type(None))
        type_names = {int: "a whole number", float: "a number", bool: "true | false", str: "a text"}
        bounds = [
            f"{sign} {limit}"
            for constraint in info.metadata
            for sign, name in ((">=", "ge"), (">", "gt"), ("<=", "le"))
            if (limit := getattr(constraint, name, None)) is not None
        ]
        literal = " | ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        values = literal or " ".join([type_names.get(kind, str(kind)), " and ".join(bounds)]).strip()
        return f"{values}, or none" if optional else values

    @classmethod
    def require_parameters(cls, names: Iterable[str]) -> None:
        """Check that the class has parameters of these names.

        Raises:
            BadInput: One does not exist.
        """
        for name in names:
            if name not in cls.model_fields:
                raise unknown_name("parameter", name, cls.model_fields, of=cls._kind_and_name())

    @classmethod
    def _refused_value(cls, params: Mapping[str, Any], error: ValidationError) -> BadInput:
        """Return the error for the first value that pydantic refuses."""
        problem = error.errors()[0]
        if not problem["loc"]:  # a validator of the class compares several parameters
            return BadInput(f"{cls._kind_and_name()}: {problem['msg'].removeprefix('Value error, ')}.")
        key = str(problem["loc"][0])
        value = shortened(params.get(key, problem["input"]))
        return BadInput(f"{cls._kind_and_name()}: {key}={value} is not allowed; allowed: {cls.range_of(key)}.")

    @classmethod
    def _kind_and_name(cls) -> str:
        """Return the kind and the name for an error, also of a class that no registry has named yet."""
        package, _, file_name = cls.__module__.rpartition(".")
        is_built_in = package.startswith(f"{__name__.partition('.')[0]}.")
        name = vars(cls).get("name") or (file_name if is_built_in else name_of_class(cls))
        return f"{cls.kind} {name!r}"

    @classmethod
    def _extra(cls, key: str) -> dict[str, Any]:
        extra = cls.model_fields[key].json_schema_extra
        return {"source": "", "main": False, **(extra if isinstance(extra, dict) else {})}

    @classmethod
    def fingerprint(cls) -> str:
        """Hash the code of the class and of its base classes, without comments, docstrings and imports.

        The code of helper modules next to them and the text of a prompt file with their name (`.txt`) count too. An
        edit of code or of a prompt leads to new artifacts; an edit of comments or docstrings does not. Of a script or a
        notebook, the code of the classes and of what they use in it counts.
        """
        classes = [base for base in cls.__mro__ if issubclass(base, Plugin) and base.__module__ not in CONTRACT]
        definitions = [base for base in classes if base.__module__ == "__main__"]
        modules = {base.__module__: Path(inspect.getfile(base)) for base in classes if base not in definitions}
        text = code_of_modules(modules) + code_of_definitions(definitions)
        code = hashlib.sha256(text.encode()).hexdigest()[:16]
        return digest([code, *cls.fixed_texts], 16) if cls.fixed_texts else code


def name_of_class(cls: type[Plugin]) -> str:
    """Return the name of a plug-in that is not from a file or a package, such as `my_defense` of `MyDefense`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


@dataclass(frozen=True)
class Resolved(Generic[P]):
    """A plug-in with every parameter resolved, and the origin of each value."""

    plugin: P
    params: dict[str, Any]
    origins: dict[str, str]
    """Parameter -> `written`, `protocol NAME` or `default: SOURCE`."""

    @property
    def identity(self) -> dict[str, Any]:
        """The part of an artifact key that depends on this plug-in."""
        files = {
            key: content_hash(path)
            for key in self.plugin.file_params
            if (value := self.params[key]) and (os.path.isfile(path := user_path(value)) or path.is_dir())
        }
        return {"name": self.plugin.name, "params": self.params | files, "code": type(self.plugin).fingerprint()}


def resolve_params(
    cls: type[P], written: Mapping[str, Any], protocol: Mapping[str, Any] | None = None, protocol_name: str = ""
) -> Resolved[P]:
    """Construct a plug-in. Written values override the protocol, and the protocol overrides class defaults.

    Args:
        cls: The class of the plug-in.
        written: The values that the user wrote: parameter -> value.
        protocol: The values of the protocol: parameter -> value.
        protocol_name: Name of the protocol, for `Resolved.origins`.

    Raises:
        BadInput: A parameter does not exist, or a value is outside its range.
    """
    protocol = protocol or {}
    cls.require_parameters([*protocol, *written])
    written = {  # the command line has no other way to write None
        key: None if value == "none" and type(None) in get_args(cls.model_fields[key].annotation) else value
        for key, value in written.items()
    }
    plugin = cls(**{**protocol, **written})

    def origin(key: str) -> str:
        if key in written:
            return "written"
        if key in protocol:
            return f"protocol {protocol_name}"
        return f"default: {cls.source_of(key)}"

    return Resolved(plugin, plugin.model_dump(mode="json"), {key: origin(key) for key in cls.model_fields})
