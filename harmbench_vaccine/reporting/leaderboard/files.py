"""Write the files of a leaderboard: CSV, Markdown, LaTeX and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.visible import cell_of_text, visible_json_text

from .ranking import Ranking
from .views import rankings_frame, rankings_markdown


def write_rankings(rankings: Sequence[Ranking], folder: Path, runs: Path | None = None, missing: int = 0) -> list[str]:
    """Write the tables and the figures of rankings into a folder, and create the folder if necessary.

    Args:
        rankings: The rankings.
        folder: The folder; files with the same names are replaced.
        runs: Folder of the run folders, which have the drift of each layer; None: without the figure of it.
        missing: Number of runs that have no result yet.

    Returns:
        Notes on what was written and what was left out.

    Raises:
        BadInput: The folder is not writable.
    """
    ensure_writable(folder, "The output folder")
    with readable_disk_errors("the leaderboard", folder):
        write_atomically(folder / "leaderboard.csv", _csv_text(rankings))
        write_atomically(folder / "leaderboard.md", rankings_markdown(rankings))
    return []


def _csv_text(rankings: Sequence[Ranking]) -> str:
    frame = rankings_frame(rankings)
    for column in frame:
        escaped = visible_json_text if column.endswith("_params") else cell_of_text
        frame[column] = [escaped(value) if isinstance(value, str) else value for value in frame[column]]
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")
