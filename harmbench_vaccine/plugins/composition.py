"""Plug-ins on the command line: parse `vaccine:rho=5+ewc`, construct the plug-ins, and format their canonical name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from harmbench_vaccine.core.errors import BadInput, shortened

from .base import Plugin, Resolved, resolve_params
from .registry import Registry, is_plugin_path

P = TypeVar("P", bound=Plugin)

KEYWORDS = {"lambda": "lam"}
"""Parameters whose names in the papers are Python keywords."""


class Component(BaseModel):
    """One plug-in as the user wrote it. The empty key holds the value of the main parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    params: dict[str, str | int | float | bool] = Field(default_factory=dict)


Composition = tuple[Component, ...]


_GRAMMAR = "Write name, name=VALUE or name:key=value,key=value; + composes."


def parse_plugins(text: str) -> Composition:
    """Parse a text such as `vaccine:rho=5+ewc`, `ratio=0.1,samples=500` or `./mine.py:lambda=3`.

    Raises:
        BadInput: The text does not follow the grammar.
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


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_RANGE = re.compile(r"(\d{1,19})\.\.(\d{1,19})")
_RANGE_OF_ANY_NUMBERS = re.compile(r"(?=.*\d)[-+.\deE]*\.\.[-+.\deE]*")
_MOST_VALUES = 10_000


def expand_values(text: str) -> list[str]:
    """Return one text for every combination of the values that a text lists for its parameters.

    A number without a name is another value of the parameter before it: `ratio=0,0.05,samples=500` is
    `ratio=0,samples=500` and `ratio=0.05,samples=500`. `1..3` is 1, 2 and 3.

    Raises:
        BadInput: A range is not one of whole numbers, or there are too many combinations.
    """
    parts = [_listed_values(part, text) for part in re.split(r"\+(?!\d)", text)]
    combinations = math.prod(len(values) for items in parts for values in items)
    if combinations > _MOST_VALUES:
        raise BadInput(f"{shortened(text)!r} lists {combinations} combinations; allowed: at most {_MOST_VALUES}.")
    composed = product(*([",".join(items) for items in product(*part)] for part in parts))
    return list(dict.fromkeys("+".join(part) for part in composed))


def _listed_values(part: str, text: str) -> list[list[str]]:
    """Return `name=VALUE` with every listed value, for each parameter of one plug-in of a composition."""
    parameters: list[list[str]] = []
    prefix = ""
    for item in part.split(","):
        value = item.strip()
        if prefix and (_NUMBER.fullmatch(value) or _RANGE_OF_ANY_NUMBERS.fullmatch(value)):
            parameters[-1] += [prefix + each for each in expand_range(value, text)]
            continue
        name, equals, value = item.rpartition("=")
        prefix = name + equals
        parameters.append([prefix + each for each in expand_range(value, text)])
    return parameters


def expand_range(text: str, of: str) -> list[str]:
    """Return the whole numbers of a range such as `0..4`, both ends included; another text is returned as it is.

    Args:
        text: The text.
        of: The text that contains it, for the error.

    Raises:
        BadInput: The range is empty or too long, or its ends are not whole numbers.
    """
    written = text.strip()
    if not _RANGE_OF_ANY_NUMBERS.fullmatch(written):
        return [text]
    match = _RANGE.fullmatch(written)
    first, last = map(int, match.groups()) if match else (0, -1)
    if not first <= last < first + _MOST_VALUES:
        raise BadInput(
            f"Range {shortened(written)!r} of {shortened(of)!r} is not allowed: write FIRST..LAST with whole numbers, "
            f"for example 0..4, and at most {_MOST_VALUES} of them; separate other numbers by commas."
        )
    return [str(number) for number in range(first, last + 1)]


def _name(name: str, text: str) -> str:
    name = name.strip()
    if not (is_plugin_path(name) or re.fullmatch(r"[A-Za-z_][\w-]*", name)):
        raise BadInput(f"{text!r} cannot be parsed: {name!r} is not a valid name. {_GRAMMAR}")
    return name if is_plugin_path(name) else name.replace("-", "_")


def _params(written: str, text: str) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for item in written.split(","):
        key, value = _pair(item, text)
        if key in params:
            raise BadInput(f"{text!r} sets {key!r} twice. {_GRAMMAR}")
        params[key] = value
    return params


def _pair(item: str, text: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"{text!r} cannot be parsed at {item!r}. {_GRAMMAR}")
    return KEYWORDS.get(key.strip(), key.strip()), _value(value, text)


def _value(value: str, text: str) -> str:
    if not value.strip():
        raise BadInput(f"{text!r} has no value after '='. {_GRAMMAR}")
    return value.strip()


def resolve_plugins(
    composition: Composition, registry: Registry[P], protocol: Mapping[str, Mapping[str, Any]], protocol_name: str
) -> list[Resolved[P]]:
    """Construct every component: find its class and resolve its parameters.

    Args:
        composition: The plug-ins as the user wrote them.
        registry: The registry of their classes.
        protocol: Plug-in name -> parameter -> value.
        protocol_name: The protocol's name, which becomes the origin of those values.

    Raises:
        BadInput: A name or parameter is unknown, a value is out of range, or a name occurs twice.
    """
    resolved: list[Resolved[P]] = []
    for component in composition:
        cls = registry.get(component.name)
        written: dict[str, Any] = {}
        for key, value in component.params.items():
            if key == "" and cls.main_parameter() is None:
                raise BadInput(f"{cls.kind} {cls.name!r} takes no bare value: it has no main parameter. {_GRAMMAR}")
            written[key or str(cls.main_parameter())] = value
        if any(earlier.plugin.name == cls.name for earlier in resolved):
            raise BadInput(f"{cls.kind} {cls.name!r} is named twice; write it once with all its parameters.")
        resolved.append(resolve_params(cls, written, protocol.get(cls.name), protocol_name))
    return resolved


def canonical_name(resolved: Iterable[Resolved[Plugin]]) -> str:
    """Format plug-ins as on the command line, with only the parameters that the user set."""
    return "+".join(map(_canonical_component, resolved))


def _canonical_component(resolved: Resolved[Plugin]) -> str:
    plugin = resolved.plugin
    written = {key: _plain(value) for key, value in resolved.params.items() if resolved.origins[key] == "written"}
    main = plugin.main_parameter()
    if main in written and len(written) == 1:
        return f"{plugin.name}={written[main]}"
    params = ",".join(f"{key}={value}" for key, value in written.items())
    return f"{plugin.name}:{params}" if params else plugin.name


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()  # as on the command line
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
