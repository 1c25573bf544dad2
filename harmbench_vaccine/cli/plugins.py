"""`hbv info`, `hbv new` and `hbv check`: the plug-ins."""

from __future__ import annotations

from shlex import quote

import click

from .completion import described_name, plugin_names, protocol_name
from .console import (
    SuggestingChoice,
    output_options,
    print_json,
    print_line,
    print_view,
    terminal_progress,
    terminal_width,
)
from .device import device_option


@click.command()
@click.argument("name", shell_complete=described_name)
@click.option(
    "--protocol",
    default=None,
    shell_complete=protocol_name,
    metavar="NAME",
    help="Show the values of this protocol next to the defaults.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object for each kind that has the name.")
def info(name: str, protocol: str | None, as_json: bool) -> None:
    """Describe a plug-in, a protocol or a model.

    NAME is the name of a defense, attack, task, scorer, protocol or model, or the file of a plug-in or protocol. Each
    parameter of a plug-in has a default, a range and a source; each value of a protocol has a source.

    \b
    Example: hbv info vaccine --protocol testbed
    A protocol: hbv info vaccine-paper
    """
    from harmbench_vaccine.reporting.info_pages import describe_name, info_page

    pages = describe_name(name, protocol)
    if as_json:
        print_json(pages)
    else:
        for page in pages:
            print_view(info_page(page))


_RUN_OPTIONS = {
    "defense": "--defense {file} --attack ratio=0.1",
    "attack": "--attack {file}+ratio=0.1",
    "task": "--task {file} --attack ratio=0.1",
    "scorer": "--scorer {file} --attack ratio=0.1",
}
"""Kind of plug-in -> the options of `hbv run` for a new file."""


@click.command()
@click.argument("kind", type=SuggestingChoice(list(_RUN_OPTIONS)))
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
    print_line(f"{path}\n\nhbv check {file}\nhbv run {_RUN_OPTIONS[kind].format(file=file)}")


@click.command()
@click.argument("plugin", metavar="FILE|NAME", shell_complete=plugin_names("defenses", "attacks", "tasks", "scorers"))
@device_option("cpu")  # the checks compare bits, which are reproducible on a CPU
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object for each kind that has the name.")
@output_options
@click.pass_context
def check(context: click.Context, plugin: str, as_json: bool) -> None:
    """Test a plug-in against the contract.

    The checks run a defense or an attack for a few steps in a tiny generated world, a scorer on a few answers, and
    a task on its rows. Nothing is downloaded: a model that is not on this machine is left out. Parameters may follow
    the name, as in --defense. The exit code is 1 if a check fails.

    \b
    Example: hbv check ./my_idea.py
    """
    from harmbench_vaccine.plugins.contract import find_plugins, run_contract

    plugins = find_plugins(plugin)
    with terminal_progress() as progress:
        reports = [run_contract(resolved, progress) for resolved in plugins]
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        print_line("\n\n".join("\n".join(report.lines(terminal_width())) for report in reports))
    context.exit(0 if all(report.holds for report in reports) else 1)
