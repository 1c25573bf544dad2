"""The generated pages of the documentation site: one for each plug-in and each protocol, from the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

from equations import equation_table

from harmbench_vaccine.experiment.protocol import protocol_file, protocol_names
from harmbench_vaccine.plugins.base import Plugin
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS, Registry
from harmbench_vaccine.reporting.docstrings import docstring_blocks
from harmbench_vaccine.reporting.plugin_pages import fact_fields, parameter_text, plugin_details
from harmbench_vaccine.reporting.protocol_pages import protocol_details, value_text
from harmbench_vaccine.reporting.published.matching import MatchedFigure, Params, load_names, matched_figures

ROOT = Path(__file__).parents[2]
REGISTRIES: dict[str, Registry[Any]] = {"defenses": DEFENSES, "attacks": ATTACKS, "tasks": TASKS, "scorers": SCORERS}
"""Folder of the site -> the plug-ins that have a page in it."""


def plugin_classes(registry: Registry[Any]) -> dict[str, type[Plugin]]:
    """Return the built-in plug-ins of a kind by name; those of other installed packages have no page."""
    return {name: registry.get(name) for name, entry in registry.entries().items() if entry.origin == "built-in"}


def generated_pages() -> Iterator[tuple[str, str, str]]:
    """Yield (folder, name, Markdown) of every generated page."""
    for folder, registry in REGISTRIES.items():
        for name, cls in plugin_classes(registry).items():
            yield folder, name, plugin_markdown(cls)
    for name in protocol_names():
        yield "protocols", name, protocol_markdown(name)


def source_path(cls: type[Plugin]) -> str:
    """Return the path of the file of a class inside the repository."""
    return Path(inspect.getfile(cls)).resolve().relative_to(ROOT).as_posix()


def plugin_markdown(cls: type[Plugin]) -> str:
    """Return the page of one plug-in."""
    details = plugin_details(cls)
    parts = [
        f"# {details['name']}",
        f"*{escape_markdown(details['summary'])}*",
        docstring_markdown(details["doc"]),
        "## Facts",
        table(["fact", "value"], [(title, _linked(text)) for title, text in fact_fields(details)]),
    ]
    if details["parameters"]:
        parts += ["## Parameters", *_parameters(details)]
    if cls.kind == "defense":
        parts += _published(details["name"])
    source = source_path(cls)
    command = f"hbv info {details['name']}"
    parts += ["## Source", f"[{source}]({ROOT.as_uri()}/{source})", f"```sh\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def protocol_markdown(name: str) -> str:
    """Return the page of one protocol: the comment of its file, and every value with its source."""
    details, path = protocol_details(name), Path(protocol_file(name))
    values = [
        (f"`{entry['path']}`", escape_markdown(value_text(entry["value"])), escape_markdown(entry["source"]))
        for entry in details["values"]
    ]
    parts = [
        f"# {name}",
        *map(_comment_markdown, details["doc"].split("\n\n")),
        table(["fact", "value"], [(key, str(details[key])) for key in ("version", "hash")]),
        "## Values",
        "The page on [protocol files](../protocols.md) explains the keys.",
        table(["key", "value", "source"], values),
        "## Source",
        f"[{path.name}]({path.as_uri()})",
    ]
    return "\n\n".join(parts) + "\n"


def _comment_markdown(paragraph: str) -> str:
    """Return a paragraph of a comment; one with indented lines keeps its line breaks."""
    lines = paragraph.splitlines()
    if not any(line.startswith(" ") for line in lines):
        return escape_markdown(paragraph)
    language = "sh" if lines[0].strip().startswith("hbv ") else "text"
    return f"```{language}\n{dedent(paragraph)}\n```"


def docstring_markdown(text: str) -> str:
    """Return the Markdown of a docstring: prose, equations as MathML, commands as code, departures as a list."""
    views = {
        "prose": lambda lines: escape_markdown("\n".join(lines)),
        "equations": equation_table,
        "commands": lambda lines: "\n".join(["```sh", *lines, "```"]),
        "departures": lambda lines: "\n".join(
            [f"{lines[0]}:\n", *(f"- {escape_markdown(line)}" for line in lines[1:])]
        ),
    }
    return "\n\n".join(views[block.kind](block.lines) for block in docstring_blocks(text))


def escape_markdown(text: str) -> str:
    """Escape the characters that Markdown interprets, outside code spans."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>|])", r"\\\1", part) for part in parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines)


def _linked(text: str) -> str:
    """Return the text of a fact, with a link to a paper on arXiv."""
    pattern = r"(arXiv (\d{4}\.\d{5}))"
    return re.sub(pattern, r"[\1](https://arxiv.org/abs/\2)", escape_markdown(text))


def _parameters(details: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            f"`{parameter['name']}`",
            f"`{parameter_text(parameter['default'])}`",
            *(escape_markdown(parameter[key]) for key in ("range", "doc", "source")),
        )
        for parameter in details["parameters"]
    ]
    yield table(["parameter", "default", "range", "description", "source of the default"], rows)
    for parameter in details["parameters"]:
        if parameter["main"]:
            yield f"`{details['name']}=VALUE` sets `{parameter['name']}`."


def _published(name: str) -> Iterator[str]:
    """Yield the section of the published figures of a defense."""
    figures = {
        protocol: [m for m in matched_figures(protocol) if name in m.defense] for protocol in load_names().protocols
    }
    if not any(figures.values()):
        return
    yield "## Published figures"
    yield (
        "Scores in percent, from the papers. Compare a figure only to figures of the same protocol, model, task and "
        "attack; one in doubt may be for another setting. The page on [published figures](../published.md) explains "
        "the evidence."
    )
    for protocol, matches in figures.items():
        if matches:
            yield f"### {protocol}"
            yield _figure_table(matches)


def _figure_table(matches: Sequence[MatchedFigure]) -> str:
    """Return a table in which the harmful score and the accuracy of one experiment share a row."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for matched in matches:
        rows.setdefault(_experiment_cells(matched), {})[matched.score] = matched.figure["value"]
    columns = ["HS", "FA", "source", "model", "task", "p", "n", "defense", "evidence"]
    scores = ("harmful_score", "finetune_accuracy")
    return table(columns, [[*(values.get(score, "") for score in scores), *cells] for cells, values in rows.items()])


def _experiment_cells(matched: MatchedFigure) -> tuple[str, ...]:
    figure = matched.figure
    cells = [f"{figure['paper']}, {figure['table']}", matched.model.rpartition("/")[2], matched.task]
    cells += [f"{matched.ratio:g}", ", ".join(map(str, matched.samples)), _composition(matched.defense)]
    return tuple(map(escape_markdown, [*cells, figure["evidence"] + (", in doubt" if matched.doubts else "")]))


def _composition(defense: Params) -> str:
    """Return a defense as on the command line, with spaces at which the cell wraps."""
    parts = [(name, ", ".join(f"{key}={value}" for key, value in params.items())) for name, params in defense.items()]
    return " + ".join(f"{name}: {params}" if params else name for name, params in parts)
