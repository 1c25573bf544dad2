"""`hbv sweep`: run a suite on several workers, plan it, or show its state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import ensure_writable, home, user_path

from .clusters import CLUSTER_OPTIONS, ClusterOptions, cluster_options, parse_limit, submit_to_slurm, sweep_on_ray
from .completion import suite_name
from .console import (
    GroupedCommand,
    output_options,
    parse_assignments,
    print_json,
    print_line,
    print_view,
    terminal_progress,
)
from .device import device_option
from .over_refusal import over_refusal_option
from .scorers import scorer_option

if TYPE_CHECKING:
    from harmbench_vaccine.sweeps.suite import Suite
    from harmbench_vaccine.sweeps.sweep import Sweep

_OPTION_GROUPS = {
    "What to do": ("plan", "device_name", "show_status", "retry_failed"),
    "What to run": ("model", "data", "scorers", "over_refusal"),
    "Workers": ("workers", "device", "is_worker", "time_limit"),
    "Clusters": CLUSTER_OPTIONS,
    "Output": ("out", "as_json", "quiet", "verbose", "log_file"),
}


@click.command(cls=GroupedCommand, option_groups=_OPTION_GROUPS)
@click.argument("suite", metavar="SUITE", shell_complete=suite_name)
@click.option(
    "--plan", is_flag=True, help="Show runs, stored stages, time, disk and detectable differences; run nothing."
)
@click.option(
    "--on",
    "device_name",
    metavar="DEVICE",
    default=None,
    help="With --plan: estimate for this device, as hbv run --dry-run does. [default: this machine]",
)
@click.option(
    "--status", "show_status", is_flag=True, help="Show the finished, running and failed stages; run nothing."
)
@click.option("--retry-failed", is_flag=True, help="Try stages again that failed too often.")
@click.option(
    "--model", default=None, metavar="ID", help="Hub id, folder or GGUF file, instead of the model of every run."
)
@click.option("--data", multiple=True, metavar="NAME=PATH", help="Replace a data set of every run. Repeatable.")
@scorer_option("Replace the judges of every run. Repeatable: the first gives the HS.")
@over_refusal_option("Replace the over-refusal sets of every run: xstest or or_bench. Repeatable.")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=None,
    metavar="N",
    help="Number of processes. [default: one for each visible GPU, or 1]",
)
@device_option()
@click.option(
    "--worker", "is_worker", is_flag=True, help="Be one worker, for job scripts: run stages, and print no results."
)
@click.option(
    "--time-limit",
    metavar="TIME",
    callback=parse_limit,
    help="With --worker: start only stages that end within this time, such as 08:00:00.",
)
@cluster_options
@click.option(
    "--out",
    type=user_path,
    default=None,
    metavar="DIR",
    help="Folder of table, costs and logs. [default: $HBV_HOME/sweeps/NAME]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the plan, the state, or one object per run.")
@output_options
def sweep(
    suite: str,
    plan: bool,
    device_name: str | None,
    show_status: bool,
    retry_failed: bool,
    model: str | None,
    data: tuple[str, ...],
    scorers: tuple[str, ...],
    over_refusal: tuple[str, ...],
    workers: int | None,
    is_worker: bool,
    time_limit: int | None,
    cluster: ClusterOptions,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run all runs of a suite, divided among workers.

    SUITE is a name of `hbv list suites`, or a YAML file. The workers share only the store. To resume after an
    interruption, repeat the command; to use several machines, start it on each with the same HBV_HOME.

    \b
    Example: hbv sweep testbed-vaccine-table1 --workers 2
    Before it: hbv sweep testbed-vaccine-table1 --plan
    Meanwhile, in another terminal: hbv sweep testbed-vaccine-table1 --status
    On SLURM: hbv sweep reviewer-pack --executor slurm --workers 8 --time 480
    """
    from harmbench_vaccine.sweeps.suite import load_suite

    modes = {"--plan": plan, "--status": show_status, "--retry-failed": retry_failed, "--worker": is_worker}
    if len(chosen := [name for name, is_set in modes.items() if is_set]) > 1:
        raise BadInput(f"{' and '.join(chosen)} cannot be combined: remove one of them.")
    if device_name and not plan:
        raise BadInput("--on applies to --plan only: add --plan, or remove --on.")
    if time_limit and not is_worker:
        raise BadInput("--time-limit applies to --worker only: add --worker, or remove --time-limit.")
    if cluster.executor != "local" and (plan or show_status or is_worker):
        raise BadInput(f"--executor {cluster.executor} cannot be combined with {chosen[0]}: remove one of them.")
    locations = parse_assignments("--data", "NAME=PATH", data)
    loaded = load_suite(suite).with_replacements(model, locations, scorers, over_refusal)
    if plan:
        _print_plan(loaded, device_name, workers, as_json)
        return
    from harmbench_vaccine.sweeps.sweep import Sweep

    opened = Sweep.open(loaded, home(), out)
    replaces = model or data or scorers or over_refusal
    if replaces and not (show_status or is_worker):  # the workers read what the options have changed
        file = ensure_writable(opened.folder, "The folder of the sweep").absolute() / "suite.yaml"
        loaded.write(file)
        suite = str(file)
    if show_status:
        _print_status(opened, as_json)
    elif is_worker:
        _work(opened, time_limit)
    elif cluster.executor == "slurm":
        submit_to_slurm(opened, loaded, suite, workers, cluster, retry_failed, as_json)
    else:
        _run(opened, loaded, suite, workers, cluster, retry_failed, as_json)


def _print_plan(suite: Suite, device_name: str | None, workers: int | None, as_json: bool) -> None:
    from harmbench_vaccine.reporting.dry_run.devices import Target, find_device
    from harmbench_vaccine.sweeps.plan import sweep_plan_json, sweep_plan_view

    target = Target(find_device(device_name) if device_name else None)
    values = sweep_plan_json(suite, home(), target, workers)
    if as_json:
        print_json(values)
    else:
        print_view(sweep_plan_view(values))


def _print_status(sweep: Sweep, as_json: bool) -> None:
    from harmbench_vaccine.sweeps.monitor import SweepMonitor
    from harmbench_vaccine.sweeps.views import status_json, status_line, status_view, time_left_text

    status = SweepMonitor(sweep).status()
    if as_json:
        print_json(status_json(status))
    else:
        print_line(f"{status.name}: {status_line(status)}{time_left_text(status)}")
        print_view(status_view(status))


def _work(sweep: Sweep, time_limit: int | None) -> None:
    from harmbench_vaccine.sweeps.local import end_with_coordinator
    from harmbench_vaccine.sweeps.remote import run_worker

    end_with_coordinator()
    with terminal_progress() as progress:
        run_worker(sweep, progress, time_limit=time_limit)


def _run(
    sweep: Sweep,
    suite: Suite,
    name: str,
    workers: int | None,
    cluster: ClusterOptions,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Run a sweep, write its table, print the finished runs, and fail if some are missing."""
    from harmbench_vaccine.reporting.result_views import results_table
    from harmbench_vaccine.sweeps.local import run_local

    with terminal_progress() as progress:
        if cluster.executor == "ray":
            sweep_on_ray(sweep, suite, workers, cluster, retry_failed, progress)
        else:
            sweep.prepare(progress)
            if retry_failed:
                sweep.retry_failed()
            run_local(sweep, name, workers, progress)
    results = sweep.results()
    table = sweep.write_outputs()
    if as_json:
        for result in results:
            print_json(result.to_json())
    else:
        for protocol in dict.fromkeys(result.protocol_hash for result in results):
            print_view(results_table([result for result in results if result.protocol_hash == protocol]))
        print_line(f"{len(results)} of {len(sweep.experiments)} runs: {table}")
    sweep.check_complete()
