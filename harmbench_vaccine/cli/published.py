"""`hbv published`: the figures that papers print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import home, user_path

from .console import print_json, print_line, print_view

F = TypeVar("F", bound=Callable[..., Any])  # any function, as click.option takes it


def _filter_options(command: F) -> F:
    """Add one filter option per column of the figures."""
    for column in ("metric", "defense", "task", "model", "protocol", "paper"):
        text = f"Only figures of this {column}. Repeatable."
        command = click.option(f"--{column}", multiple=True, metavar="NAME", help=text)(command)
    return command


@click.command()
@_filter_options
@click.option("--check", is_flag=True, help="Recompute the printed averages, and list those that do not match.")
@click.option("--deviations", is_flag=True, help="List how the papers differ from runs of our protocols.")
@click.option("--claims", is_flag=True, help="Show the claims ledger: published figures next to measured scores.")
@click.option(
    "--results",
    type=user_path,
    multiple=True,
    metavar="CSV",
    help="With --claims: a CSV of results. Repeatable. [default: $HBV_HOME/results.csv]",
)
@click.option("--markdown", is_flag=True, help="With --claims: print Markdown.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Number of figures. [default: 40; with --json all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of figures; without a filter an object.")
def published(
    check: bool,
    deviations: bool,
    claims: bool,
    results: tuple[Path, ...],
    markdown: bool,
    limit: int | None,
    as_json: bool,
    **filters: tuple[str, ...],
) -> None:
    """List the figures that papers print.

    There is one table per protocol and paper; without a filter or --limit, a summary. Names are the ones in the
    papers. An average that --check lists is wrong in the paper or in the copy here; the exit code is still 0.
    --deviations lists the differences that remain between a paper and a run of its protocol without further options.

    \b
    Example: hbv published --paper Vaccine --defense SFT --metric HS
    Ledger: hbv published --claims --results leaderboards/testbed.csv
    """
    from harmbench_vaccine.reporting.published import figures
    from harmbench_vaccine.reporting.published.deviations import deviation_table, protocol_deviations

    if check and deviations:
        raise BadInput("--check and --deviations cannot be combined: remove one of them.")
    if limit and (check or deviations):
        option = "--check" if check else "--deviations"
        raise BadInput(f"--limit applies to lists of figures only: remove it, or remove {option}.")
    if claims:
        if check or deviations or limit or any(filters.values()):
            raise BadInput("--claims can be combined only with --results, --markdown and --json: remove the others.")
        _print_claims(results, markdown, as_json)
        return
    if results or markdown:
        raise BadInput(f"{'--results' if results else '--markdown'} needs --claims.")
    rows = figures.load_figures()
    selected = figures.select_figures(rows, filters)
    values: Any  # JSON
    if check:
        averages = [average for average in figures.find_averages(rows) if average.figure in selected]
        values = figures.check_averages(averages)
        view = figures.check_view(values)
    elif deviations:
        entries = protocol_deviations(selected)
        values, view = [asdict(entry) for entry in entries], deviation_table(entries)
    elif limit or any(filters.values()):
        values = [figures.figure_json(row) for row in selected[:limit]]
        view = figures.figures_table(selected, limit or 40)
    else:
        values = figures.summarize_figures(rows, len(figures.load_table("overhead.csv")))
        view = figures.summary_view(values)
    if as_json:
        print_json(values)
    else:
        print_view(view)


def _print_claims(results: Sequence[Path], markdown: bool, as_json: bool) -> None:
    """Print the claims ledger.

    Raises:
        BadInput: Both formats are requested, or a CSV is missing or damaged.
    """
    from harmbench_vaccine.core.jsonl import finite
    from harmbench_vaccine.reporting.leaderboard.claims import claims_ledger, ledger_markdown, ledger_view
    from harmbench_vaccine.reporting.leaderboard.ranking import rank_results

    if markdown and as_json:
        raise BadInput("--markdown and --json cannot be combined: remove one of them.")
    default = [path for path in [home() / "results.csv"] if path.exists()]
    tables = list(results) or default
    ledger = claims_ledger(rank_results(tables, published=True) if tables else [])
    if as_json:
        print_json(finite([row.to_json() for row in ledger]))
    elif markdown:
        print_line(ledger_markdown(ledger))
    else:
        print_view(ledger_view(ledger))
