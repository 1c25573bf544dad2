"""`hbv verify`: stored runs and CSVs, judged and computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.paths import home, user_path

from .completion import stored_run
from .console import output_options, print_json, print_view, terminal_progress
from .device import device_option

if TYPE_CHECKING:
    from harmbench_vaccine.core.progress import Progress
    from harmbench_vaccine.evaluation.verification import VerifiedRun


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN|CSV...", shell_complete=stored_run)
@click.option("--cached", is_flag=True, help="Use the stored judgments of the same answers instead of judging again.")
@device_option()
@output_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object per run.")
def verify(sources: tuple[str, ...], cached: bool, as_json: bool) -> None:
    """Verify stored runs, or the rows of a CSV of results.

    Judge the stored answers again with the same judges, compute every metric again, and compare with the stored
    values; compare parameters and the hashes of artifacts, code and data. RUN is a run id, a unique prefix of one, or a
    folder. The runs of a CSV are read from $HBV_HOME/runs. Nothing is trained, generated or written. The exit code is 1
    if a value differs or nothing could be compared.

    \b
    Example: hbv verify vaccine-d2
    A CSV: hbv verify results.csv
    """
    from harmbench_vaccine.reporting.verification_view import verified_runs_view

    with terminal_progress() as progress:
        outcomes = [outcome for source in sources for outcome in _verify(source, progress, cached)]
    if as_json:
        print_json([outcome.to_json() for outcome in outcomes])
    else:
        print_view(verified_runs_view(outcomes))
    if differing := [outcome.run for outcome in outcomes if outcome.mismatches]:
        raise HbvError(f"{len(differing)} of {len(outcomes)} runs differ from their recomputed values: {differing[0]}.")
    if not any(outcome.checked for outcome in outcomes):
        raise HbvError(f"Nothing could be verified: {outcomes[0].reasons[0]}.")


def _verify(source: str, progress: Progress, cached: bool) -> list[VerifiedRun]:
    from harmbench_vaccine.evaluation.records import find_run
    from harmbench_vaccine.evaluation.verification import verify_csv, verify_run

    runs, store = home() / "runs", home() / "store"
    if source.endswith(".csv"):
        from harmbench_vaccine.reporting.leaderboard.ranking import read_results_table

        read_results_table(user_path(source))
        return verify_csv(user_path(source), runs, store, progress, cached=cached)
    return [verify_run(find_run(source, runs), store, progress, cached=cached)]
