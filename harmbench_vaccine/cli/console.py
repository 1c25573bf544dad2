"""Output of the commands: views, lines, JSON, progress, and one-line errors with their exit codes.

Characters that act on a terminal or hide text are escaped in everything that is printed.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput, shortened, unknown_name
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.core.visible import visible, visible_json

from .log_file import LOG, has_log, open_log

if TYPE_CHECKING:
    from rich.console import RenderableType

    from harmbench_vaccine.core.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])  # any function, as click.option takes it

WIDTH_WITHOUT_TERMINAL = 100
"""Columns of tables in the output of a command that no terminal shows, such as a batch job."""
LONGEST_WORD, LONGEST_MESSAGE = 300, 5000
"""Letters of an error message, and of a word in it, such as a path."""


class SuggestingGroup(click.Group):
    """A group of commands that suggests the nearest name for an unknown command."""

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command in the arguments.

        Raises:
            BadInput: The group does not have such a command.
        """
        if args and self.get_command(context, args[0]) is None and not args[0].startswith("-"):
            raise unknown_name("command", args[0], self.list_commands(context))
        return super().resolve_command(context, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the section of commands, with whole first sentences; click cuts those that need a second line."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(LONGEST_MESSAGE)) for name, command in commands.items() if command]
            )


class GroupedCommand(click.Command):
    """A command whose help shows the options under headings.

    Args:
        option_groups: Heading -> names of the parameters under it. Options without a group follow under "Other".
    """

    def __init__(self, *args: Any, option_groups: Mapping[str, Sequence[str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.option_groups = option_groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group."""
        records = {
            str(param.name): record
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None
        }
        groups = [(title, [records.pop(name) for name in names]) for title, names in self.option_groups.items()]
        for title, group in [*groups, ("Other", list(records.values()))]:
            with formatter.section(title):
                formatter.write_dl(group)


class FiniteRange(click.FloatRange):
    """A range of numbers; click's own lets NaN pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert a text to a number of the range."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


class SuggestingChoice(click.Choice[str]):
    """A choice of texts that suggests the nearest one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the choice.

        Raises:
            BadInput: The text is not one of the choices.
        """
        if value not in self.choices:
            kind, of = ("value", param.opts[0]) if isinstance(param, click.Option) else ("kind", "")
            raise unknown_name(kind, str(value), self.choices, of)
        return super().convert(value, param, ctx)


class SeedRange(click.IntRange):
    """The numbers that are seeds."""

    def __init__(self) -> None:
        super().__init__(0, 2**63 - 1)

    def _describe_range(self) -> str:
        return "0<=x<2**63"  # click prints 19 digits


class SeedList(click.ParamType):
    """Seeds of one option: a number, a range such as 0..4, or several of both with commas."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the seeds.

        Raises:
            BadInput: A part is not a seed and not a range of seeds.
        """
        from harmbench_vaccine.experiment.spec_lists import parse_seeds

        return parse_seeds(str(value), param.opts[0] if param else "Seed")


def terminal_width(*, err: bool = False) -> int | None:
    """Return the number of columns of the terminal; None if stdout, or stderr, is not a terminal."""
    from rich.console import Console

    console = Console(stderr=err)
    return console.width if console.is_terminal else None


def view_width() -> int:
    """Return the number of columns of tables: `COLUMNS`, else those of the terminal of stdout or stderr, else 100."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    return terminal_width() or terminal_width(err=True) or WIDTH_WITHOUT_TERMINAL


def print_view(view: RenderableType) -> None:
    """Print a table or a page."""
    from rich.console import Console

    Console(width=view_width()).print(view, crop=False)  # long ids stay whole


def print_line(text: str, *, err: bool = False) -> None:
    """Print a line, or several, on stdout or stderr."""
    click.echo(visible(text), err=err)


def _print_sentence(text: str) -> None:
    """Print a sentence on stderr; on a terminal its lines end between words."""
    width = terminal_width(err=True)
    print_line(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False) if width else text, err=True)


def print_json(values: Any, indent: int | None = None) -> None:
    """Print values as JSON at once: on one line, or with an indent on several.

    Raises:
        ValueError: A number is not finite.
    """
    click.echo(visible_json(values, indent))
    sys.stdout.flush()


def output_options(command: F) -> F:
    """Add --quiet, --verbose and --log-file to a command that works for long; `terminal_progress` follows them."""
    options = (
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            expose_value=False,
            callback=_store_option,
            help="Print only errors and results.",
        ),
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            expose_value=False,
            callback=_store_option,
            help="Print also reused stages and, where there are no bars, every step.",
        ),
        click.option(
            "--log-file",
            type=user_path,
            envvar="HBV_LOG_FILE",
            metavar="PATH",
            is_eager=True,  # the log has the errors of other options
            expose_value=False,
            callback=_open_log_file,
            help="Append progress, warnings and errors with time stamps to this file. [env: HBV_LOG_FILE]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _store_option(context: click.Context, option: click.Parameter, value: bool) -> None:
    """Store a flag for `terminal_progress`.

    Raises:
        BadInput: Both flags are set.
    """
    if value:
        context.meta[f"{__name__}.{option.name}"] = True
    if _is_set("quiet", context) and _is_set("verbose", context):
        raise BadInput("--quiet and --verbose cannot be combined: remove one of them.")


def _open_log_file(context: click.Context, option: click.Parameter, value: Path | None) -> None:
    if value:
        open_log(value, print_warning)
        if distributed.rank() == 0:
            LOG.info("hbv %s", shlex.join(sys.argv[1:]))


def is_verbose() -> bool:
    """Return whether --verbose of `output_options` is set."""
    return _is_set("verbose")


def _is_set(flag: str, context: click.Context | None = None) -> bool:
    context = context or click.get_current_context(silent=True)
    return bool(context and context.meta.get(f"{__name__}.{flag}"))


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Show progress by the `output_options`: bars on a terminal, lines elsewhere, and lines in the log file.

    Every rank but the first is silent.
    """
    from harmbench_vaccine.core.progress import Lines, Receivers, Terminal

    receivers: list[Progress] = []
    verbose = _is_set("verbose")
    with ExitStack() as shown:
        if distributed.rank() == 0 and not _is_set("quiet"):
            if _stderr_shows_bars():
                receivers.append(shown.enter_context(Terminal(verbose=verbose)))
            else:
                receivers.append(Lines(lambda text: print_line(text, err=True), verbose=verbose))
        if distributed.rank() == 0 and has_log():
            receivers.append(Lines(LOG.info, verbose=verbose))
        yield Receivers(receivers)


def _stderr_shows_bars() -> bool:
    """Return whether stderr is a terminal with control codes, unlike that of TERM=dumb."""
    if sys.stderr is None or not sys.stderr.isatty():  # None: it is closed
        return False
    from rich.console import Console

    return Console(file=sys.stderr).is_interactive


def parse_assignments(option: str, form: str, items: tuple[str, ...]) -> dict[str, str]:
    """Parse the NAME=VALUE items of an option.

    Raises:
        BadInput: An item has another form.
    """
    values = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise BadInput(f"Invalid {option} {item!r}. Expected {form}.")
        values[name] = value
    return values


def print_warning(text: str) -> None:
    """Print a warning on stderr, on the first rank."""
    if distributed.rank() == 0:
        line = f"hbv: warning: {' '.join(text.split())}"
        LOG.warning("%s", line)
        if not _is_set("quiet"):
            _print_sentence(line)


def exit_with_error(message: str, code: int) -> NoReturn:
    """Print one sentence on stderr and exit; of several ranks only the first that fails prints.

    Long words, such as a value that the user wrote, are shortened.
    """
    if distributed.is_first_failure():
        words = [shortened(word, LONGEST_WORD) for word in message.split()]
        line = f"hbv: {shortened(' '.join(words), LONGEST_MESSAGE)}"
        LOG.error("%s", line)
        _print_sentence(line)
    sys.exit(code)
