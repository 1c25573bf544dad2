"""Pages of `hbv list protocols`, `hbv list models` and `hbv info PROTOCOL`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding

from harmbench_vaccine.core.progress import format_duration
from harmbench_vaccine.data.text_files import read_text
from harmbench_vaccine.experiment.protocol import Protocol, leaf_values, load_protocol, protocol_file, protocol_names

from .render import Column, VisibleText, dim_notes, number_column, render_fields, render_table

_FACTS = {
    "version": "version",
    "hash": "hash",
    "base": "changes protocol",
    "model": "model",
    "models": "further models",
    "align_rows": "alignment rows",
    "align_instructions": "benign instructions in the alignment",
    "user_rows": "user rows",
    "harmful_prompts": "harmful prompts",
    "test_items": "test items",
    "scorer": "judge",
    "judge": "model of the judge",
    "accuracy": "rule of FA",
}
"""Key of a fact -> its title."""


def protocol_facts(name: str) -> dict[str, Any]:
    """Return the facts of a protocol that a reader compares first.

    Args:
        name: The name of a built-in protocol, or a YAML file.

    Raises:
        BadInput: It does not exist, or a value of the file is not allowed.
    """
    protocol = load_protocol(name)
    return {
        "name": protocol.name,
        "kind": "protocol",
        "description": _paragraphs(name)[0],
        "version": protocol.version,
        "hash": protocol.hash,
        "base": protocol.base,
        "model": protocol.model,
        "models": list(protocol.models),
        "align_rows": protocol.align.rows,
        "align_instructions": protocol.align.instructions,
        "user_rows": protocol.finetune.samples,
        "harmful_prompts": protocol.answer.harmful.prompts,
        "test_items": protocol.answer.task_items,
        "scorer": protocol.score.scorer,
        "judge": protocol.score.judge,
        "accuracy": protocol.score.accuracy,
    }


def protocol_details(name: str) -> dict[str, Any]:
    """Return the facts of a protocol, the comment at the top of its file, and every value with its source.

    Raises:
        BadInput: It does not exist, or a value of the file is not allowed.
    """
    protocol = load_protocol(name)
    return {
        **protocol_facts(name),
        "doc": "\n\n".join(_paragraphs(name)),
        "values": _values(protocol),
        "tuning": {defense: cost.model_dump() for defense, cost in protocol.tuning.items()},
    }


def _paragraphs(name: str) -> list[str]:
    """Return the paragraphs of the comment at the top of a protocol file; only indented lines begin a new line."""
    lines = []
    for line in read_text(protocol_file(name)).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return list(map(_join_lines, "\n".join(lines).strip("\n").split("\n\n")))


def _join_lines(paragraph: str) -> str:
    """Join the lines of prose, and each indented line with the further indented ones below it."""
    joined: list[str] = []
    for line in paragraph.splitlines():
        before, here = (_indent(text) for text in (joined[-1] if joined else "", line))
        if joined and (here == before == 0 or here > before > 0):
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line.rstrip())
    return "\n".join(joined)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _values(protocol: Protocol) -> list[dict[str, Any]]:
    """Return every value with its source; `changed` is True if the base of an overlay does not have the value."""
    base = dict(leaf_values(load_protocol(protocol.base))) if protocol.base else {}
    return [
        {
            "path": path,
            "value": value,
            "source": protocol.source_of(path),
            "changed": bool(protocol.base) and (path not in base or base[path] != value),
        }
        for path, value in leaf_values(protocol)
        if path not in ("name", "version")
    ]


def protocol_table(protocols: Sequence[Mapping[str, Any]], verbose: bool) -> RenderableType:
    """Build the list of protocols from their facts."""
    if not verbose:
        rows = [[facts["name"], facts["model"], facts["description"]] for facts in protocols]
        return render_table(
            [Column("name", wrap=False), Column("model", wrap=False, drop=1), Column("description", least=30)], rows
        )
    columns = [  # none is left out: in a narrow terminal, each protocol is a list of these fields
        Column("name", wrap=False),
        number_column("version"),
        Column("hash", wrap=False),
        Column("model", wrap=False),
        number_column("alignment rows"),
        number_column("user rows"),
        number_column("harmful prompts"),
        number_column("test items"),
        Column("judge", wrap=False),
        Column("rule of FA", least=8),
        Column("description", least=30),
    ]
    keys = ("name", "version", "hash", "model", "align_rows", "user_rows", "harmful_prompts", "test_items", "scorer")
    rows = [[str(facts[key]) for key in (*keys, "accuracy", "description")] for facts in protocols]
    return render_table(columns, rows)


def protocol_page(details: Mapping[str, Any]) -> RenderableType:
    """Build the page of one protocol from its details: its facts, and one list of values for each section."""
    title = VisibleText(f"protocol {details['name']}: {details['description']}", style="bold")
    facts = render_fields(
        (text, value_text(details[key]))
        for key, text in _FACTS.items()
        if details[key] or key not in ("base", "align_instructions")
    )
    _, _, doc = details["doc"].partition("\n\n")
    parts: list[RenderableType] = [title, *([_comment(doc)] if doc else []), facts]
    values = [entry for entry in details["values"] if entry["changed"] or not details["base"]]
    parts += [_section(list(entries)) for _, entries in groupby(values, _section_of)]
    if details["tuning"]:
        parts.append(_tuning(details["tuning"]))
    notes = ["--set PATH=VALUE of hbv run overrides a value: --set align.settings.lr=1e-4."]
    if details["base"]:
        notes.insert(0, f"All other values are those of {details['base']}: hbv info {details['base']}")
    return Group(*[line for part in parts for line in (part, VisibleText())], *dim_notes(notes))


def _comment(text: str) -> RenderableType:
    """Build the paragraphs of a comment; where a line is folded, all its parts have its indent."""
    lines = text.split("\n")
    return Group(*(Padding(VisibleText(line.strip() or " "), (0, 0, 0, _indent(line)), expand=False) for line in lines))


def _section(values: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Build the list of the values of a section; values with one source share a line that names it."""
    section = _section_of(values[0])
    names = {entry["path"]: entry["path"].removeprefix(f"{section}.") for entry in values}
    parts: list[RenderableType] = [VisibleText(section, style="bold underline")]
    for source, entries in groupby(values, lambda entry: entry["source"]):
        fields = [(names[entry["path"]], value_text(entry["value"])) for entry in entries]
        parts.append(render_fields(fields, name_width=max(map(len, names.values()))))
        parts += dim_notes([f"  from: {source}"] if source else [])
    return Group(*parts)


def _tuning(costs: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Build the list of the costs of a tuning, by defense."""
    fields = [(name, f"{cost['runs']} runs, {format_duration(cost['seconds'])}") for name, cost in costs.items()]
    return Group(VisibleText("tuning", style="bold underline"), render_fields(fields))


def _section_of(entry: Mapping[str, Any]) -> str:
    section, dot, _ = entry["path"].partition(".")
    return section if dot else "protocol"


def value_text(value: Any) -> str:
    """Format a protocol value as YAML would; a list without brackets."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) or '""'


# ---------------------------------------------------------------------------------------------------------------------
# Models


def model_facts() -> list[dict[str, Any]]:
    """Return the models of the built-in protocols with the protocols that use them, by name."""
    models: dict[str, dict[str, Any]] = {}
    for protocol in map(load_protocol, protocol_names()):
        for model in (protocol.model, *protocol.models):
            facts = models.setdefault(model, {"name": model, "kind": "model", "default_of": [], "also_of": []})
            facts["default_of" if model == protocol.model else "also_of"].append(protocol.name)
    return [models[name] for name in sorted(models)]


def locate_models(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the facts of models, and whether each is `available` on this machine without a download."""
    from harmbench_vaccine.data.sources import is_available  # loads the library of the Hub

    return [{**facts, "available": is_available(facts["name"])} for facts in models]


def model_table(models: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Build the list of models from their facts, with or without those of `locate_models`."""
    rows = [
        [
            facts["name"],
            {True: "yes", False: "no", None: ""}[facts.get("available")],
            ", ".join(facts["default_of"]),
            ", ".join(facts["also_of"]),
        ]
        for facts in models
    ]
    columns = [Column("model", wrap=False), Column("on this machine", wrap=False)]
    return render_table([*columns, Column("default of protocol"), Column("also in the tables of")], rows)


def model_page(facts: Mapping[str, Any]) -> RenderableType:
    """Build the page of one model from its facts."""
    texts = {"default of protocol": facts["default_of"], "also in the tables of": facts["also_of"]}
    return Group(
        VisibleText(f"model {facts['name']}", style="bold"),
        render_fields((text, ", ".join(names)) for text, names in texts.items() if names),
        *dim_notes(
            [f"Run it: hbv run --protocol {[*facts['default_of'], *facts['also_of']][0]} --model {facts['name']}"]
        ),
    )
