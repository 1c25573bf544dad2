"""Write the files of a leaderboard: page, CSV, Markdown, LaTeX and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.visible import cell_of_text, visible_json_text
from harmbench_vaccine.reporting.figures.heat_map import plot_heat_map
from harmbench_vaccine.reporting.figures.layers import plot_layers, read_layer_drifts
from harmbench_vaccine.reporting.figures.pareto import plot_pareto
from harmbench_vaccine.reporting.figures.ratio_curves import plot_loss_and_drift, plot_scores, plot_tuned
from harmbench_vaccine.reporting.figures.style import FORMATS, save_figure
from harmbench_vaccine.reporting.figures.token_share import plot_token_share

from .costs import CostTable, cost_table_text, cost_tables, cost_tables_markdown
from .grids import Grid, file_names, place_grids, ratio_grids, task_grids
from .latex import costs_latex, rankings_latex
from .page import PAGE, write_page
from .page_sections import ALL_FINISHED, UnfinishedRuns
from .ranking import Ranking
from .stage_costs import COSTS, WITHOUT_COSTS, StageCost, costs_text
from .token_shares import token_grids
from .tuned import tuned_grids, tuned_markdown, tuned_pairs
from .views import rankings_frame, rankings_markdown
from .worst_case import settings_grids, settings_grids_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = "figures"
COST_TABLE, COST_LATEX = "cost-table.csv", "costs.tex"


def write_rankings(
    rankings: Sequence[Ranking],
    folder: Path,
    runs: Path | None = None,
    unfinished: UnfinishedRuns = ALL_FINISHED,
    answers: bool = False,
    costs: Sequence[StageCost] = (),
) -> list[str]:
    """Write the page, the tables and the figures of rankings into a folder, and create the folder if necessary.

    Args:
        rankings: The rankings.
        folder: The folder; files with the same names are replaced.
        runs: Folder of the run folders, which have the drift of each layer; None: without the figure of it.
        unfinished: The runs that have no result yet.
        answers: Include answers to harmful questions in the page.
        costs: The measured costs of the runs.

    Returns:
        Notes on what was written, and on costs and figures without data.

    Raises:
        BadInput: The folder is not writable.
    """
    ensure_writable(folder, "The output folder")
    finished = sum(len(ranking.runs) for ranking in rankings)
    note = f"{finished} of {finished + len(unfinished.runs)} runs" if unfinished.runs else ""
    tables = cost_tables(rankings, costs)
    write_tables(rankings, folder, note, tables)
    if tables:
        write_costs(rankings, folder, costs, tables)
    write_page(folder, rankings, runs, unfinished, answers, tables)
    figures, notes = draw_figures(rankings, runs, note)
    with readable_disk_errors("the figures", folder):
        for name, figure in figures.items():
            save_figure(figure, *(folder / FIGURES / f"{name}{suffix}" for suffix in FORMATS))
    names = [PAGE, "leaderboard.csv", "leaderboard.md", "leaderboard.tex"]
    names += [COSTS, COST_TABLE, COST_LATEX] if tables else []
    if not tables:
        notes.append(f"Without costs: {WITHOUT_COSTS}.")
    return [f"{folder}: {', '.join(names)}, and {len(figures)} figures in {FIGURES}/.", *notes]


def write_tables(rankings: Sequence[Ranking], folder: Path, note: str = "", costs: Sequence[CostTable] = ()) -> None:
    """Write `leaderboard.csv`, `leaderboard.md` and `leaderboard.tex` into a folder.

    Args:
        rankings: The rankings.
        folder: The folder, which exists.
        note: A text for the captions, such as "12 of 90 runs".
        costs: The costs of the defenses, for `leaderboard.md`.
    """
    with readable_disk_errors("the leaderboard", folder):
        write_atomically(folder / "leaderboard.csv", _csv_text(rankings))
        parts = (
            tuned_markdown(tuned_pairs(rankings)),
            settings_grids_markdown(settings_grids(rankings)),
            cost_tables_markdown(costs),
        )
        write_atomically(folder / "leaderboard.md", rankings_markdown(rankings, note) + "".join(parts))
        write_atomically(folder / "leaderboard.tex", rankings_latex(rankings, note))


def write_costs(
    rankings: Sequence[Ranking], folder: Path, costs: Sequence[StageCost], tables: Sequence[CostTable]
) -> None:
    """Write the costs of the runs, and those of the defenses as CSV and LaTeX, into a folder.

    The costs of the runs have the format in which they are read, so that a copy of the folder can be ranked again.

    Args:
        rankings: The rankings; the costs of other runs are left out.
        folder: The folder, which exists.
        costs: The costs of the runs.
        tables: The costs of the defenses.
    """
    ranked = {run["run"] for ranking in rankings for run in ranking.runs}
    with readable_disk_errors("the costs", folder):
        write_atomically(folder / COSTS, costs_text([cost for cost in costs if cost.run in ranked]))
        write_atomically(folder / COST_TABLE, cost_table_text(tables))
        write_atomically(folder / COST_LATEX, costs_latex(tables))


def draw_figures(rankings: Sequence[Ranking], runs: Path | None, note: str = "") -> tuple[dict[str, Figure], list[str]]:
    """Draw the figures of rankings.

    Args:
        rankings: The rankings.
        runs: Folder of the run folders, or None.
        note: A text for the titles, such as "12 of 90 runs".

    Returns:
        Name of a file without its ending -> figure, and notes on figures that cannot be drawn.
    """
    notes = []
    by_task, by_ratio = task_grids(rankings), ratio_grids(rankings)
    defaults = {id(tuned): default for default, tuned in tuned_grids(by_ratio)}
    tuned = [grid for grid in by_ratio if id(grid) in defaults]
    figures = {
        **_draw("heat-map", place_grids(rankings), lambda grid: plot_heat_map(grid, note)),
        **_draw("pareto", by_task, lambda grid: plot_pareto(grid, note)),
        **_draw("scores", by_ratio, lambda grid: plot_scores(grid, note)),
        **_draw("loss-and-drift", by_ratio, lambda grid: plot_loss_and_drift(grid, note)),
        **_draw("token-share", token_grids(rankings), lambda grid: plot_token_share(grid, note)),
        **_draw("tuned", tuned, lambda grid: plot_tuned(defaults[id(grid)], grid, note)),
    }
    if not by_ratio:
        notes.append("Without curves: no attack has several harmful ratios.")
    drifts = {id(grid): read_layer_drifts(grid, runs) if runs else {} for grid in by_task}
    with_drifts = [grid for grid in by_task if drifts[id(grid)]]
    if not with_drifts:
        notes.append("Without the drift of each layer: the folders of these runs are not in $HBV_HOME/runs.")
    layers = _draw("layers", with_drifts, lambda grid: plot_layers(grid, drifts[id(grid)], note))
    return figures | layers, notes


def _draw(kind: str, grids: Sequence[Grid], plot: Callable[[Grid], Figure]) -> dict[str, Figure]:
    """Draw one figure per grid; the names of the files have the values in which the grids differ."""
    names = (f"{kind}-{name}" if name else kind for name in file_names(grids))
    return {name: plot(grid) for name, grid in zip(names, grids, strict=True)}


def _csv_text(rankings: Sequence[Ranking]) -> str:
    frame = rankings_frame(rankings)
    for column in frame:
        escaped = visible_json_text if column.endswith("_params") else cell_of_text
        frame[column] = [escaped(value) if isinstance(value, str) else value for value in frame[column]]
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")
