"""The folders of runs that use a store, also those that `--out` named, so that a cleanup finds every run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.paths import home

_FOLDER = ".runs"
"""The folder of a store with one file for each folder of runs, which contains its path."""


def register_run_folder(folder: Path, store: Path) -> None:
    """Record a folder of runs in the store that contains their artifacts.

    Args:
        folder: The folder that contains the folders of runs.
        store: The folder of the store.
    """
    folder = folder.resolve()
    if folder != store.resolve().parent / "runs":
        (store / _FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomically(store / _FOLDER / digest(str(folder)), str(folder))


def run_folders(store: Path) -> list[Path]:
    """Return the folders of runs that use a store, whether or not they still exist."""
    folders = _default_folders(store)
    for path in (store / _FOLDER).glob("[!.]*"):
        with suppress(FileNotFoundError):
            folders.add(Path(path.read_text(encoding="utf-8")))
    return sorted(folders)


def _default_folders(store: Path) -> set[Path]:
    """Return the folders of runs next to a store: in this user's home, and where a link to the store leads."""
    return {(home() / "runs").resolve(), store.resolve().parent / "runs"}
