"""`hbv tune`: choose the main parameter of every defense with an equal budget, and write a tuned protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.paths import home, user_path

from .completion import plugin_names, protocol_name, suite_name
from .console import GroupedCommand, SeedList, output_options, print_json, print_line, print_view, terminal_progress
from .device import device_option

if TYPE_CHECKING:
    from harmbench_vaccine.evaluation.result import Result
    from harmbench_vaccine.sweeps.tuning import Tuning

_OPTION_GROUPS = {
    "What to tune": ("defenses", "values", "attack", "seeds", "task", "protocol", "model"),
    "How to run": ("dry_run", "workers", "retry_failed", "device"),
    "Output": ("out", "as_json", "quiet", "verbose", "log_file"),
}


@click.command(cls=GroupedCommand, option_groups=_OPTION_GROUPS)
@click.argument("suite", required=False, metavar="[SUITE]", shell_complete=suite_name)
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    shell_complete=plugin_names("defenses"),
    metavar="NAME",
    help="Defense, without parameters. Repeatable. [default: those of SUITE]",
)
@click.option(
    "--values",
    type=click.IntRange(3, 15),
    default=None,
    metavar="N",
    help="Number of values for each defense, odd: the default is the middle one. [default: 5]",
)
@click.option(
    "--attack",
    default="ratio=0.1",
    show_default=True,
    shell_complete=plugin_names("attacks"),
    metavar="SPEC",
    help="The attack at which values are compared.",
)
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=SeedList(),
    default=["100..101"],
    metavar="N",
    help="Tuning seeds, which no result should use: 100 or 100..102. Repeatable. [default: 100..101]",
)
@click.option(
    "--task",
    default=None,
    shell_complete=plugin_names("tasks"),
    metavar="NAME",
    help="Downstream task of the user. [default: that of SUITE, or sst2]",
)
@click.option(
    "--protocol",
    default=None,
    shell_complete=protocol_name,
    metavar="NAME",
    help="The protocol that is tuned: a name or a YAML file. [default: that of SUITE, or testbed]",
)
@click.option(
    "--model",
    default=None,
    metavar="ID",
    help="Hub id, folder or GGUF file. [default: that of SUITE, or of the protocol]",
)
@click.option("--dry-run", is_flag=True, help="Show the values, the runs, their time and disk; run nothing.")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=None,
    metavar="N",
    help="Number of processes. [default: one for each visible GPU, or 1]",
)
@click.option("--retry-failed", is_flag=True, help="Try stages again that failed too often.")
@device_option()
@click.option(
    "--out",
    type=user_path,
    default=None,
    metavar="FILE",
    help="The tuned protocol; a table with the same name is written next to it. [default: PROTOCOL-tuned.yaml]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the plan, or the scores of all values.")
@output_options
def tune(
    suite: str | None,
    defenses: tuple[str, ...],
    values: int | None,
    attack: str,
    seeds: tuple[list[int], ...],
    task: str | None,
    protocol: str | None,
    model: str | None,
    dry_run: bool,
    workers: int | None,
    retry_failed: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose the main parameter of defenses, and write a tuned protocol.

    Every defense gets the same number of values around its default, at one attack, on seeds and validation prompts
    that no result uses. A value qualifies if it costs at most 2 points of FA and is neither collapsed nor hollow. Of
    these, the one with the highest refusal rate is chosen, then the one with the lowest HS. SUITE is a suite of hbv
    sweep whose defenses are tuned. To resume after an interruption, repeat the command.

    \b
    Example: hbv tune testbed-vaccine-table1 --workers 2
    Two defenses: hbv tune --defense vaccine --defense booster --out mine.yaml
    """
    from harmbench_vaccine.plugins.grid import COUNT
    from harmbench_vaccine.sweeps.suite import load_suite
    from harmbench_vaccine.sweeps.tuned_protocol import check_output, write_tuned_protocol
    from harmbench_vaccine.sweeps.tuning import choose_values, plan_tuning
    from harmbench_vaccine.sweeps.tuning_views import choices_json, choices_view

    count = values or COUNT
    if count % 2 == 0:
        raise BadInput(f"--values is {values}; allowed: odd numbers, so that the default is the middle value.")
    loaded = load_suite(suite) if suite else None
    path = out or Path(f"{Path(protocol or (loaded.protocols[0] if loaded else 'testbed')).stem}-tuned.yaml")
    tuning = plan_tuning(
        loaded,
        defenses,
        protocol=protocol,
        model=model,
        task=task,
        attack=attack,
        seeds=list(dict.fromkeys(number for numbers in seeds for number in numbers)),
        count=count,
        name=path.stem,
    )
    if dry_run:
        _print_plan(tuning, workers, as_json)
        return
    check_output(path)
    choices = choose_values(tuning.grids, _run(tuning, workers, retry_failed))
    table = write_tuned_protocol(path, tuning.suite, choices)
    if as_json:
        print_json({"protocol": str(path), "table": str(table), **choices_json(choices, tuning.untuned)})
    else:
        print_view(choices_view(choices, tuning.untuned))
        print_line(f"Tuned protocol: {path}, for --protocol of hbv run; the scores of every value: {table}")


def _print_plan(tuning: Tuning, workers: int | None, as_json: bool) -> None:
    from harmbench_vaccine.sweeps.plan import sweep_plan_json, sweep_plan_view
    from harmbench_vaccine.sweeps.tuning_views import grids_json, grids_view

    plan = sweep_plan_json(tuning.suite, home(), workers=workers)
    if as_json:
        print_json({**plan, **grids_json(tuning.grids, tuning.untuned)})
    else:
        print_view(grids_view(tuning.grids, tuning.untuned))
        print_view(sweep_plan_view(plan))


def _run(tuning: Tuning, workers: int | None, retry_failed: bool) -> list[Result]:
    """Run the suite of a tuning, and return all of its results.

    Raises:
        HbvError: Some runs have no result.
    """
    from harmbench_vaccine.sweeps.local import run_local
    from harmbench_vaccine.sweeps.sweep import Sweep

    sweep = Sweep.open(tuning.suite, home())
    file = sweep.folder / "suite.yaml"
    if not sweep.is_complete:
        with terminal_progress() as progress:
            sweep.prepare(progress)
            tuning.suite.write(file)
            if retry_failed:
                sweep.retry_failed()
            run_local(sweep, str(file), workers, progress)
    sweep.write_outputs()
    try:
        sweep.check_complete()
    except HbvError as error:
        raise HbvError(f"{error} The suite of these runs, for hbv sweep --status: {file}") from error
    return sweep.results()
