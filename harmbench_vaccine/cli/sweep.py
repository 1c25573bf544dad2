"""`hbv sweep`: run a suite on several workers, or show its state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.paths import home

from .console import output_options, print_json, print_line, print_view, terminal_progress
from .device import device_option

if TYPE_CHECKING:
    from harmbench_vaccine.sweeps.sweep import Sweep


@click.command()
@click.argument("suite", metavar="SUITE")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=None,
    metavar="N",
    help="Number of processes. [default: one for each visible GPU, or 1]",
)
@click.option(
    "--status", "show_status", is_flag=True, help="Show the finished, running and failed stages; run nothing."
)
@click.option("--retry-failed", is_flag=True, help="Try stages again that failed too often.")
@click.option("--worker", "is_worker", is_flag=True, hidden=True, help="Be one of the workers.")
@device_option()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the state, or one object per run.")
@output_options
def sweep(
    suite: str, workers: int | None, show_status: bool, retry_failed: bool, is_worker: bool, as_json: bool
) -> None:
    """Run all runs of a suite, divided among workers.

    SUITE is the name of a suite that ships with hbv, or a YAML file. The workers share only the store. To resume after
    an interruption, repeat the command; to use several machines, start it on each with the same HBV_HOME.

    \b
    Example: hbv sweep testbed-vaccine-table1 --workers 2
    State, from another terminal: hbv sweep testbed-vaccine-table1 --status
    """
    from harmbench_vaccine.sweeps.suite import load_suite
    from harmbench_vaccine.sweeps.sweep import Sweep

    opened = Sweep.open(load_suite(suite), home())
    if show_status:
        _print_status(opened, as_json)
        return
    if retry_failed:
        opened.retry_failed()
    if is_worker:
        _work(opened)
        return
    from harmbench_vaccine.sweeps.local import run_local

    with terminal_progress() as progress:
        opened.prepare(progress)
        run_local(opened, suite, workers, progress)
    _print_results(opened, as_json)


def _print_status(sweep: Sweep, as_json: bool) -> None:
    from harmbench_vaccine.sweeps.sweep import SweepMonitor
    from harmbench_vaccine.sweeps.views import status_json, status_view

    monitor = SweepMonitor(sweep)
    status = monitor.status()
    seconds = monitor.seconds_left(status)
    if as_json:
        print_json(status_json(status, seconds))
    else:
        print_view(status_view(sweep.name, status, seconds))


def _work(sweep: Sweep) -> None:
    from harmbench_vaccine.sweeps.shared_store import SharedStore
    from harmbench_vaccine.sweeps.worker import work

    with terminal_progress() as progress:
        work(sweep.experiments, SharedStore(sweep.store, progress), sweep.runs, progress=progress)


def _print_results(sweep: Sweep, as_json: bool) -> None:
    """Write the table, print the finished runs, and fail if some are missing.

    Raises:
        HbvError: Some runs have no result.
    """
    from harmbench_vaccine.reporting.result_views import results_table
    from harmbench_vaccine.sweeps.sweep import SweepMonitor

    results = sweep.results()
    table = sweep.write_table()
    if as_json:
        for result in results:
            print_json(result.to_json())
    elif results:
        print_view(results_table(results))
        print_line(f"{len(results)} of {len(sweep.experiments)} runs: {table}")
    if len(results) < len(sweep.experiments):
        parked = SweepMonitor(sweep).status().parked
        reason = f" {parked[0].name} failed {parked[0].attempts} times: {parked[0].reason}" if parked else ""
        raise HbvError(
            f"{len(sweep.experiments) - len(results)} of {len(sweep.experiments)} runs have no result.{reason} "
            f"The logs are in {sweep.folder}; --status lists the failed stages, and --retry-failed tries them again."
        )
