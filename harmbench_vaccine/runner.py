"""Running the cells of a table one after another, in one process, with one set of loaded models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import testbed
from .cell import Cell
from .data.sources import TESTBED, check_testbed
from .lab import Lab, check_model
from .material import check
from .paths import home, writable
from .pipeline import run
from .progress import SILENT, Progress
from .results import check_columns, result, save
from .spec import RunSpec
from .store import Store


def run_all(
    specs: Sequence[RunSpec],
    *,
    out: Path | None = None,
    table: Path | None = None,
    save_share: float = 0.1,
    progress: Progress = SILENT,
    done: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs every spec and stores its result as soon as it is there.

    All specs are settled before the first one starts, so that a mistake in the last costs nothing.

    Raises:
        BadInput: a spec names something that is not there, or a folder cannot be written to.
        HbvError: something failed while running.
    """
    cells = [Cell.settle(spec) for spec in specs]
    root = writable(home(), "The cache folder")
    runs = writable(out or root / "runs", "The output folder")
    rows = table or root / "results.csv"
    writable(rows.absolute().parent, "The folder of the CSV file")
    check_columns(rows)
    places = {place for cell in cells for place in _places(cell)}
    for place in places:
        check_testbed(place)
    for model in {cell.model for cell in cells} | {cell.scorer.params["model"] for cell in cells}:
        if not model.startswith(TESTBED):
            check_model(model)
    if any(place.startswith(TESTBED) for place in places):
        testbed.ensure(progress)
    for cell in cells:
        check(cell)
    lab = Lab(Store(root / "store", progress), progress, save_share)
    results = []
    with progress.bar("cells", len(cells)) as advance:
        for cell in cells:
            measured = run(cell, lab)
            values = result(cell, measured)
            save(cell, measured, values, runs, rows)
            results.append(values)
            if done:
                done(values)
            advance(1)
    return results


def _places(cell: Cell) -> list[str]:
    return [cell.model, cell.scorer.params["model"], *cell.protocol.data.values()]
