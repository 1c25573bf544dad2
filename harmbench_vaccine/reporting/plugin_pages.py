"""Pages of `hbv list --verbose` and `hbv info`: the facts and the parameters of plug-ins."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from harmbench_vaccine.core.errors import unknown_name
from harmbench_vaccine.plugins import Plugin, resolve_params
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS, Registry, is_plugin_path

from .render import Column, VisibleText, dim_notes, render_fields, render_table

if TYPE_CHECKING:
    from harmbench_vaccine.experiment.protocol import Protocol

FACTS: dict[str, tuple[str, ...]] = {
    "defense": ("stages", "cost", "once", "memory", "data", "topology", "needs_adapter", "trains", "neutral"),
    "attack": ("trains", "edits_base", "excludes", "neutral"),
    "task": ("dataset", "fields", "chance"),
    "scorer": ("model", "form", "license", "unverified", "comparison_only"),
}
"""Kind -> the attributes that its classes declare, in addition to those of every plug-in."""

_COLUMNS: dict[str, tuple[str, ...]] = {
    "defense": ("name", "stages", "citation", "cost", "once", "memory", "data"),
    "attack": ("name", "citation", "summary", "trains", "excludes"),
    "task": ("name", "summary"),
    "scorer": ("name", "summary", "model", "form", "license", "unverified"),
}
_TITLES = {
    "stages": "stage",
    "cost": "cost of a step",
    "memory": "extra memory",
    "data": "needs other rows",
    "topology": "needs topology",
    "needs_adapter": "needs an adapter",
    "edits_base": "edits the base model",
    "neutral": "no effect at",
    "dataset": "data set",
    "fields": "fields of a row",
    "chance": "accuracy of guessing, %",
    "summary": "description",
    "form": "kind",
    "comparison_only": "for comparison only",
}
"""Headings that differ from the name of the fact."""


def find_plugin_classes(name: str) -> list[type[Plugin]]:
    """Find the plug-ins of a name, at most one of each kind, or the plug-in in a file.

    Args:
        name: A name, or the path of a file.

    Raises:
        BadInput: The name is unknown, or the plug-in cannot be imported.
    """
    if is_plugin_path(name):
        return [Registry(Plugin, "harmbench_vaccine").get(name)]
    registries: tuple[Registry[Any], ...] = (DEFENSES, ATTACKS, TASKS, SCORERS)
    names = {registry: list(registry.entries()) for registry in registries}
    matches = [registry for registry in registries if name.replace("-", "_") in names[registry]]
    if not matches:
        raise unknown_name("plug-in", name, {known for registry in registries for known in names[registry]})
    return [registry.get(name) for registry in matches]


def plugin_facts(cls: type[Plugin]) -> dict[str, Any]:
    """Return name, kind, the first line of the docstring, citation, and the facts of the kind."""
    return {
        "name": cls.name,
        "kind": cls.kind,
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
        "citation": cls.citation,
        **{key: _fact(cls, key) for key in FACTS[cls.kind]},
    }


def _fact(cls: type[Plugin], key: str) -> Any:
    """Return an attribute of a class, or the default of a parameter."""
    return cls.model_fields[key].default if key in cls.model_fields else getattr(cls, key, "")


def plugin_mark(cls: type[Plugin]) -> str:
    """Return the mark of a scorer in a list: its interface is not verified, or it is only for comparison."""
    if getattr(cls, "comparison_only", False):
        return "comparison only"
    return "unverified" if getattr(cls, "unverified", "") else ""


def plugin_details(cls: type[Plugin], protocol: Protocol | None = None) -> dict[str, Any]:
    """Return the facts, the docstring of the module, and every parameter with its default and its value.

    Args:
        cls: The class of a plug-in.
        protocol: The protocol that overrides parameters; None: all values are defaults.

    Raises:
        BadInput: The protocol sets an unknown parameter or a value out of range.
    """
    overrides: Mapping[str, Mapping[str, Any]] = getattr(protocol, f"{cls.kind}s", {})
    defaults, values = (resolve_params(cls, {}, params).params for params in ({}, overrides.get(cls.name)))
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


def plugin_table(kind: str, plugins: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Build a table with a row for each plug-in of a kind, from their facts."""
    columns = _COLUMNS[kind]
    rows = [[_fact_text(facts[column]) for column in columns] for facts in plugins]
    return render_table([Column(_TITLES.get(column, column), wrap=column != "name") for column in columns], rows)


def plugin_page(details: Mapping[str, Any]) -> RenderableType:
    """Build the page of one plug-in from its details."""
    keys = ("citation", *FACTS[details["kind"]])
    facts = render_fields((_TITLES.get(key, key), _fact_text(details[key])) for key in keys)
    title = VisibleText(f"{details['kind']} {details['name']}: {details['summary']}", style="bold")
    parts: list[RenderableType] = [title, VisibleText(_reflow(details["doc"])), facts]
    if details["parameters"]:
        parts.append(_parameters(details))
    return Group(*[line for part in parts for line in (part, VisibleText())])


def _reflow(text: str) -> str:
    """Join the lines of each paragraph, so that the terminal wraps it; indented lines (equations) stay as they are."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


def _parameters(details: Mapping[str, Any]) -> RenderableType:
    """Build the table of parameters, with a column for the values that a protocol overrides."""
    protocols = [details["protocol"]] if details["protocol"] else []
    rows, notes = [], []
    for parameter in details["parameters"]:
        name, default, value = (parameter[key] for key in ("name", "default", "value"))
        override = _value_text(value) if value != default else ""
        cells = [name, _value_text(default), *([override] if protocols else [])]
        rows.append([*cells, parameter["range"], parameter["doc"], parameter["source"]])
        if parameter["main"]:
            notes.append(f"{details['name']}=VALUE sets {name}.")
    columns = ["parameter", "default", *protocols, "range", "description", "source of the default"]
    return Group(render_table(columns, rows), *dim_notes(notes))


def _fact_text(fact: Any) -> str:
    """Format a fact; an empty one is `none`."""
    if isinstance(fact, Mapping):
        return ", ".join(f"{key}={_value_text(value)}" for key, value in fact.items()) or "none"
    if isinstance(fact, Sequence) and not isinstance(fact, str):
        return ", ".join(map(str, fact)) or "none"
    return "none" if fact == "" else _value_text(fact)


def _value_text(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value) or '""'
