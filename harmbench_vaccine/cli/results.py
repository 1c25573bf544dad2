"""`hbv show` and `hbv score`: stored runs."""

from __future__ import annotations

from pathlib import Path

import click

from harmbench_vaccine.core.paths import home, user_path

from .completion import stored_run
from .console import (
    FiniteRange,
    SuggestingChoice,
    output_options,
    print_json,
    print_line,
    print_view,
    terminal_progress,
)
from .device import device_option
from .scorers import scorer_option


@click.command()
@click.argument("run", shell_complete=stored_run)
@click.option(
    "--set",
    "set_name",
    default="harmful",
    show_default=True,
    metavar="NAME",
    help="Evaluation set: harmful, benign, task, xstest, or_bench, or a set that a plug-in adds.",
)
@click.option(
    "--only",
    type=SuggestingChoice(["flagged", "unflagged", "unread"]),
    default=None,
    help="Only questions whose answer after the user stage has this verdict.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Number of questions. [default: 10; with --json all]",
)
@click.option(
    "--curves",
    type=user_path,
    default=None,
    metavar="FILE",
    help="Plot loss, gradient norm and learning rate of the training stages: .svg, .png or .pdf.",
)
@click.option(
    "--embeddings",
    type=user_path,
    default=None,
    metavar="FILE",
    help="Map the alignment rows in the aligned and the final model by PCA (and t-SNE with scikit-learn): .svg, .png "
    "or .pdf.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON lines.")
def show(
    run: str,
    set_name: str,
    only: str | None,
    limit: int | None,
    curves: Path | None,
    embeddings: Path | None,
    as_json: bool,
) -> None:
    """Show questions, answers and verdicts of a run.

    The aligned model answers before the user stage, the final model after it. RUN is a run id, a unique prefix of
    one, or a folder.

    \b
    Example: hbv show vaccine-d2 --only flagged
    Curves: hbv show vaccine-d2 --curves curves.svg
    Embeddings: hbv show vaccine-d2 --embeddings map.svg
    """
    from harmbench_vaccine.core.errors import BadInput, unknown_name
    from harmbench_vaccine.evaluation.noise_floor import load_repeat
    from harmbench_vaccine.evaluation.records import by_question, find_run, load_overview
    from harmbench_vaccine.reporting.answer_views import answers_view
    from harmbench_vaccine.reporting.curves import check_plot_path

    folder = find_run(run, home() / "runs")
    if curves or embeddings:
        if as_json:
            option = "--curves" if curves else "--embeddings"
            raise BadInput(f"{option} and --json cannot be combined: remove one of them.")
        for path in filter(None, (curves, embeddings)):
            check_plot_path(path)
        if curves:
            _plot_curves(folder, curves)
        if embeddings:
            _plot_embeddings(folder, embeddings)
        return
    overview, answers = load_overview(folder)
    set_names = {row["set"] for row in answers}
    if set_name not in set_names:
        raise unknown_name("evaluation set", set_name, set_names)
    if as_json:
        for pair in by_question(answers, set_name, only)[:limit]:
            for row in pair.values():
                print_json(row)
    else:
        print_view(answers_view(overview, answers, set_name, limit or 10, only, load_repeat(folder)))


def _plot_curves(run: Path, path: Path) -> None:
    from harmbench_vaccine.core.errors import BadInput
    from harmbench_vaccine.evaluation.records import load_run
    from harmbench_vaccine.evaluation.training_log import read_training_log
    from harmbench_vaccine.reporting.curves import plot_curves
    from harmbench_vaccine.reporting.figures.style import save_figure

    result, _ = load_run(run)
    log = read_training_log(result)
    if log.empty:
        raise BadInput(f"Run {result.run} has no training stage, so it has no curves.")
    save_figure(plot_curves(log, f"{result.run}: {result.defense} under {result.attack}"), path)
    print_line(str(path))


def _plot_embeddings(run: Path, path: Path) -> None:
    from harmbench_vaccine.evaluation.records import load_result
    from harmbench_vaccine.export.embeddings import stored_embeddings
    from harmbench_vaccine.reporting.figures.embedding_map import has_tsne, plot_embeddings
    from harmbench_vaccine.reporting.figures.style import save_figure

    result = load_result(run)
    with terminal_progress() as progress:
        before, after = stored_embeddings(run, progress)
    figure = plot_embeddings(before.numpy(), after.numpy(), f"{result.run}: {result.defense} under {result.attack}")
    save_figure(figure, path)
    print_line(str(path))
    if not has_tsne():
        print_line("Without t-SNE, because scikit-learn is not installed.")


@click.command()
@click.argument("run", shell_complete=stored_run)
@scorer_option("llama_guard, beaver_dam=0.4, harmbench:template=FILE. Repeatable. [default: the scorer of the run]")
@click.option(
    "--threshold",
    type=FiniteRange(0, 1),
    default=None,
    metavar="T",
    help="Flag answers with a higher score, instead of the scorers' thresholds.",
)
@device_option()
@output_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: the scores by judge, and their agreement.")
def score(run: str, scorers: tuple[str, ...], threshold: float | None, as_json: bool) -> None:
    """Score the stored answers of a run again.

    Nothing is trained or generated. RUN is a run id, a unique prefix of one, or a folder. The new verdicts are added
    to the stored ones, and the headline HS does not change. Stored judgments of the same answers are reused.

    \b
    Example: hbv score vaccine-d2 --scorer llama_guard --scorer beaver_dam=0.4
    """
    from harmbench_vaccine.evaluation.records import find_run
    from harmbench_vaccine.evaluation.rescoring import rescore
    from harmbench_vaccine.reporting.result_views import scores_view

    folder = find_run(run, home() / "runs")
    with terminal_progress() as progress:
        result = rescore(folder, scorers, threshold, home() / "store", progress)
    if as_json:
        values = result.to_json()
        print_json({key: values[key] for key in ("run", "scorer", "scores", "agreement")})
    else:
        print_view(scores_view(result))
