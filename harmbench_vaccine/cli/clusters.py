"""The options of `hbv sweep` for SLURM and Ray."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harmbench_vaccine.core.device import VARIABLE
from harmbench_vaccine.core.errors import BadInput, shortened

from .console import SuggestingChoice, print_json, print_line, terminal_progress

if TYPE_CHECKING:
    from harmbench_vaccine.core.progress import Progress
    from harmbench_vaccine.sweeps.remote import RemoteWorker
    from harmbench_vaccine.sweeps.slurm import SlurmArray
    from harmbench_vaccine.sweeps.suite import Suite
    from harmbench_vaccine.sweeps.sweep import Sweep

EXECUTORS = ("local", "slurm", "ray")
CLUSTER_OPTIONS = (
    *("executor", "address", "gpus", "cpus"),
    *("time", "memory", "partition", "account", "slurm", "print_script"),
)
"""Parameters of the command, in the order of its help."""


@dataclass(frozen=True)
class ClusterOptions:
    """The executor of a sweep, and the resources of each worker. A value is None if its option is not given."""

    executor: str
    address: str | None
    time: str | None
    partition: str | None
    account: str | None
    gpus: str | None
    cpus: int | None
    memory: str | None
    slurm: tuple[str, ...]
    print_script: bool

    def time_limit(self) -> int:
        """Return the time limit of each job in seconds.

        Raises:
            BadInput: It is missing or not allowed.
        """
        from harmbench_vaccine.sweeps.remaining_time import parse_time_limit

        if not self.time:
            raise BadInput("--executor slurm needs --time TIME, the time limit of each job, such as 08:00:00.")
        return parse_time_limit(self.time, "--time")

    def check(self) -> None:
        """Check that the options are those of the executor.

        Raises:
            BadInput: An option is for another executor.
        """
        for field in fields(self):
            executors = _EXECUTORS_OF.get(field.name, EXECUTORS)
            if getattr(self, field.name) and self.executor not in executors:
                name = _FLAGS.get(field.name, f"--{field.name}")
                raise BadInput(f"{name} applies to --executor {' or '.join(executors)} only: remove it, or add that.")


_EXECUTORS_OF = {
    "address": ("ray",),
    "gpus": ("slurm", "ray"),
    "cpus": ("slurm", "ray"),
    **dict.fromkeys(("time", "partition", "account", "memory", "slurm", "print_script"), ("slurm",)),
}
_FLAGS = {"print_script": "--print"}


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for clusters to a command, which receives them as `cluster`."""

    @functools.wraps(command)
    def with_cluster(**values: Any) -> Any:
        cluster = ClusterOptions(**{name: values.pop(name) for name in CLUSTER_OPTIONS})
        cluster.check()
        return command(cluster=cluster, **values)

    options = (
        click.option(
            "--executor",
            type=SuggestingChoice(EXECUTORS),
            default="local",
            metavar="NAME",
            help="Where the workers run: local (this machine), slurm (an array of jobs), ray. [default: local]",
        ),
        click.option(
            "--address", metavar="ADDRESS", help="Ray cluster. [default: $RAY_ADDRESS, or a new one on this machine]"
        ),
        click.option("--time", metavar="TIME", help="Time limit of each job, such as 08:00:00 or 1-12:00:00."),
        click.option("--partition", metavar="NAME", help="Partition of SLURM."),
        click.option("--account", metavar="NAME", help="Account of SLURM."),
        click.option(
            "--gpus", metavar="N", help="GPUs of each worker; for SLURM also with a type: a100:1. [default: 1]"
        ),
        click.option("--cpus", type=click.IntRange(1, 1024), metavar="N", help="Cores of each worker."),
        click.option("--memory", metavar="SIZE", help="Memory of each job, such as 64G."),
        click.option(
            "--slurm",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any other option of sbatch, such as qos=high or exclusive. Repeatable.",
        ),
        click.option("--print", "print_script", is_flag=True, help="Print the script for sbatch; submit nothing."),
    )
    for option in reversed(options):
        with_cluster = option(with_cluster)
    return with_cluster


def parse_limit(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Return the value of a time option in seconds, for its callback.

    Raises:
        BadInput: It is not a time.
    """
    from harmbench_vaccine.sweeps.remaining_time import parse_time_limit

    return None if value is None else parse_time_limit(value, option.opts[0])


def submit_to_slurm(
    sweep: Sweep,
    suite: Suite,
    name: str,
    workers: int | None,
    options: ClusterOptions,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Submit a sweep as an array of SLURM jobs, or print the script if that is wanted or submitit is not installed.

    Args:
        sweep: The sweep.
        suite: Its suite.
        name: The suite as the command line names it.
        workers: Number of jobs.
        options: The options of the command.
        retry_failed: Whether stages are tried again that failed too often.
        as_json: Whether the ids of the jobs are printed as JSON.

    Raises:
        BadInput: An option is missing or not allowed, or this machine cannot submit jobs.
    """
    from harmbench_vaccine.sweeps.slurm import check_slurm, has_submitit, sbatch_script, submit_array

    worker = _remote_worker(sweep, suite, options.time_limit())
    array = _slurm_array(sweep.name, workers, worker, options)
    prints = options.print_script or not has_submitit()
    if not prints:
        check_slurm()
    with terminal_progress() as progress:
        sweep.prepare(progress)
    if retry_failed:
        sweep.retry_failed()
    if prints:
        print_line(sbatch_script(array, worker, _absolute_name(name)).rstrip())
        if not options.print_script:
            print_line("Save the script and submit it by sbatch. With submitit installed, hbv submits it.", err=True)
        return
    ids = [job.job_id for job in submit_array(array, worker)]
    if as_json:
        print_json({"jobs": ids})
    else:
        print_line(f"Submitted jobs {', '.join(ids)}. For their progress: hbv sweep {name} --status")


def sweep_on_ray(
    sweep: Sweep, suite: Suite, workers: int | None, options: ClusterOptions, retry_failed: bool, progress: Progress
) -> None:
    """Run a sweep on a Ray cluster, and wait for it. The arguments are those of `submit_to_slurm`.

    Raises:
        BadInput: An option is not allowed, or the cluster cannot be used.
    """
    from harmbench_vaccine.sweeps.ray_cluster import run_on_ray

    gpus = _matched("--gpus", options.gpus, r"\d{1,4}", "a number")
    run_on_ray(
        sweep,
        _remote_worker(sweep, suite, None),
        progress,
        address=options.address,
        workers=workers,
        gpus=int(gpus) if gpus else None,
        cpus=options.cpus,
        retry_failed=retry_failed,
    )


def _remote_worker(sweep: Sweep, suite: Suite, time_limit: int | None) -> RemoteWorker:
    from harmbench_vaccine.sweeps.remote import RemoteWorker

    device = os.environ.get(VARIABLE, "")
    return RemoteWorker(suite, sweep.home, sweep.folder.absolute(), Path.cwd(), device, time_limit)


def _slurm_array(name: str, workers: int | None, worker: RemoteWorker, options: ClusterOptions) -> SlurmArray:
    """Return the array of jobs.

    Raises:
        BadInput: An option is missing or not allowed.
    """
    from harmbench_vaccine.sweeps.slurm import SlurmArray, parse_sbatch_options

    if not workers:
        raise BadInput("--executor slurm needs --workers N, the number of jobs.")
    gpus = r"(?:[A-Za-z][\w.-]*:)?\d{1,4}", "a number, or a type with a number such as a100:1"
    return SlurmArray(
        name=name,
        workers=workers,
        time=options.time or "",
        logs=worker.out,
        gpus=_matched("--gpus", options.gpus, *gpus) or ("0" if worker.device == "cpu" else "1"),
        cpus=options.cpus,
        memory=_matched("--memory", options.memory, r"\d{1,9}[KMGT]?", "a size such as 64G"),
        partition=_matched("--partition", options.partition, r"[\w.,-]+", "the name of a partition"),
        account=_matched("--account", options.account, r"[\w.-]+", "the name of an account"),
        options=parse_sbatch_options(options.slurm),
    )


def _matched(option: str, value: str | None, pattern: str, form: str) -> str:
    """Return the value of an option; empty without the option.

    Raises:
        BadInput: It has another form.
    """
    if value is not None and not re.fullmatch(pattern, value, re.ASCII):
        raise BadInput(f"Invalid {option} {shortened(value)!r}. Expected {form}.")
    return value or ""


def _absolute_name(suite: str) -> str:
    """Return the name of a suite, with the absolute path of a file, for a process with another working directory."""
    from harmbench_vaccine.sweeps.suite import suite_file, suite_names

    return suite if suite in suite_names() else str(suite_file(suite).absolute())
