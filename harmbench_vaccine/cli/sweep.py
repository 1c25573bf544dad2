"""`hbv sweep`: run a suite on several workers, show its plan or its state."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.paths import home

from .console import SuggestingChoice, output_options, print_json, print_line, print_view, terminal_progress
from .device import device_option

if TYPE_CHECKING:
    from harmbench_vaccine.sweeps.sweep import Sweep


@click.command()
@click.argument("suite")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="N", help="Processes.")
@click.option("--status", "show_status", is_flag=True, help="Show what is done, running and failed; run nothing.")
@click.option("--retry-failed", is_flag=True, help="Try the stages again that failed too often.")
@click.option("--worker", "is_worker", is_flag=True, hidden=True)
@device_option()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@output_options
def sweep(
    suite: str, workers: int, show_status: bool, retry_failed: bool, is_worker: bool, as_json: bool
) -> None:
    """Run all runs of a suite, divided among workers.

    SUITE is a name of `hbv list suites` or a YAML file. Workers share only the store, so that the command can be
    repeated after an interruption, and started on several machines with the same HBV_HOME.

    \b
    Example: hbv sweep testbed-vaccine-table1 --workers 2
    """
    opened = _open_sweep(suite)
    if is_worker:
        _work(opened)
