"""`hbv leaderboard`: rank defenses, and write the tables and figures of a comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.paths import home, user_path

from .console import (
    SuggestingGroup,
    output_options,
    print_json,
    print_line,
    print_view,
    print_warning,
    terminal_progress,
)

if TYPE_CHECKING:
    from harmbench_vaccine.evaluation.results_csv import ResultRow
    from harmbench_vaccine.reporting.leaderboard.costs import CostTable
    from harmbench_vaccine.reporting.leaderboard.page_sections import UnfinishedRuns
    from harmbench_vaccine.reporting.leaderboard.ranking import Ranking
    from harmbench_vaccine.reporting.leaderboard.stage_costs import StageCost


class _RankingGroup(SuggestingGroup):
    """A group that ranks if its first argument is not one of its commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the name of the command that ranks."""
        return super().parse_args(ctx, args if args and args[0] in ctx.help_option_names else self._completed(args))

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command in the arguments, which may lack the one that ranks."""
        return super().resolve_command(context, self._completed(args))

    def _completed(self, args: list[str]) -> list[str]:
        return args if args and args[0] in self.commands else ["rank", *args]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the command that ranks, then the commands."""
        self.commands["rank"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=_RankingGroup, subcommand_metavar="[SUITE|CSV|ENTRIES]... | COMMAND")
def leaderboard() -> None:
    """Rank defenses, and add verified runs to a shared leaderboard.

    Without COMMAND, print one table per protocol, model, task and attack. SUITE is a suite of `hbv sweep`: a name or a
    YAML file, whose finished runs are read from $HBV_HOME. ENTRIES is a folder or file of `hbv leaderboard add`.
    Without a source, read $HBV_HOME/results.csv. A defense with a collapsed or hollow run has no rank.

    \b
    Example: hbv leaderboard --out tables
    A suite: hbv leaderboard testbed-vaccine-table1 --out tables
    Costs:   hbv leaderboard testbed-vaccine-table1 --costs
    """


@leaderboard.command()
@click.argument("result", type=user_path, metavar="RESULT.json")
@click.option(
    "--entries",
    type=user_path,
    default="leaderboards/entries",
    show_default=True,
    metavar="DIR",
    help="The folder of entries.",
)
@output_options
def add(result: Path, entries: Path) -> None:
    """Verify a run and add it to a shared leaderboard.

    RESULT.json is the file in the folder of a run, next to its answers. The answers are judged again and every metric
    is computed again, as by `hbv verify`. The entry is one small file, DIR/PROTOCOL_HASH/RUN.json, with a checksum: do
    not edit it. Rank entries with `hbv leaderboard DIR`.

    \b
    Example: hbv leaderboard add $HBV_HOME/runs/sft-255aa195/result.json
    """
    from harmbench_vaccine.reporting.leaderboard.entries import add_entry

    with terminal_progress() as progress:
        path = add_entry(result, entries, home() / "store", progress)
    print_line(str(path))


@leaderboard.command()
@click.argument("sources", nargs=-1, metavar="[SUITE|CSV|ENTRIES]...")
@click.option(
    "--out",
    type=user_path,
    default=None,
    metavar="DIR",
    help="Write a page (index.html), CSV, Markdown, LaTeX and figures into this folder. [default: write nothing]",
)
@click.option(
    "--answers",
    is_flag=True,
    help="With --out: include answers to harmful questions in the page, after a click. They may be offensive.",
)
@click.option(
    "--baseline", default="sft", show_default=True, metavar="SPEC", help="Defense to compute differences against."
)
@click.option(
    "--costs",
    is_flag=True,
    help="Print the measured cost of each defense instead of the ranking: time, memory, passes and extra rows.",
)
@click.option(
    "--published", is_flag=True, help="Compare with published figures, and list the deviations from the paper."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list: one object per row of leaderboard.csv, with the evidence for its defenses; with --costs, "
    "one per row of cost-table.csv.",
)
def rank(
    sources: tuple[str, ...],
    out: Path | None,
    answers: bool,
    baseline: str,
    costs: bool,
    published: bool,
    as_json: bool,
) -> None:
    """Rank defenses over their seeds.

    This is `hbv leaderboard` without a command; see `hbv leaderboard --help`.

    \b
    Example: hbv leaderboard rank --out tables
    Costs:   hbv leaderboard rank --costs
    """
    from harmbench_vaccine.reporting.leaderboard.costs import cost_tables
    from harmbench_vaccine.reporting.leaderboard.files import write_rankings
    from harmbench_vaccine.reporting.leaderboard.noise import with_noise_floors
    from harmbench_vaccine.reporting.leaderboard.ranking import rank_rows
    from harmbench_vaccine.reporting.leaderboard.stage_costs import WITHOUT_COSTS

    if answers and not out:
        raise BadInput("--answers needs --out DIR: the answers are part of the page.")
    sources = sources or (str(home() / "results.csv"),)
    rows, unfinished, measured = _read_sources(sources, with_costs=costs or out is not None)
    rankings = with_noise_floors(rank_rows(rows, baseline, published), home() / "runs")
    tables = cost_tables(rankings, measured)
    if costs and not tables:
        raise BadInput(f"These results have no costs: {WITHOUT_COSTS}. Repeat the runs with `hbv run` or `hbv sweep`.")
    if missing := len(unfinished.runs):
        print_warning(f"{len(rows)} of {len(rows) + missing} runs have a result. Add the others with `hbv sweep`.")
    notes = write_rankings(rankings, out, home() / "runs", unfinished, answers, measured) if out else []
    if costs:
        _print_costs(tables, as_json)
    else:
        _print_rankings(rankings, as_json)
    for note in [] if as_json else notes:
        print_line(note)


def _print_costs(tables: Sequence[CostTable], as_json: bool) -> None:
    from harmbench_vaccine.reporting.leaderboard.costs import cost_rows, cost_tables_view

    if as_json:
        print_json(cost_rows(tables))
    else:
        print_view(cost_tables_view(tables))


def _print_rankings(rankings: Sequence[Ranking], as_json: bool) -> None:
    """Print rankings, then default and tuned parameters side by side, then the worst cases."""
    from harmbench_vaccine.core.jsonl import finite
    from harmbench_vaccine.reporting.evidence import evidence_of
    from harmbench_vaccine.reporting.leaderboard.tuned import tuned_pairs, tuned_view
    from harmbench_vaccine.reporting.leaderboard.views import ranking_rows, rankings_view
    from harmbench_vaccine.reporting.leaderboard.worst_case import settings_grids, settings_grids_view

    if as_json:
        rows = finite(ranking_rows(rankings))
        print_json([{**row, "evidence": evidence_of(json.loads(row["defense_params"]))} for row in rows])
        return
    print_view(rankings_view(rankings))
    if pairs := tuned_pairs(rankings):
        print_view(tuned_view(pairs))
    if grids := settings_grids(rankings):
        print_view(settings_grids_view(grids))


class _Sources(NamedTuple):
    rows: list[ResultRow]
    """The results."""
    unfinished: UnfinishedRuns
    """The runs of suites that have no result yet."""
    costs: list[StageCost]
    """The measured costs of the runs; empty if they were not requested."""


def _read_sources(sources: Sequence[str], with_costs: bool) -> _Sources:
    """Read the results of suites, CSVs and entries.

    Costs are read from the runs of a suite, from the CSV of costs next to a CSV, and else from the run folders.

    Raises:
        BadInput: A source does not exist or is damaged, or none has results.
    """
    from harmbench_vaccine.reporting.leaderboard.page_sections import UnfinishedRuns
    from harmbench_vaccine.reporting.leaderboard.stage_costs import COSTS, read_costs, stored_costs

    rows: list[ResultRow] = []
    unfinished = UnfinishedRuns()
    costs: list[StageCost] = []
    for source in sources:
        if _is_suite(source):
            suite = _read_suite(source, with_costs)
            rows, unfinished, costs = rows + suite.rows, unfinished + suite.unfinished, costs + suite.costs
        elif source.endswith(".json") or os.path.isdir(source):
            rows += _read_entries(source)
        else:
            rows += _read_csv(source)
            costs += read_costs(user_path(source).with_name(COSTS)) if with_costs else []
    if not rows:
        raise BadInput(f"No results in {', '.join(sources)}. Add results with `hbv run` or `hbv sweep`.")
    if with_costs:
        measured = {cost.run for cost in costs}
        costs += stored_costs(dict.fromkeys(row.run for row in rows if row.run not in measured), home() / "runs")
    return _Sources(rows, unfinished, costs)


def _read_entries(source: str) -> list[ResultRow]:
    from harmbench_vaccine.reporting.leaderboard.entries import read_entries

    return read_entries(user_path(source))


def _is_suite(source: str) -> bool:
    from harmbench_vaccine.sweeps.suite import suite_names

    return source.endswith((".yaml", ".yml")) or (source in suite_names() and not Path(source).exists())


def _read_suite(name: str, with_costs: bool) -> _Sources:
    """Return the rows of the finished runs of a suite, the others, and the costs."""
    from harmbench_vaccine.evaluation.results_csv import result_rows
    from harmbench_vaccine.reporting.leaderboard.page_sections import UnfinishedRuns
    from harmbench_vaccine.sweeps.suite import load_suite
    from harmbench_vaccine.sweeps.sweep import Sweep

    sweep = Sweep.open(load_suite(name), home())
    missing = sweep.unfinished_runs()
    unfinished = UnfinishedRuns(tuple(missing), tuple(sweep.failed_stages()) if missing else ())
    return _Sources(result_rows(sweep.results()), unfinished, sweep.costs() if with_costs else [])


def _read_csv(source: str) -> list[ResultRow]:
    from harmbench_vaccine.reporting.leaderboard.ranking import read_results_table
    from harmbench_vaccine.sweeps.suite import suite_names

    path = user_path(source)
    if not path.suffix and not os.path.lexists(path):
        raise unknown_name("suite or CSV", source, suite_names())
    return read_results_table(path)
