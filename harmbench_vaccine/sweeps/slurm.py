"""Run a sweep as an array of identical SLURM jobs: through submitit, or by a script for `sbatch`.

A job that the time limit interrupts, or that ends because no stage fits into its remaining time, is put into the queue
again, and then continues from the last checkpoint. SLURM does the same for a job whose node fails.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput, HbvError, shortened
from harmbench_vaccine.core.signals import Interrupted

from .remaining_time import SIGNAL_SECONDS, parse_time_limit
from .remote import RemoteWorker, TimeTooShort

MOST_RESTARTS = 20
"""Restarts of a job by its own script, so that a stage that never fits does not use up the account."""
_SIGTERM_CODE = 143
_OPTIONS_OF_HBV = {
    "array": "--workers",
    "time": "--time",
    "partition": "--partition",
    "account": "--account",
    "cpus-per-task": "--cpus",
    "mem": "--memory",
}
"""Option of sbatch -> the option of hbv that sets it."""
_FIXED_OPTIONS = ("output", "error", "open-mode", "requeue", "no-requeue", "signal", "nodes", "ntasks", "chdir", "wrap")
"""Options of sbatch on which a worker depends."""
_GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")


@dataclass(frozen=True)
class SlurmArray:
    """An array of identical jobs, one for each worker, and the resources of each job."""

    name: str
    """The name of the sweep."""
    workers: int
    time: str
    """Time limit of each job, as SLURM writes it."""
    logs: Path
    """Folder of the output of the jobs."""
    gpus: str = "1"
    """Number of GPUs, or type and number such as `a100:1`; "0": none."""
    cpus: int | None = None
    memory: str = ""
    partition: str = ""
    account: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch; an option without a value has an empty one."""

    def directives(self) -> dict[str, str]:
        """Return the options of sbatch for the resources and the end of each job."""
        has_gpus = self.gpus != "0" and not any(name in self.options for name in _GPU_OPTIONS)
        values = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "gres": f"gpu:{self.gpus}" if has_gpus else "",
            "cpus-per-task": str(self.cpus or ""),
            "mem": self.memory,
        }
        written = {name: value for name, value in values.items() if value}
        return {**written, "signal": f"TERM@{SIGNAL_SECONDS}", "requeue": "", **self.options}

    def variables(self, worker: RemoteWorker) -> dict[str, str]:
        """Return the environment variables of each job.

        srun does not take the number of cores from the options of its job, but from a variable.
        """
        values = {"HBV_HOME": str(worker.home), "HBV_DEVICE": worker.device}
        cores = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SRUN_CPUS_PER_TASK"), str(self.cpus or ""))
        return {name: value for name, value in {**values, **cores}.items() if value}


def parse_sbatch_options(items: Sequence[str]) -> dict[str, str]:
    """Parse further options of sbatch, each as KEY=VALUE or KEY.

    Raises:
        BadInput: An item has another form, or hbv sets the option.
    """
    options = {}
    for item in items:
        key, equals, value = item.partition("=")
        name = key.removeprefix("--").replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or bool(equals) != bool(value) or not value.isprintable():
            raise BadInput(
                f"Invalid --slurm {shortened(item)!r}. Expected KEY=VALUE or KEY, an option of sbatch such as qos=high."
            )
        if name in _OPTIONS_OF_HBV:
            raise BadInput(f"--slurm {name} is not allowed: use {_OPTIONS_OF_HBV[name]}.")
        if name in _FIXED_OPTIONS:
            raise BadInput(f"--slurm {name} is not allowed: the workers of a sweep depend on its value.")
        options[name] = value
    return options


def sbatch_script(array: SlurmArray, worker: RemoteWorker, suite: str) -> str:
    """Return a complete script for `sbatch`.

    Args:
        array: The array of jobs.
        worker: The worker of each job.
        suite: The suite as the command line of the worker names it.
    """
    directives = {
        "job-name": f"hbv-{array.name}",
        "array": f"0-{array.workers - 1}",
        "output": str(array.logs / "slurm-%A_%a.log"),
        "open-mode": "append",
        "chdir": str(worker.folder),
        **array.directives(),
    }
    options = [f"--{name}={shlex.quote(value)}" if value else f"--{name}" for name, value in directives.items()]
    command = [sys.executable, "-m", "harmbench_vaccine", "sweep", suite]
    command += ["--out", str(worker.out), "--worker", "--time-limit", array.time]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "",
        *_exports(array.variables(worker)),
        f"srun {shlex.join(command)}",
        *_requeue_lines(),
    ]
    return "\n".join(lines) + "\n"


def submit_array(array: SlurmArray, worker: RemoteWorker, cluster: str = "slurm") -> list[Any]:
    """Submit an array through submitit.

    Args:
        array: The array of jobs.
        worker: The worker of each job.
        cluster: The executor of submitit: `slurm`, or `local` for processes on this machine.

    Returns:
        The jobs of submitit.

    Raises:
        HbvError: SLURM refused the jobs.
    """
    import submitit

    executor = submitit.AutoExecutor(array.logs / "submitit", cluster=cluster)
    executor.update_parameters(
        name=f"hbv-{array.name}",
        timeout_min=-(-parse_time_limit(array.time, "--time") // 60),
        stderr_to_stdout=True,
        slurm_array_parallelism=array.workers,
        slurm_additional_parameters={name: value or True for name, value in array.directives().items()},
        slurm_setup=_exports(array.variables(worker)),
        slurm_teardown=_requeue_lines(),
    )
    utils = submitit.core.utils
    try:
        with redirect_stderr(StringIO()):  # submitit prints the output of sbatch, which the error contains
            return executor.map_array(_SlurmJob(worker), range(array.workers))
    except (utils.FailedJobError, utils.FailedSubmissionError) as error:
        raise HbvError(f"SLURM refused the jobs: {error}") from error


def check_slurm() -> None:
    """Check that this machine can submit jobs.

    Raises:
        BadInput: It does not have the programs of SLURM.
    """
    missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
    if missing:
        raise BadInput(
            f"SLURM program {missing[0]!r} is not installed here: submit on a machine of the cluster, or add --print."
        )


def has_submitit() -> bool:
    """Return whether submitit is installed."""
    return find_spec("submitit") is not None


@dataclass(frozen=True)
class _SlurmJob:
    """The function of a submitit job: a worker with the exit codes on which the script of the job decides."""

    worker: RemoteWorker

    def __call__(self, number: int) -> list[str]:
        """Run the worker; return the ids of the runs that it finished."""
        try:
            return self.worker(number).finished
        except Interrupted as error:
            sys.exit(128 + error.number)
        except TimeTooShort as error:
            print(error)
            sys.exit(error.exit_code)


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _requeue_lines() -> list[str]:
    """Return the end of the script of a job: start it again if its worker has more to do than time."""
    return [
        "code=$?",
        f"# {_SIGTERM_CODE}: the time limit ended the worker. {TimeTooShort.exit_code}: no stage fits into the rest.",
        f'if [[ $code =~ ^({_SIGTERM_CODE}|{TimeTooShort.exit_code})$ && "${{SLURM_RESTART_COUNT:-0}}" -lt '
        f"{MOST_RESTARTS} ]]; then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $code",
    ]
