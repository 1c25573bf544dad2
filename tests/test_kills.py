"""SIGKILL at random moments: the repeated command ends with the same files as an uninterrupted one, byte for byte.

HBV_KILLS sets the number of kills; the default is small enough for every run of the slow tests.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.cli import main
from harmbench_vaccine.evaluation.judgment_cache import FILE as JUDGMENTS
from support.world import make_world

KILLS = int(os.environ.get("HBV_KILLS", "8"))
SIX_CELLS = ("--defense", "sft", "--defense", "vaccine", "--defense", "sft+antidote", "--seed", "0", "--seed", "1")

# All that two runs of one command may differ in: times, memory, whether a stage was stored before, the hashes of files
# with such values, and the state of the working tree, which a developer may change while this test runs.
MEASURED = {
    *("created", "seconds", "cached", "peak_memory", "date", "git_commit", "git_dirty"),
    *("checksum", "training.json"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_end_like_an_uninterrupted_one(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", {"align": {"rows": 24}, "finetune": {"samples": 24}})
    command = ("run", "--protocol", str(world), *SIX_CELLS, "--save-every", "0.1")
    home, draw = tmp_path / "home", random.Random(os.environ.get("HBV_SEED", "0"))
    assert _run(("--version",), home)[0] == 0  # the first process waits for the imports
    code, seconds = _run(command, home)
    assert code == 0
    uninterrupted = _contents(home)
    shutil.rmtree(home)

    kills = 0
    while kills < KILLS:
        code, _ = _run(command, home, draw.uniform(0, seconds / 3))
        kills += code == -signal.SIGKILL
        if code == 0:  # the command ended after several kills: compare, and begin again
            assert _differences(_contents(home), uninterrupted) == []
            shutil.rmtree(home)
    assert _run(command, home)[0] == 0
    assert _differences(_contents(home), uninterrupted) == []


def _differences(contents: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the files that only one home has, or whose contents differ."""
    names = contents.keys() | expected.keys()
    return sorted(name for name in names if contents.get(name) != expected.get(name))


def _run(command: tuple[str, ...], home: Path, limit: float | None = None) -> tuple[int, float]:
    """Run a command in a process that has imported the package, and kill it after `limit` seconds.

    Returns:
        The exit code, and the time in seconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["harmbench_vaccine.runner", "harmbench_vaccine.training.trainer", __name__])
    start = time.monotonic()
    process = context.Process(target=_command, args=(command, str(home)))
    process.start()
    process.join(limit)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, time.monotonic() - start


def _command(command: tuple[str, ...], home: str) -> None:
    os.environ["HBV_HOME"] = home
    sys.argv = ["hbv", *command]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
    main()


def _contents(home: Path) -> dict[str, Any]:
    """Return every file of a home except lock files -> its content, without the values of `MEASURED`."""
    files = [path for path in sorted(home.rglob("*")) if path.is_file()]
    return {path.relative_to(home).as_posix(): _content(path) for path in files if not _is_lock(path)}


def _is_lock(path: Path) -> bool:
    return path.parent.name == ".locks" or path.suffix == ".lock"


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
