"""`hbv testbed`: build, locate and measure the embedded world."""

from __future__ import annotations

import click

from .console import SuggestingGroup, output_options, print_json, print_line, print_view, terminal_progress


@click.group(cls=SuggestingGroup)
def testbed() -> None:
    """Build and measure the embedded testbed.

    It has a small model, its data and its judge.

    \b
    Example: hbv testbed build
    """


@testbed.command()
@output_options
def build() -> None:
    """Build the testbed before its first use.

    \b
    Example: hbv testbed build
    """
    from harmbench_vaccine.testbed import ensure_testbed

    with terminal_progress() as progress:
        artifact = ensure_testbed(progress)
    print_line(f"{artifact.path} ({'cached' if artifact.cached else f'{artifact.seconds:.0f} s'})")


@testbed.command()
@output_options
def path() -> None:
    """Print the folder of the testbed.

    The testbed is built first if necessary.

    \b
    Example: ls $(hbv testbed path)/data
    """
    from harmbench_vaccine.testbed import ensure_testbed

    with terminal_progress() as progress:
        print_line(str(ensure_testbed(progress).path))


@testbed.command()
@click.option(
    "--quick",
    is_flag=True,
    help="1 seed and 4 ratios instead of 5 and 6, without defenses: about 4 min instead of 47. CI runs this.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@output_options
@click.pass_context
def report(context: click.Context, quick: bool, as_json: bool) -> None:
    """Measure the testbed and check its properties.

    Repeat the command to resume after an interruption. The exit code is 1 if a check fails.

    \b
    Example: hbv testbed report --quick
    """
    from dataclasses import asdict

    from harmbench_vaccine.core.jsonl import finite
    from harmbench_vaccine.reporting.testbed_report import measure_testbed, testbed_view
    from harmbench_vaccine.runner import run_all

    with terminal_progress() as progress:
        measured = measure_testbed(lambda specs: run_all(specs, progress=progress), quick, progress)
    if as_json:
        print_json(finite({**asdict(measured), "holds": measured.holds}))
    else:
        print_view(testbed_view(measured))
    context.exit(0 if measured.holds else 1)
