"""The `hbv` command: in this process through its real entry point, or in another process."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
from transformers.utils import logging

from harmbench_vaccine.cli import main

HBV = [sys.executable, "-m", "harmbench_vaccine"]
PROGRESS_LINE = re.compile(r"[\w :+=.,-]+: (\d+ steps?|step \d+ of \d+(, .*)?|done in .*)")
"""A line at the start of a bar, at one of its steps, or at its end."""
logging.disable_progress_bar()  # the command does so itself if it is the first to import transformers


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def results(self) -> list[dict[str, Any]]:
        """Parse the output of --json: exactly one object a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def sentence(self) -> str:
        """Return the only line on stderr that is not a line of progress."""
        lines = [line for line in self.err.splitlines() if line.strip() and not PROGRESS_LINE.fullmatch(line)]
        assert len(lines) == 1, self.err
        return lines[0]


def hbv(*args: object, home: Path | None = None, **environment: str) -> CommandResult:
    """Run the entry point in this process."""
    out, err = io.StringIO(), io.StringIO()
    values = {**({"HBV_HOME": str(home)} if home else {}), **environment}
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["hbv", *map(str, args)]),
        mock.patch.dict(os.environ, values),
        mock.patch.object(warnings, "showwarning", warnings.showwarning),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return CommandResult(int(code or 0), out.getvalue(), err.getvalue())


def start_hbv(*args: object, home: Path, limit: int | None = None) -> subprocess.Popen[str]:
    """Start the command in another process, which can write at most `limit` bytes to a file."""

    def restrict() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for background jobs
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "HBV_HOME": str(home)}
    if limit:  # the limit would apply to the files of coverage too
        environment = {key: value for key, value in environment.items() if not key.startswith("COV")}
    return subprocess.Popen(
        [*HBV, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=restrict,
    )


def finish(running: subprocess.Popen[str], seconds: float = 120) -> CommandResult:
    """Wait for the end of a started command, at most so many seconds."""
    out, err = running.communicate(timeout=seconds)
    return CommandResult(running.returncode, out, err)


def subcommands(group: click.Group) -> dict[str, click.Command]:
    """Return the commands of a group by name, in the order of its help."""
    context = click.Context(group)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in commands.items() if command}
