"""`hbv compare`: two runs, defenses, judges or measurements, question by question."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import home

from .completion import stored_run
from .console import SuggestingChoice, output_options, print_json, print_view, terminal_progress
from .device import device_option
from .scorers import scorer_option

if TYPE_CHECKING:
    from pathlib import Path

    from harmbench_vaccine.inference.engine import Backend


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN]", shell_complete=stored_run)
@scorer_option(
    "With one RUN: compare the verdicts of two judges, each with its own --scorer. Missing verdicts are added."
)
@click.option(
    "--repeat",
    "is_repeat",
    is_flag=True,
    help="With one RUN: its stored models answer again and are judged again, which shows the noise floor.",
)
@click.option(
    "--backend",
    type=SuggestingChoice(["transformers", "vllm"]),
    default=None,
    help="With --repeat: engine that generates answers. [default: that of the run]",
)
@device_option()
@output_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, with every question that flips.")
def compare(
    runs: tuple[str, ...], scorers: tuple[str, ...], is_repeat: bool, backend: Backend | None, as_json: bool
) -> None:
    """Compare two runs, two judges of one run, or two measurements of one run, question by question.

    The first RUN is the baseline. Two different defenses, attacks or engines are compared over all stored seeds that
    both have. RUN is a run id, a unique prefix of one, or a folder.

    \b
    Example: hbv compare sft-25 vaccine-d2
    Judges: hbv compare vaccine-d2 --scorer beaver_dam --scorer refusal_keywords
    Noise floor: hbv compare vaccine-d2 --repeat
    """
    from harmbench_vaccine.core.jsonl import finite
    from harmbench_vaccine.evaluation.records import find_run
    from harmbench_vaccine.evaluation.rescoring import rescore
    from harmbench_vaccine.evaluation.run_comparison import compare_judges, compare_runs
    from harmbench_vaccine.reporting.run_comparison_view import run_comparison_view

    if backend and not is_repeat:
        raise BadInput("--backend needs --repeat: otherwise no model answers.")
    if (len(runs), len(scorers)) not in ({(1, 0)} if is_repeat else {(2, 0), (1, 2)}):
        raise BadInput(
            f"{len(runs)} runs and {len(scorers)} scorers cannot be compared{' with --repeat' if is_repeat else ''}; "
            "allowed: two runs, or one run with --scorer given twice, or one run with --repeat and no --scorer."
        )
    folders = [find_run(run, home() / "runs") for run in runs]
    if is_repeat:
        _repeat(folders[0], backend, as_json)
        return
    if scorers:
        names = _judge_names(scorers)
        with terminal_progress() as progress:
            rescore(folders[0], scorers, None, home() / "store", progress)
        comparison = compare_judges(folders[0], *names)
    else:
        comparison = compare_runs(folders[0], folders[1], home() / "runs")
    if as_json:
        print_json(finite(asdict(comparison)))
    else:
        print_view(run_comparison_view(comparison))


def _repeat(run: Path, backend: Backend | None, as_json: bool) -> None:
    from harmbench_vaccine.export.repetition import repeat_run
    from harmbench_vaccine.reporting.noise_floor_view import repeated_run_view

    with terminal_progress() as progress:
        repeat = repeat_run(run, backend, progress)
    if as_json:
        print_json(repeat.model_dump(mode="json"))
    else:
        print_view(repeated_run_view(repeat))


def _judge_names(scorers: tuple[str, ...]) -> list[str]:
    """Return the names under which a result stores the scores of two scorers.

    Raises:
        BadInput: An unknown scorer, or twice the same.
    """
    from harmbench_vaccine.plugins.composition import canonical_name, parse_plugins, resolve_plugins
    from harmbench_vaccine.plugins.registry import SCORERS

    resolved = [resolve_plugins(parse_plugins(text), SCORERS, {}, "") for text in scorers]
    names = list(map(canonical_name, resolved))
    if names[0] == names[1]:
        raise BadInput(f"Both scorers are {names[0]}: choose two different ones, such as beaver_dam=0.4.")
    return names
