"""Pages of `hbv list --verbose` and `hbv info`: the facts and the parameters of plug-ins."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Defense, Plugin, TuningGrid, resolve_params
from harmbench_vaccine.plugins.declarations import read_declarations
from harmbench_vaccine.plugins.grid import COUNT
from harmbench_vaccine.plugins.registry import Registry

from .docstrings import docstring_blocks, split_note
from .evidence import departures_of, evidence_text
from .render import Column, VisibleText, dim_notes, number_column, render_fields, render_table

if TYPE_CHECKING:
    from harmbench_vaccine.experiment.protocol import Protocol

FACTS: dict[str, tuple[str, ...]] = {
    "defense": (
        *("stages", "cost", "once", "memory", "data", "topology"),
        *("needs_adapter", "needs_alignment", "trains", "neutral"),
    ),
    "attack": ("trains", "edits_base", "excludes", "neutral"),
    "task": ("measure", "dataset", "fields", "chance"),
    "scorer": ("model", "form", "cost", "license", "unverified", "comparison_only"),
}
"""Kind -> the attributes that its classes declare, in addition to those of every plug-in."""

_COLUMNS: dict[str, tuple[Column, ...]] = {
    "defense": (
        Column("stages", least=8),
        Column("citation", least=10),
        Column("evidence", least=16),
        number_column("departures"),
        Column("cost", least=10),
        Column("once", least=20),
        Column("memory", least=16),
        Column("data"),
    ),
    "attack": (
        Column("citation", least=10),
        Column("evidence", least=16),
        number_column("departures"),
        Column("summary", least=30),
        Column("trains", wrap=False),
        Column("excludes"),
    ),
    "task": (
        Column("title", least=30),
        Column("summary", least=30),
        Column("measure", least=8),
        Column("dataset", wrap=False),
        number_column("chance"),
    ),
    "scorer": (
        Column("summary", least=30),
        Column("model", least=16),
        Column("form", wrap=False),
        Column("license", least=16),
        Column("unverified", least=20),
    ),
}
"""Kind -> the facts of `hbv list --verbose` next to the name; the title of each is the key of the fact. None is left
out: in a narrow terminal, each plug-in is a list of these fields."""
_TITLES = {
    "stages": "stage",
    "cost": "cost of a step",
    "memory": "extra memory",
    "data": "needs other rows",
    "topology": "needs topology",
    "needs_adapter": "needs a user adapter",
    "needs_alignment": "needs an alignment stage",
    "edits_base": "edits the base model",
    "neutral": "no effect at",
    "dataset": "data set",
    "fields": "fields of a row",
    "chance": "accuracy of guessing, %",
    "title": "description",
    "summary": "description",
    "form": "kind",
    "comparison_only": "for comparison only",
}
"""Headings that differ from the name of the fact."""
ANSWERS = "answers"
"""The stage of a defense that only replaces answers."""
SOURCED = ("defense", "attack")
"""Kinds of plug-ins that have evidence and departures."""
_INDENT, _LEAST_NOTE = 4, 20
"""Columns before an equation and before its note, and the least width of notes."""


def plugin_facts(cls: type[Plugin]) -> dict[str, Any]:
    """Return name, kind, the first line of the docstring, citation, evidence, departures, and the facts of the kind."""
    sourced = {"evidence": evidence_text(cls), "departures": departures_of(cls)} if cls.kind in SOURCED else {}
    return {
        "name": cls.name,
        "kind": cls.kind,
        "title": (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0],
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
        "citation": cls.citation,
        **sourced,
        **{key: _fact(cls, key) for key in FACTS[cls.kind]},
    }


def _fact(cls: type[Plugin], key: str) -> Any:
    """Return an attribute of a class, or the default of a parameter."""
    return cls.model_fields[key].default if key in cls.model_fields else getattr(cls, key, "")


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
        **({"tuned": _tuned(cls.grid, values)} if issubclass(cls, Defense) else {}),
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


def _tuned(grid: TuningGrid | None, params: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the parameter that `hbv tune` chooses -> its values; empty if there are none around its default."""
    with suppress(BadInput, TypeError):  # a protocol may switch the defense off, or leave its parameter open
        return {grid.parameter: grid.values(params[grid.parameter], COUNT)} if grid else {}
    return {}


def plugin_table(kind: str, plugins: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Build a table with a row for each plug-in of a kind, from their facts."""
    facts = _COLUMNS[kind]
    columns = [replace(column, title=_title(kind, column.title)) for column in facts]
    rows = [[plugin["name"], *(_shown(column.title, plugin) for column in facts)] for plugin in plugins]
    return render_table([Column("name", wrap=False), *columns], rows)


def _title(kind: str, fact: str) -> str:
    return "rule" if (kind, fact) == ("task", "summary") else _TITLES.get(fact, fact)


def plugin_list(registry: Registry[Any]) -> RenderableType:
    """Build the list of the installed plug-ins of a kind, without importing them where possible."""
    kind = registry.base.kind
    marks = ("unverified", "comparison_only")
    declarations = read_declarations(registry, ("stages", "measure", *marks))
    rows = []
    for name, entry in registry.entries().items():
        if (declared := declarations[name]) is None:
            rows.append([name, "", "", "cannot be imported"])
            continue
        fact = {"defense": ", ".join(declared.facts["stages"]) or ANSWERS, "task": declared.facts["measure"]}.get(
            kind, ""
        )
        notes = ["package" if entry.origin == "package" else ""]
        notes += [mark.replace("_", " ") for mark in marks if declared.facts[mark]]
        text = declared.title if kind == "task" else declared.summary
        rows.append([name, fact, text, ", ".join(filter(None, notes))])
    columns = [
        Column("name", wrap=False),
        Column("stage" if kind == "defense" else "measure", wrap=False),
        Column("description", least=30),
        Column("note", wrap=False),
    ]
    return render_table(columns, rows)


def plugin_page(details: Mapping[str, Any]) -> RenderableType:
    """Build the page of one plug-in from its details."""
    facts = render_fields(fact_fields(details))
    title = VisibleText(f"{details['kind']} {details['name']}: {details['summary']}", style="bold")
    parts: list[RenderableType] = [title, *_docstring(details["doc"]), facts]
    if details["parameters"]:
        parts.append(_parameters(details))
    return Group(*[line for part in parts for line in (part, VisibleText())])


def fact_fields(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the title and the text of every fact of a plug-in."""
    keys = ("citation", *(["evidence"] if "evidence" in details else []), *FACTS[details["kind"]])
    fields = [(_TITLES.get(key, key), _shown(key, details)) for key in keys]
    for parameter, values in details.get("tuned", {}).items():
        fields.append(("values of hbv tune", f"{parameter} = {', '.join(f'{value:g}' for value in values)}"))
    return fields


def _docstring(text: str) -> Iterator[RenderableType]:
    """Yield the paragraphs of a docstring; the notes of equations wrap in their own column."""
    for paragraph in re.split(r"\n\s*\n", text):
        yield Group(*(_DOC_VIEWS[block.kind](block.lines) for block in docstring_blocks(paragraph)))


class _Equations:
    """Equations with their notes in a second column, of which the formulas have the first claim on the width."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.rows = [split_note(line) for line in lines]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        formulas, notes = zip(*self.rows, strict=True)
        room = options.max_width - _INDENT - (_INDENT + _LEAST_NOTE if any(notes) else 0)
        table = Table.grid(padding=(0, _INDENT, 0, 0), pad_edge=False)
        table.add_column(width=min(room, max(map(cell_len, formulas))))
        for cells in self.rows:
            table.add_row(*map(VisibleText, cells))
        yield Padding(table, (0, 0, 0, _INDENT))


def _departures(lines: Sequence[str]) -> RenderableType:
    """Build the list of departures under its heading; the lines of one departure have the same indent."""
    heading, *departures = lines
    table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    for departure in departures:
        table.add_row("-", VisibleText(departure))
    return Group(VisibleText(f"{heading}:"), table)


_DOC_VIEWS: dict[str, Callable[[Sequence[str]], RenderableType]] = {
    "prose": lambda lines: VisibleText(re.sub(r"\n(?!- )\s*", " ", "\n".join(lines))),  # one line for each list item
    "equations": _Equations,
    "commands": lambda lines: VisibleText("\n".join(" " * _INDENT + line for line in lines)),
    "departures": _departures,
}


def _parameters(details: Mapping[str, Any]) -> RenderableType:
    """Build the table of parameters, with a column for the values that a protocol overrides."""
    protocols = [details["protocol"]] if details["protocol"] else []
    rows, notes = [], []
    for parameter in details["parameters"]:
        name, default, value = (parameter[key] for key in ("name", "default", "value"))
        override = parameter_text(value) if value != default else ""
        cells = [name, parameter_text(default), *([override] if protocols else [])]
        rows.append([*cells, parameter["range"], parameter["doc"], parameter["source"]])
        if parameter["main"]:
            notes.append(f"{details['name']}=VALUE sets {name}.")
    columns = [
        Column("parameter", wrap=False),
        Column("default", least=8),
        *(Column(name, least=8) for name in protocols),
        Column("range", least=10),
        Column("description", least=20),
        Column("source of the default", least=16),
    ]
    return Group(render_table(columns, rows), *dim_notes(notes))


def _shown(key: str, facts: Mapping[str, Any]) -> str:
    """Return a fact as text; a defense without a stage replaces answers, and departures are counted."""
    if key == "departures":
        return "not stated" if facts[key] is None else str(len(facts[key]))
    return ANSWERS if key == "stages" and not facts[key] else _fact_text(facts[key])


def _fact_text(fact: Any) -> str:
    """Format a fact; an empty one is `none`."""
    if isinstance(fact, Mapping):
        return ", ".join(f"{key}={parameter_text(value)}" for key, value in fact.items()) or "none"
    if isinstance(fact, Sequence) and not isinstance(fact, str):
        return "all others" if tuple(fact) == ("*",) else ", ".join(map(str, fact)) or "none"
    return "none" if fact == "" else parameter_text(fact)


def parameter_text(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value) or '""'
