"""`hbv list`: plug-ins, protocols, models and suites by name, and the stored runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .completion import plugin_names, protocol_name
from .console import SuggestingGroup, print_json, print_view, print_warning

if TYPE_CHECKING:
    from harmbench_vaccine.plugins.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])  # any function, as click.option takes it

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")


@click.group(name="list", cls=SuggestingGroup)
def list_() -> None:
    """List plug-ins, protocols, models, suites or stored runs.

    \b
    Example: hbv list defenses
    """


def _verbose(text: str) -> Callable[[F], F]:
    return click.option("--verbose", is_flag=True, help=text)


@list_.command()
@_verbose("Show citation, evidence, cost, memory and the rows that each needs.")
@_AS_JSON
def defenses(verbose: bool, as_json: bool) -> None:
    """List the defenses with their stages.

    \b
    Example: hbv list defenses --verbose
    """
    from harmbench_vaccine.plugins.registry import DEFENSES

    _print_plugins(DEFENSES, verbose, as_json)


@list_.command()
@_verbose("Show citation, evidence, whether each trains, and the attacks that it excludes.")
@_AS_JSON
def attacks(verbose: bool, as_json: bool) -> None:
    """List the attacks.

    \b
    Example: hbv list attacks --verbose
    """
    from harmbench_vaccine.plugins.registry import ATTACKS

    _print_plugins(ATTACKS, verbose, as_json)


@list_.command()
@_verbose("Show the rule of each, its data set, and the accuracy of guessing.")
@_AS_JSON
def tasks(verbose: bool, as_json: bool) -> None:
    """List the tasks of the user, with the measure of each.

    \b
    Example: hbv list tasks --verbose
    """
    from harmbench_vaccine.plugins.registry import TASKS

    _print_plugins(TASKS, verbose, as_json)
    if not as_json:
        print_view("Your own rows: --task ./rows.jsonl, with the fields instruction and output; see hbv info own.")


@list_.command()
@_verbose("Show model, kind, license and unverified parts of each.")
@_AS_JSON
def scorers(verbose: bool, as_json: bool) -> None:
    """List the scorers: judges of harm.

    \b
    Example: hbv list scorers --verbose
    """
    from harmbench_vaccine.plugins.registry import SCORERS

    _print_plugins(SCORERS, verbose, as_json)


def _print_plugins(registry: Registry[Any], verbose: bool, as_json: bool) -> None:
    from harmbench_vaccine.reporting.plugin_pages import plugin_facts, plugin_list, plugin_table

    if verbose:
        facts = [plugin_facts(cls) for cls in registry.loadable().values()]
        if as_json:
            print_json(facts)
        else:
            print_view(plugin_table(registry.base.kind, facts))
    elif as_json:
        print_json(list(registry.entries()))
    else:
        print_view(plugin_list(registry))


@list_.command()
@_verbose("Show version, hash, model, data sizes, judge and rule of each.")
@_AS_JSON
def protocols(verbose: bool, as_json: bool) -> None:
    """List the built-in protocols.

    \b
    Example: hbv list protocols --verbose
    """
    from harmbench_vaccine.experiment.protocol import protocol_names
    from harmbench_vaccine.reporting.protocol_pages import protocol_facts, protocol_table

    if as_json and not verbose:
        print_json(protocol_names())
        return
    facts = [protocol_facts(name) for name in protocol_names()]
    if as_json:
        print_json(facts)
    else:
        print_view(protocol_table(facts, verbose))


@list_.command()
@_verbose("Show which are on this machine; with --json also the protocols of each.")
@_AS_JSON
def models(verbose: bool, as_json: bool) -> None:
    """List the models of the built-in protocols.

    \b
    Example: hbv list models --verbose
    """
    from harmbench_vaccine.reporting.protocol_pages import locate_models, model_facts, model_table

    facts = locate_models(model_facts()) if verbose else model_facts()
    if as_json:
        print_json(facts if verbose else [model["name"] for model in facts])
    else:
        print_view(model_table(facts))


@list_.command()
@_AS_JSON
def suites(as_json: bool) -> None:
    """List the suites that ship with the package, for hbv sweep.

    \b
    Example: hbv list suites
    """
    from harmbench_vaccine.sweeps.suite import suite_names
    from harmbench_vaccine.sweeps.views import suites_view

    if as_json:
        print_json(suite_names())
    else:
        print_view(suites_view())


def _name_filter(column: str, **options: Any) -> Callable[[F], F]:
    text = f"Only runs with this {column}. Repeatable."
    return click.option(f"--{column}", multiple=True, metavar="NAME", help=text, **options)


@list_.command()
@_name_filter("defense", shell_complete=plugin_names("defenses"))
@_name_filter("attack", shell_complete=plugin_names("attacks"))
@_name_filter("task", shell_complete=plugin_names("tasks"))
@_name_filter("protocol", shell_complete=protocol_name)
@_name_filter("model")
@click.option(
    "--since", default=None, metavar="DATE", help="Only runs since a date (2026-01-31) or an age (12h, 7d, 2w)."
)
@click.option("--collapsed", is_flag=True, help="Only runs whose final model fails a validity gate.")
@click.option(
    "--limit", type=click.IntRange(1), default=None, metavar="N", help="Number of runs. [default: 20; with --json all]"
)
@_AS_JSON
def runs(since: str | None, collapsed: bool, limit: int | None, as_json: bool, **filters: tuple[str, ...]) -> None:
    """List the stored runs in $HBV_HOME/runs, the newest first.

    A name of a plug-in also finds runs with parameters and compositions: vaccine finds vaccine:rho=5+ewc.

    \b
    Example: hbv list runs --defense vaccine --since 7d
    """
    from datetime import UTC, datetime

    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.reporting.run_list import list_runs, parse_since, run_list_view, select_listed_runs

    earliest = parse_since(since, datetime.now(UTC)) if since is not None else None
    stored, problems = list_runs(home() / "runs")
    selected = select_listed_runs(stored, filters, earliest, collapsed)
    for problem in problems:
        print_warning(problem)
    if as_json:
        print_json([run.to_json() for run in selected[:limit]])
    else:
        print_view(run_list_view(selected, limit or 20, len(stored), home() / "runs"))
