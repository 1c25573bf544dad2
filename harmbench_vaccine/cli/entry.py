"""The `hbv` command: its group of commands, and the entry point with its error messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib import import_module
from typing import NoReturn

import click

from harmbench_vaccine import __version__
from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.library_settings import set_library_defaults
from harmbench_vaccine.core.signals import Interrupted, handled_signals

from .console import SuggestingGroup, exit_with_error, print_warning
from .log_file import LOG, close_log

_MODULES = {
    "run": "run",
    "sweep": "sweep",
    "tune": "tune",
    "list": "lists",
    "info": "plugins",
    "new": "plugins",
    "check": "plugins",
    "show": "results",
    "why": "why",
    "score": "results",
    "compare": "compare",
    "verify": "verify",
    "leaderboard": "leaderboard",
    "export": "export",
    "edit": "export",
    "judge": "judge",
    "schema": "why",
    "published": "published",
    "testbed": "testbed",
    "store": "store",
    "doctor": "system",
}
"""Command -> its module in this package, in the order of the help."""


class _Commands(SuggestingGroup):
    """The commands of `hbv`. The module of a command is imported when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name, or None."""
        if cmd_name not in _MODULES:
            return None
        module = import_module(f".{_MODULES[cmd_name]}", __package__)
        commands = (value for value in vars(module).values() if isinstance(value, click.Command))
        return next(command for command in commands if command.name == cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hbv")
def commands() -> None:
    """Compare defenses against harmful fine-tuning under one protocol.

    \b
    Example: hbv run --defense sft --defense vaccine --attack ratio=0.1
    """


def main() -> None:
    """Run the command line, and report a failure in one line with its exit code.

    Exit codes: 2 bad input, 1 a failure while running, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    set_library_defaults()
    warnings.showwarning = lambda message, *rest, **named: print_warning(str(message))
    try:
        with handled_signals():
            code = _run_command()
    finally:
        close_log()
    distributed.end_process(code)


def _run_command() -> int:
    try:
        _check_surroundings()
        distributed.initialize()
        code = commands.main(standalone_mode=False)
        distributed.shutdown()
        LOG.info("finished")
    except HbvError as error:
        exit_with_error(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        exit_with_error(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort) as error:
        _exit_after_signal(error)
    except Exception as error:
        if os.environ.get("HBV_DEBUG"):
            raise
        if isinstance(error, OSError) and error.strerror:  # of a disk, a path or the output, not of this program
            exit_with_error(f"{error.filename or 'Reading or writing failed'}: {error.strerror}.", 1)
        exit_with_error(f"unexpected {type(error).__name__}: {error} (HBV_DEBUG=1 shows the traceback)", 1)
    return code if isinstance(code, int) else 0


def _exit_after_signal(error: BaseException) -> NoReturn:
    cause = error.__cause__ if isinstance(error, click.Abort) else error  # click translates every KeyboardInterrupt
    number = cause.number if isinstance(cause, Interrupted) else signal.SIGINT
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    exit_with_error(f"interrupted by {name}. Repeat the command to resume.", 128 + number)


def _check_surroundings() -> None:
    """Check what every command needs: arguments that are text, and a working directory.

    Raises:
        BadInput: An argument is not text, or the working directory was deleted.
    """
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"Argument {argument!r} is not UTF-8 text.") from error
    try:
        os.getcwd()
    except OSError as error:
        raise BadInput(f"The working directory is gone ({error.strerror}): change to another folder.") from error
