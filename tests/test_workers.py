"""Workers of a sweep: together they make each stage once, also if they are killed, and end with the same results."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core import store as store_module
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec_lists import combine_specs
from harmbench_vaccine.sweeps.shared_store import SharedStore
from harmbench_vaccine.sweeps.worker import WorkSummary, work
from support.world import make_world

DEFENSES, ATTACKS, SEEDS = ("sft", "vaccine", "sft+antidote"), ("ratio=0", "ratio=0.2"), (0, 1)
KILLS = int(os.environ.get("HBV_KILLS", "8"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = {"prompts": 4, "max_new_tokens": 4}
    return make_world(tmp_path_factory.mktemp("world"), {"answer": {"harmful": few, "benign": few, "task_items": 4}})


def experiments(world: Path, defenses: tuple[str, ...] = DEFENSES, seeds: tuple[int, ...] = SEEDS) -> list[Experiment]:
    return [Experiment.settle(s) for s in combine_specs(defenses, ATTACKS, ["sst2"], seeds, protocol=world)]


def run_worker(world: Path, home: Path, pause: Callable[[], None] = lambda: time.sleep(0.1)) -> WorkSummary:
    return work(experiments(world), SharedStore(home / "store"), home / "runs", pause=pause)


def scores(home: Path) -> dict[str, str]:
    """Return run -> hash of everything in its result that another execution repeats, and of its answers."""
    hashes = {}
    for path in (home / "runs").glob("*/result.json"):
        result = json.loads(path.read_text())
        repeated = {key: value for key, value in result.items() if key not in ("stages", "environment")}
        hashes[path.parent.name] = digest([repeated, (path.parent / "answers.jsonl").read_text()])
    return hashes


def created(home: Path) -> list[str]:
    """Return every artifact as often as a worker created it."""
    return (home / "created").read_text().split()


def start(world: Path, home: Path) -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(["harmbench_vaccine.runner", "harmbench_vaccine.training.trainer", __name__])
    process = context.Process(target=_work, args=(str(world), str(home)))
    process.start()
    return process


def _work(world: str, home: str) -> None:
    """Work in a process of its own, and record every artifact that it creates."""
    os.environ["HBV_HOME"] = home
    publish = store_module.seal

    def record(folder: Path, manifest: str, values: Mapping[str, Any]) -> None:
        publish(folder, manifest, values)
        with (Path(home) / "created").open("a") as file:
            file.write(f"{folder.name}\n")

    store_module.seal = record
    run_worker(Path(world), Path(home))


@pytest.fixture(scope="session")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The scores of one uninterrupted worker."""
    home = tmp_path_factory.mktemp("alone")
    process = start(world, home)
    process.join()
    assert process.exitcode == 0
    assert len(scores(home)) == len(DEFENSES) * len(ATTACKS) * len(SEEDS)
    return scores(home)


@pytest.mark.slow
def test_three_workers_make_each_stage_once(world: Path, alone: dict[str, str], tmp_path: Path) -> None:
    workers = [start(world, tmp_path) for _ in range(3)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    names = created(tmp_path)
    assert len(names) == len(set(names))
    assert scores(tmp_path) == alone


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_workers_end_with_the_same_results(world: Path, alone: dict[str, str], tmp_path: Path) -> None:
    """Three workers, of which one is killed at a random moment and replaced, again and again."""
    draw = random.Random(os.environ.get("HBV_SEED", "0"))
    workers = [start(world, tmp_path) for _ in range(3)]
    kills = 0
    while kills < KILLS and any(worker.is_alive() for worker in workers):
        time.sleep(draw.uniform(0, 3))
        number = draw.randrange(3)
        workers[number].kill()
        workers[number].join()
        kills += workers[number].exitcode == -signal.SIGKILL
        workers[number] = start(world, tmp_path)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert kills
    names = created(tmp_path)
    assert len(names) == len(set(names))
    assert scores(tmp_path) == alone
