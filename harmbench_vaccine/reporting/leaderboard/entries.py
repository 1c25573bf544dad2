"""Entries of a shared leaderboard: one small JSON file for each verified run, `<folder>/<protocol hash>/<run>.json`.

`hbv leaderboard add` writes an entry after it verified the run. An entry has a checksum, so that a change by hand is
noticed, and the hashes of the result and of the answers that it was verified with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.hashing import digest, sha256
from harmbench_vaccine.core.jsonl import parse_json
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.visible import visible_json
from harmbench_vaccine.evaluation.records import ANSWERS, load_result
from harmbench_vaccine.evaluation.results_csv import ResultRow, csv_cells
from harmbench_vaccine.evaluation.run_overview import RESULT
from harmbench_vaccine.evaluation.verification import verify_run
from harmbench_vaccine.experiment.spec import first_validation_error

MAX_SIZE = 1 << 16
"""Largest size of an entry, in bytes."""
_EXPERIMENT = ("scorer", "model", "defense_params", "attack_params", "task", "seed")
"""Columns in which two runs of one protocol must differ."""


class Entry(BaseModel):
    """An entry of a leaderboard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    """Version of this schema."""
    cells: dict[str, str]
    """Column of a CSV of results -> the cell."""
    result_sha256: str
    """SHA-256 of `result.json`."""
    answers_sha256: str
    """SHA-256 of `answers.jsonl`."""
    checked: list[str]
    """What `hbv verify` compared."""
    unverified: list[str]
    """What it could not compare, each with the reason."""
    checksum: str = ""
    """Hash of all other fields."""

    @property
    def row(self) -> ResultRow:
        """Return the row of the CSV of results.

        Raises:
            ValidationError: A cell is not valid.
        """
        return ResultRow.model_validate({column: cell for column, cell in self.cells.items() if cell})

    @property
    def content_hash(self) -> str:
        """Return the hash of all fields but the checksum."""
        return digest(self.model_dump(exclude={"checksum"}), 64)


def add_entry(result_file: Path, folder: Path, store: Path, progress: Progress = SILENT) -> Path:
    """Verify a run and write its entry.

    Args:
        result_file: `result.json` in the folder of the run.
        folder: The folder of entries, which is created if necessary.
        store: The store with the artifacts of the run.
        progress: Where progress is reported.

    Returns:
        The file of the entry.

    Raises:
        BadInput: The file is not a `result.json` with its answers, the run or its experiment has an entry, or another
            entry is damaged.
        HbvError: A stored value differs from its recomputed one, or cannot be computed here, or the folder cannot be
            written.
    """
    run = result_file.parent
    if result_file.name != RESULT or not result_file.is_file():
        raise BadInput(f"{result_file} is not the {RESULT} of a run. Choose $HBV_HOME/runs/RUN/{RESULT}.")
    if not (run / ANSWERS).is_file():
        raise BadInput(f"{run} has no {ANSWERS}: an entry needs the answers that its metrics follow from.")
    result = load_result(run)
    cells = csv_cells(result)
    path = folder / result.protocol_hash / f"{result.run}.json"
    _refuse_duplicate(path, cells)
    outcome = verify_run(run, store, progress)
    if outcome.mismatches:
        first = outcome.mismatches[0]
        raise HbvError(
            f"Run {result.run} is not added: {len(outcome.mismatches)} of its values differ from the recomputed ones, "
            f"first {first.field}: {first.stored} instead of {first.computed}. `hbv verify {result.run}` lists them."
        )
    if outcome.uncomputed:
        raise HbvError(
            f"Run {result.run} is not added: not all of its metrics could be computed again. Not verified: "
            f"{outcome.uncomputed[0].rstrip('.')}."
        )
    entry = Entry(
        cells={column: cell for column, cell in cells.items() if cell},
        result_sha256=sha256(run / RESULT),
        answers_sha256=sha256(run / ANSWERS),
        checked=list(outcome.checked),
        unverified=list(outcome.unverified),
    )
    ensure_writable(path.parent, "The folder of entries")
    with readable_disk_errors("the entry", path):
        sealed = entry.model_copy(update={"checksum": entry.content_hash})
        write_atomically(path, visible_json(sealed.model_dump(), indent=1) + "\n")
    return path


def _refuse_duplicate(path: Path, cells: dict[str, str]) -> None:
    if os.path.lexists(path):
        raise BadInput(f"Run {path.stem} already has an entry: {path}.")
    for other in sorted(path.parent.glob("*.json")):
        earlier = read_entry(other).cells
        if all(earlier.get(column, "") == cells[column] for column in _EXPERIMENT):
            raise BadInput(f"The experiment of run {path.stem} already has an entry: {other}. Remove it first.")


def read_entries(source: Path) -> list[ResultRow]:
    """Read the rows of an entry, or of all entries below a folder, by path.

    Raises:
        BadInput: The source has no entry, or an entry is damaged.
    """
    paths = [source] if source.is_file() else sorted(source.rglob("*.json"))
    if not paths:
        raise BadInput(f"{source} has no entries. Add one with `hbv leaderboard add`.")
    return [read_entry(path).row for path in paths]


def read_entry(path: Path) -> Entry:
    """Read an entry and check it.

    Raises:
        BadInput: The file is not an entry, was changed, or is not at the place of its run.
    """
    try:
        if path.stat().st_size > MAX_SIZE:
            raise BadInput(f"{path} is not an entry of a leaderboard: it has more than {MAX_SIZE} bytes.")
        entry = Entry.model_validate(parse_json(path.read_text(encoding="utf-8")))
        row = entry.row
    except ValidationError as error:
        raise BadInput(f"{path} is not an entry of a leaderboard: {first_validation_error(error)}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not an entry of a leaderboard: {error}.") from error
    if entry.checksum != entry.content_hash:
        raise BadInput(f"Entry {path} was changed after it was added. Add its run again with `hbv leaderboard add`.")
    if path.name != f"{row.run}.json" or path.absolute().parent.name != row.protocol_hash:
        raise BadInput(f"Entry {path} is misplaced: move it to {row.protocol_hash}/{row.run}.json.")
    return entry
