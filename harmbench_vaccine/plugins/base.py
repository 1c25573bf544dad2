"""Plug-ins: what a defense, an attack, a task and a scorer are.

A plug-in is one class in one file, and the file's name is its name. Its parameters are class fields made by `param`;
what it does is in the hooks that it overrides.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from harmbench_vaccine.core.errors import BadInput, too_few_rows, unknown_name
from harmbench_vaccine.core.seeds import random_stream
from harmbench_vaccine.inference.model_pool import ModelPool

T = TypeVar("T")
P = TypeVar("P", bound="Plugin", covariant=True)

_CONTRACT = frozenset(f"{__package__}.{module}" for module in ("base", "defense", "attack", "task", "scorer"))
"""Modules whose code belongs to no plug-in."""

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
    _models: ModelPool | None = PrivateAttr(None)

    def seeded(self, seed: int, in_order: bool = False) -> Self:
        """Return a copy that draws by the run's seed, or with `in_order` takes the first rows, as papers' scripts do."""
        copy = self.model_copy()
        copy._seed, copy._in_order = seed, in_order
        return copy

    def fresh(self) -> Self:
        """Return a copy whose private attributes are its own, for one stage: no state passes from stage to stage."""
        return self.model_copy(deep=True)

    @property
    def models(self) -> ModelPool:
        """The pool that loads the models it needs: an attached one, or else one of its own."""
        if self._models is None:
            self._models = ModelPool()
        return self._models

    def with_models(self, models: ModelPool) -> Self:
        """Return a copy that loads models through a pool."""
        copy = self.model_copy()
        copy._models = models
        return copy

    def random(self, purpose: str) -> Random:
        """Random numbers of the run's seed for one purpose: draw with them, or every seed gets the first rows."""
        return random_stream(self._seed, self.name, purpose)

    def draw(self, purpose: str, rows: Sequence[T], count: int) -> list[T]:
        """`count` of the rows without replacement, in random order; with `rows=paper` the first ones.

        Raises:
            BadInput: there are fewer.
        """
        if count > len(rows):
            raise too_few_rows(count, purpose, len(rows), by=self.name)
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
        """Hash its code and the code that it inherits, without comments, docstrings and imports.

        An edit that changes behavior makes another artifact; an edit of its wording does not.
        """
        classes = [base for base in cls.__mro__ if issubclass(base, Plugin) and base.__module__ not in _CONTRACT]
        files = dict.fromkeys(inspect.getfile(base) for base in classes)
        return hashlib.sha256("".join(map(_code, files)).encode()).hexdigest()[:16]


class _CodeOnly(ast.NodeTransformer):
    """Remove docstrings, other bare strings and imports."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...


def _code(file: str) -> str:
    """Return the code of a source file in a normal form."""
    return ast.unparse(_CodeOnly().visit(ast.parse(Path(file).read_text(encoding="utf-8"))))


@dataclass(frozen=True)
class Resolved(Generic[P]):
    """A plug-in with every parameter resolved, and the origin of each value."""

    plugin: P
    params: dict[str, Any]
    origins: dict[str, str]
    """Parameter -> `written`, `protocol NAME` or `default: SOURCE`."""

    @property
    def identity(self) -> list[Any]:
        """What an artifact depends on if this plug-in takes part in it: name, parameters, code."""
        return [self.plugin.name, self.params, type(self.plugin).fingerprint()]


def resolve_params(
    cls: type[P], written: Mapping[str, Any], protocol: Mapping[str, Any] | None = None, protocol_name: str = ""
) -> Resolved[P]:
    """Construct a plug-in: what the user wrote wins over the protocol, and the protocol over the class default.

    Raises:
        BadInput: an unknown parameter, or a value outside its range.
    """
    protocol = protocol or {}
    for key in [*protocol, *written]:
        if key not in cls.model_fields:
            raise unknown_name("parameter", key, cls.model_fields, of=f"{cls.kind} {cls.name!r}")
    written = {  # the command line has no other way to write None
        key: None if value == "none" and type(None) in get_args(cls.model_fields[key].annotation) else value
        for key, value in written.items()
    }
    values = {**protocol, **written}
    try:
        plugin = cls(**values)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise BadInput(
            f"{cls.kind} {cls.name!r}: {key}={values.get(key)} is not allowed; allowed: {cls.range_of(key)}."
        ) from error

    def origin(key: str) -> str:
        if key in written:
            return "written"
        if key in protocol:
            return f"protocol {protocol_name}"
        return f"default: {cls.source_of(key)}"

    return Resolved(plugin, plugin.model_dump(mode="json"), {key: origin(key) for key in cls.model_fields})
