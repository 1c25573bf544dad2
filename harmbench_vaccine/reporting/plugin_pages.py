"""What the terminal shows of plug-ins: what they declare, and their parameters."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harmbench_vaccine.core.errors import unknown_name
from harmbench_vaccine.plugins import Plugin, resolve_params
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS, Registry, is_plugin_path

if TYPE_CHECKING:
    from harmbench_vaccine.experiment.protocol import Protocol

FACTS: dict[str, tuple[str, ...]] = {
    "defense": (
        "stages", "cost", "once", "memory", "data", "topology", "needs_adapter", "trains", "neutral"
    ),
    "attack": ("trains", "edits_base", "excludes", "neutral"),
    "task": ("dataset", "fields", "chance"),
    "scorer": ("model", "form", "license", "unverified", "comparison_only"),
}  # fmt: skip
"""Kind -> what a class of it declares, besides what every plug-in has."""

_COLUMNS: dict[str, tuple[str, ...]] = {
    "defense": ("name", "stages", "citation", "cost", "once", "memory", "data"),
    "attack": ("name", "citation", "summary", "trains", "excludes"),
    "task": ("name", "summary"),
    "scorer": ("name", "summary", "model", "form", "license", "unverified"),
}
_TITLES = {
    "stages": "stage",
    "cost": "cost a step",
    "memory": "extra memory",
    "data": "needs besides its rows",
    "topology": "needs topology",
    "needs_adapter": "needs an adapter",
    "edits_base": "edits the base model",
    "neutral": "does nothing at",
    "dataset": "data set",
    "fields": "fields of a row",
    "chance": "accuracy of guessing, %",
    "summary": "what it does",
    "form": "kind",
    "comparison_only": "for comparison only",
}
"""Where the heading is not the fact's own name."""


def find_plugin_classes(name: str) -> list[type[Plugin]]:
    """The plug-ins of that name, one for each kind that has it, or the one in the file at that path.

    Raises:
        BadInput: there is none, or it cannot be imported.
    """
    if is_plugin_path(name):
        return [Registry(Plugin, "harmbench_vaccine").get(name)]
    kinds: dict[Registry[Any], list[str]] = {each: list(each.entries()) for each in (DEFENSES, ATTACKS, TASKS, SCORERS)}
    having = [each for each, names in kinds.items() if name.replace("-", "_") in names]
    if not having:
        raise unknown_name("plug-in", name, {known for names in kinds.values() for known in names})
    return [each.get(name) for each in having]


def plugin_facts(cls: type[Plugin]) -> dict[str, Any]:
    """What a plug-in declares: name, kind, the first line of its docstring, citation, and the facts of its kind."""
    return {
        "name": cls.name,
        "kind": cls.kind,
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
        "citation": cls.citation,
        **{key: _fact(cls, key) for key in FACTS[cls.kind]},
    }


def _fact(cls: type[Plugin], key: str) -> Any:
    """What a class declares, or the default of a parameter."""
    return cls.model_fields[key].default if key in cls.model_fields else getattr(cls, key, "")


def plugin_mark(cls: type[Plugin]) -> str:
    """What a name is listed with: a scorer whose interface is not verified, or that is there to compare with."""
    if getattr(cls, "comparison_only", False):
        return "comparison only"
    return "unverified" if getattr(cls, "unverified", "") else ""


def plugin_details(cls: type[Plugin], protocol: Protocol | None = None) -> dict[str, Any]:
    """Its facts, its module's docstring, and every parameter with its default and its value under the protocol.

    Raises:
        BadInput: the protocol gives it a parameter that it does not have, or a value out of range.
    """
    overrides: Mapping[str, Mapping[str, Any]] = getattr(protocol, f"{cls.kind}s", {})
    defaults, values = (resolve_params(cls, {}, given).params for given in ({}, overrides.get(cls.name)))
    return {
        **plugin_facts(cls),
        "doc": (sys.modules[cls.__module__].__doc__ or "").strip(),
        "protocol": protocol and protocol.name,
        "parameters": [
            {
                "name": key,
                "default": defaults[key],
                "value": values[key],
                "range": cls.range_of(key),
                "doc": info.description or "",
                "source": cls.source_of(key),
                "main": key == cls.main_parameter(),
            }
            for key, info in cls.model_fields.items()
        ],
    }


def plugin_table(kind: str, declared: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each plug-in of a kind, given their facts."""
    columns = _COLUMNS[kind]
    table = _table(*[_TITLES.get(column, column) for column in columns])
    for each in declared:
        table.add_row(*[Text(_words(each[column])) for column in columns])
    return table


def plugin_page(about: Mapping[str, Any]) -> RenderableType:
    """Everything that is known of one plug-in, given its details."""
    declared = Table.grid(padding=(0, 2, 0, 0))
    for key in ("citation", *FACTS[about["kind"]]):
        declared.add_row(Text(_TITLES.get(key, key), style="bold"), Text(_words(about[key])))
    title = Text(f"{about['kind']} {about['name']}: {about['summary']}", style="bold")
    parts: list[RenderableType] = [title, Text(about["doc"]), declared]
    if about["parameters"]:
        parts.append(_parameters(about))
    return Group(*[part for each in parts for part in (each, Text())])


def _parameters(about: Mapping[str, Any]) -> RenderableType:
    """The table of parameters, with a column for the values that a protocol overrides."""
    overriding = [about["protocol"]] if about["protocol"] else []
    table = _table("parameter", "default", *overriding, "range", "what it is", "source of the default")
    note = Text(style="dim")
    for each in about["parameters"]:
        override = _value(each["value"]) if each["value"] != each["default"] else ""
        cells = [each["name"], _value(each["default"]), *([override] if overriding else [])]
        table.add_row(*map(Text, [*cells, each["range"], each["doc"], each["source"]]))
        if each["main"]:
            note.append(f"{about['name']}=VALUE sets {each['name']}.")
    return Group(table, note)


def _table(*titles: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _words(fact: Any) -> str:
    """A declared fact; an empty one is none."""
    if isinstance(fact, Mapping):
        return ", ".join(f"{key}={_value(value)}" for key, value in fact.items()) or "none"
    if isinstance(fact, Sequence) and not isinstance(fact, str):
        return ", ".join(map(str, fact)) or "none"
    return "none" if fact == "" else _value(fact)


def _value(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value) or '""'
