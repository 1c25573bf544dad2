"""Compare all files of two homes (`$HBV_HOME`)."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from harmbench_vaccine.evaluation.judgment_cache import FILE as JUDGMENTS

# All that two runs of one command may differ in: times, memory, whether a stage was stored before, the hashes of files
# with such values, and the state of the working tree, which a developer may change while this test runs.
MEASURED = {
    *("created", "seconds", "cached", "peak_memory", "date", "git_commit", "git_dirty"),
    *("checksum", "training.json"),
}


def contents(home: Path) -> dict[str, Any]:
    """Return every file of a home except lock files -> its content, without the values of `MEASURED`."""
    files = [path for path in sorted(home.rglob("*")) if path.is_file()]
    return {path.relative_to(home).as_posix(): _content(path) for path in files if not _is_lock(path)}


def _is_lock(path: Path) -> bool:
    return path.parent.name in (".locks", ".use") or path.suffix == ".lock"


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _without_measurements(json.loads(path.read_text()))
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [_without_measurements(row) for row in csv.DictReader(file)]
    if path.name == JUDGMENTS:
        with closing(sqlite3.connect(path)) as database:
            return database.execute("SELECT * FROM judgments ORDER BY key").fetchall()
    return path.read_bytes()


def _without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measurements(item) for key, item in value.items() if key not in MEASURED}
    return [_without_measurements(item) for item in value] if isinstance(value, list) else value


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the files that only one home has, or whose contents differ."""
    names = actual.keys() | expected.keys()
    return sorted(name for name in names if actual.get(name) != expected.get(name))
