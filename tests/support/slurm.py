"""A SLURM cluster for tests: `sbatch`, `srun` and `scontrol` that run the jobs of an array on this machine.

A job has the variables of SLURM and starts again after `scontrol requeue`. Its first execution may receive SIGTERM, as
it does shortly before its time limit.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

FIRST_JOB = 4711
"""The id of the first array; the next one has the next id."""
_SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == --output ]] && shift; shift; done
echo $$ > "$STUB_FOLDER/$SLURM_ARRAY_JOB_ID/pid-$SLURM_ARRAY_TASK_ID"
exec "$@"
"""
_SCONTROL = """#!/bin/bash
echo "$@" >> "$STUB_FOLDER/$SLURM_ARRAY_JOB_ID/requeued-$SLURM_ARRAY_TASK_ID"
"""


def install(folder: Path, *, interrupted_at: Path | None = None) -> dict[str, str]:
    """Write the programs to a folder, and return the environment variables with which a command finds them.

    Args:
        folder: The folder.
        interrupted_at: A pattern of paths: the first execution of each job receives SIGTERM when one of them exists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    programs = {
        "srun": _SRUN,
        "scontrol": _SCONTROL,
        "sbatch": f'#!/bin/bash\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n',
    }
    for name, text in programs.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    return {"PATH": path, "STUB_FOLDER": str(folder), "STUB_INTERRUPT": str(interrupted_at or "")}


def directives(script: str) -> dict[str, str]:
    """Return the options of the `#SBATCH` lines of a script; an option without a value has an empty one."""
    options = {}
    for line in re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE):
        for word in shlex.split(line):
            name, _, value = word.removeprefix("--").partition("=")
            assert word.startswith("--"), word
            assert name not in options, name
            options[name] = value
    return options


def wait_for_jobs(folder: Path, count: int, seconds: float = 600.0) -> list[list[int]]:
    """Wait until so many jobs of all arrays have ended, and return the exit codes of the executions of each."""
    end = time.monotonic() + seconds
    while len(paths := sorted(folder.glob("*/ended-*"))) < count:
        assert time.monotonic() < end, sorted(folder.rglob("*"))
        time.sleep(0.1)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _submit(script: Path | None) -> None:
    """Be `sbatch`: start the jobs in the background, and print the id of the array."""
    folder = Path(os.environ["STUB_FOLDER"])
    text = script.read_text(encoding="utf-8") if script else sys.stdin.read()
    job = FIRST_JOB + len(list(folder.glob("[0-9]*")))
    (folder / str(job)).mkdir()
    (folder / str(job) / "script.sh").write_text(text, encoding="utf-8")
    first, last = map(int, re.match(r"(\d+)-(\d+)", directives(text).get("array", "0-0")).groups())  # type: ignore[union-attr]
    for number in range(first, last + 1):
        command = [sys.executable, __file__, "--job", str(job), str(number)]
        # without pipes: submitit waits for the end of both
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(command, start_new_session=True, **streams)  # type: ignore[call-overload]
    print(f"Submitted batch job {job}")


def _run_job(array: int, number: int) -> None:
    """Run a job until it ends without a request to start it again."""
    folder = Path(os.environ["STUB_FOLDER"]) / str(array)
    options = directives((folder / "script.sh").read_text(encoding="utf-8"))
    output = options["output"].replace("%A", str(array)).replace("%a", str(number))
    minutes = int(options["time"]) if options["time"].isdecimal() else 60 * int(options["time"].split(":")[0])
    codes: list[int] = []
    while True:
        environment = {
            **os.environ,
            "SLURM_JOB_ID": f"{array}00{number}",
            "SLURM_ARRAY_JOB_ID": str(array),
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_JOB_END_TIME": str(int(time.time()) + 60 * minutes),
            "SLURM_RESTART_COUNT": str(len(codes)),
        }
        with open(output, "ab") as log:
            job = subprocess.Popen(
                ["bash", str(folder / "script.sh")],
                cwd=options.get("chdir"),
                env=environment,
                stdout=log,
                stderr=log,
            )
            if not codes and (pattern := os.environ["STUB_INTERRUPT"]):
                while job.poll() is None and not glob(pattern):
                    time.sleep(0.05)
                os.kill(int((folder / f"pid-{number}").read_text()), signal.SIGTERM)
            codes.append(job.wait())
        try:
            (folder / f"requeued-{number}").rename(folder / f"request-{number}")
        except FileNotFoundError:
            break
    (folder / f"ended-{number}").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        _run_job(int(sys.argv[2]), int(sys.argv[3]))
    else:
        _submit(Path(sys.argv[1]) if sys.argv[1:] else None)
