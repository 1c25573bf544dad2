"""The sweeps that use a store, so that a cleanup keeps the artifacts that their unfinished runs need."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harmbench_vaccine.core.durable import write_atomically

from .run_overview import RESULT

_FOLDER = ".sweeps"
"""The folder of a store with one file for each sweep."""


@dataclass(frozen=True)
class RegisteredSweep:
    """A sweep with everything that its runs need."""

    name: str
    runs: Path
    """The folder of the run folders."""
    run_ids: tuple[str, ...]
    artifacts: frozenset[str]
    """The artifacts of all runs, stored or not, as `stage/key`."""

    @property
    def unfinished(self) -> list[str]:
        """Return the ids of the runs without a result."""
        return [run for run in self.run_ids if not (self.runs / run / RESULT).is_file()]


def register_sweep(store: Path, name: str, runs: Path, run_ids: Iterable[str], artifacts: Iterable[str]) -> None:
    """Record a sweep in the store, instead of an earlier one with this name.

    Args:
        store: The folder of the store.
        name: The name of the suite.
        runs: The folder of the run folders.
        run_ids: The runs of the sweep.
        artifacts: The artifacts of the runs, as `stage/key`.
    """
    values = {"runs": str(runs.resolve()), "run_ids": list(run_ids), "artifacts": sorted(artifacts)}
    (store / _FOLDER).mkdir(parents=True, exist_ok=True)
    write_atomically(store / _FOLDER / name, json.dumps(values))


def registered_sweeps(store: Path) -> dict[str, RegisteredSweep]:
    """Return the sweeps of a store by name."""
    sweeps = {}
    for path in sorted((store / _FOLDER).glob("[!.]*")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(path.read_text(encoding="utf-8"))
            run_ids, artifacts = tuple(values["run_ids"]), frozenset(values["artifacts"])
            sweeps[path.name] = RegisteredSweep(path.name, Path(values["runs"]), run_ids, artifacts)
    return sweeps


def forget_sweep(store: Path, name: str) -> None:
    """Remove the record of a sweep."""
    (store / _FOLDER / name).unlink(missing_ok=True)
