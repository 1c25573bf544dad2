"""`hbv list`, `hbv info`, `hbv new` and `hbv check`: the plug-ins."""

from __future__ import annotations

import os
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.experiment.protocol import load_protocol, protocol_models, protocol_names

from .completion import plugin_names, protocol_name
from .console import print_json, print_line, print_view, terminal_progress

if TYPE_CHECKING:
    from harmbench_vaccine.plugins.registry import Registry


@click.command(name="list")
@click.argument("kind", type=click.Choice(["defenses", "attacks", "tasks", "scorers", "protocols", "models"]))
@click.option("--verbose", is_flag=True, help="Show citation, cost and requirements of each.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_(kind: str, verbose: bool, as_json: bool) -> None:
    """List the names that other commands accept.

    \b
    Example: hbv list defenses --verbose
    """
    from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS

    registries: dict[str, Registry[Any]] = {
        "defenses": DEFENSES,
        "attacks": ATTACKS,
        "tasks": TASKS,
        "scorers": SCORERS,
    }
    if verbose:
        if kind not in registries:
            raise BadInput(f"--verbose does not support {kind}; allowed: {', '.join(registries)}.")
        _print_facts(registries[kind], as_json)
    elif kind not in registries:
        _print_names(dict.fromkeys(protocol_names() if kind == "protocols" else protocol_models(), ""), as_json)
    else:
        from harmbench_vaccine.reporting.plugin_pages import plugin_mark

        origins = {name: entry.origin for name, entry in registries[kind].entries().items()}
        marks = {name: plugin_mark(cls) for name, cls in SCORERS.loadable().items()} if kind == "scorers" else {}
        notes = {
            name: ", ".join(filter(None, ["" if origin == "built-in" else origin, marks.get(name, "")]))
            for name, origin in origins.items()
        }
        _print_names(notes, as_json)


def _print_names(notes: dict[str, str], as_json: bool) -> None:
    """Print names, each with its note in brackets."""
    if as_json:
        print_json(list(notes))
        return
    for name, note in notes.items():
        print_line(f"{name}  ({note})" if note else name)


def _print_facts(registry: Registry[Any], as_json: bool) -> None:
    from harmbench_vaccine.reporting.plugin_pages import plugin_facts, plugin_table

    facts = [plugin_facts(cls) for cls in registry.loadable().values()]
    if as_json:
        print_json(facts)
    else:
        print_view(plugin_table(registry.base.kind, facts))


@click.command()
@click.argument("name", shell_complete=plugin_names("defenses", "attacks", "tasks", "scorers"))
@click.option(
    "--protocol",
    default=None,
    shell_complete=protocol_name,
    metavar="NAME",
    help="Show the values of this protocol next to the defaults.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object for each kind that has the name.")
def info(name: str, protocol: str | None, as_json: bool) -> None:
    """Describe a plug-in and its parameters.

    NAME is the name of a defense, attack, task or scorer, or its file. Each parameter has a default, a range and a
    source.

    \b
    Example: hbv info vaccine --protocol testbed
    """
    from harmbench_vaccine.reporting.plugin_pages import find_plugin_classes, plugin_details, plugin_page

    loaded = load_protocol(protocol) if protocol else None
    pages = [plugin_details(cls, loaded) for cls in find_plugin_classes(name)]
    if as_json:
        print_json(pages)
    else:
        for page in pages:
            print_view(plugin_page(page))


@click.command()
@click.argument("kind", type=click.Choice(["defense", "attack"]))
@click.argument("name")
@click.option("--dir", "folder", default=".", show_default=True, metavar="DIR", help="Folder of the new file.")
def new(kind: str, name: str, folder: str) -> None:
    """Write a plug-in file to start from.

    NAME.py runs as it is; the command prints how to check and run it.

    \b
    Example: hbv new defense my_idea
    """
    from harmbench_vaccine.plugins.scaffold import write_scaffold

    path = write_scaffold(kind, name, folder)
    file = quote(path)
    plugins = f"--defense {file} --attack ratio=0.1" if kind == "defense" else f"--attack {file}+ratio=0.1"
    print_line(f"{path}\n\nhbv check {file}\nhbv run {plugins}")


@click.command()
@click.argument("plugin", metavar="FILE|NAME", shell_complete=plugin_names("defenses", "attacks"))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object for each kind that has the name.")
@click.pass_context
def check(context: click.Context, plugin: str, as_json: bool) -> None:
    """Test a defense or an attack against the contract.

    The checks run it for a few steps in a tiny generated world, without downloads. Parameters may follow the name, as
    in --defense. The exit code is 1 if a check fails.

    \b
    Example: hbv check ./my_idea.py
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the checks compare bits, which are reproducible on a CPU
    from harmbench_vaccine.plugins.contract import find_plugins, run_contract

    plugins = find_plugins(plugin)
    with terminal_progress() as progress:
        reports = [run_contract(resolved, progress) for resolved in plugins]
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        print_line("\n\n".join("\n".join(report.lines()) for report in reports))
    context.exit(0 if all(report.holds for report in reports) else 1)
