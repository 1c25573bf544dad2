"""Read every stored run whose artifacts are in a store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.paths import home

from .records import load_result, require_keys
from .result import Result
from .results_csv import read_csv
from .run_overview import RESULT
from .run_registry import run_folders


@dataclass(frozen=True)
class StoredRun:
    """The folder of a run."""

    folder: Path
    result: Result | None
    """None if it cannot be read."""
    problem: str = ""
    """The reason why the artifacts of the run are not known, as a sentence; empty if they are."""

    @property
    def run(self) -> str:
        """Return the id of the run."""
        return self.folder.name


def stored_runs(store: Path) -> list[StoredRun]:
    """Read every run whose artifacts are in a store, by folder.

    Args:
        store: The folder of the store.
    """
    results = (path for folder in run_folders(store) for path in sorted(folder.glob(f"*/{RESULT}")))
    return [_read_run(path.parent) for path in results]


def runs_without_folder(runs: Sequence[StoredRun]) -> list[str]:
    """Return the runs in `$HBV_HOME/results.csv` whose folder is not among `runs`: it was deleted or moved."""
    with suppress(HbvError):  # a damaged CSV is reported where it is read
        return sorted({row.run for row in read_csv(home() / "results.csv")} - {run.run for run in runs})
    return []


def select_runs(runs: Sequence[StoredRun], text: str) -> list[StoredRun]:
    """Return the runs with an id, a unique prefix of one, or a folder; copies of a run in several folders are one run.

    Raises:
        BadInput: No run or several runs match.
    """
    path = Path(text).absolute()
    if matches := [run for run in runs if run.folder == path or run.run == text]:
        return matches
    names = sorted({run.run for run in runs if text and run.run.startswith(text)})
    if len(names) > 1:
        raise BadInput(f"Run prefix {text!r} is ambiguous: {', '.join(names)}.")
    if not names:
        raise unknown_name("run", text, {run.run for run in runs})
    return [run for run in runs if run.run == names[0]]


def _read_run(folder: Path) -> StoredRun:
    try:
        result = load_result(folder)
    except HbvError as error:
        return StoredRun(folder, None, str(error))
    try:
        require_keys(result)
    except BadInput as error:
        return StoredRun(folder, result, str(error))
    return StoredRun(folder, result)
