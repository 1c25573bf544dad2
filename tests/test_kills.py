"""SIGKILL at random moments: the repeated command ends with the same files as an uninterrupted one, byte for byte.

HBV_KILLS sets the number of kills; the default is small enough for every run of the slow tests.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from harmbench_vaccine.cli import main
from support.homes import contents, differences
from support.world import make_world

KILLS = int(os.environ.get("HBV_KILLS", "8"))
SIX_CELLS = ("--defense", "sft", "--defense", "vaccine", "--defense", "sft+antidote", "--seed", "0", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_end_like_an_uninterrupted_one(tmp_path: Path) -> None:
    few = {"prompts": 4, "max_new_tokens": 4}  # most of the time is training
    world = make_world(tmp_path / "world", {"answer": {"harmful": few, "benign": few, "task_items": 4}})
    command = ("run", "--protocol", str(world), *SIX_CELLS, "--save-every", "0.05")
    home, draw = tmp_path / "home", random.Random(os.environ.get("HBV_SEED", "0"))
    assert _run(("--version",), home)[0] == 0  # the first process waits for the imports
    code, seconds = _run(command, home)
    assert code == 0
    uninterrupted = contents(home)
    shutil.rmtree(home)

    kills = resumable = 0
    while kills < KILLS or resumable < KILLS / 4:
        code, _ = _run(command, home, draw.uniform(0, seconds / 3))
        kills += code == -signal.SIGKILL
        resumable += any(home.glob("store/.work/*/checkpoint-*/whole"))
        if code == 0:  # the command ended after several kills: compare, and begin again
            assert differences(contents(home), uninterrupted) == []
            shutil.rmtree(home)
    assert _run(command, home)[0] == 0
    assert differences(contents(home), uninterrupted) == []


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
