"""Running the cells of a table one after another, in one process, with one set of loaded models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import testbed
from .cell import Cell
from .data.sources import TESTBED
from .lab import Lab
from .paths import home, writable
from .pipeline import check, run
from .progress import SILENT, Progress
from .results import result, save
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
    writable((table or root / "results.csv").absolute().parent, "The folder of the CSV file")
    if any(_uses_testbed(cell) for cell in cells):
        testbed.build(progress)
    for cell in cells:
        check(cell)
    lab = Lab(Store(root / "store", progress), progress, save_share)
    results = []
    with progress.bar("cells", len(cells)) as advance:
        for cell in cells:
            measured = run(cell, lab)
            values = result(cell, measured)
            save(cell, measured, values, runs, table or root / "results.csv")
            results.append(values)
            if done:
                done(values)
            advance(1)
    return results


def _uses_testbed(cell: Cell) -> bool:
    places = [cell.model, cell.protocol.score.judge, *cell.protocol.data.values()]
    return any(place.startswith(TESTBED) for place in places)
