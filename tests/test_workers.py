"""Workers of a sweep: together they make each stage once, also if they are killed, and end with the same results."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.evaluation.records import load_result
from harmbench_vaccine.evaluation.results_csv import write_results
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec_lists import combine_specs
from harmbench_vaccine.sweeps.shared_store import SharedStore
from harmbench_vaccine.sweeps.worker import work
from support.world import make_world

DEFENSES, ATTACKS, SEEDS = ("sft", "vaccine", "sft+antidote"), ("ratio=0", "ratio=0.2"), (0, 1)
KILLS = int(os.environ.get("HBV_KILLS", "8"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = {"prompts": 4, "max_new_tokens": 4}
    return make_world(tmp_path_factory.mktemp("world"), {"answer": {"harmful": few, "benign": few, "task_items": 4}})


def experiments(world: Path, defenses: tuple[str, ...] = DEFENSES, seeds: tuple[int, ...] = SEEDS) -> list[Experiment]:
    return [Experiment.settle(s) for s in combine_specs(defenses, ATTACKS, ["sst2"], seeds, protocol=world)]


def scores(home: Path) -> dict[str, str]:
    """Return run -> hash of everything in its result that another execution repeats, and of its answers.

    Without the probabilities of the judge: a batch leaves out what is judged already, so their last digits depend on
    the order of the runs.
    """
    hashes = {}
    for path in (home / "runs").glob("*/result.json"):
        result = json.loads(path.read_text())
        repeated = {key: value for key, value in result.items() if key not in ("stages", "environment")}
        answers = [json.loads(line) for line in (path.parent / "answers.jsonl").read_text().splitlines()]
        for answer in answers:
            for verdict in (answer, *answer.get("verdicts", {}).values()):
                verdict.pop("probabilities", None)
        hashes[path.parent.name] = digest([repeated, answers])
    return hashes


def table(world: Path, home: Path) -> bytes:
    """Return the table of all runs."""
    write_results(home / "table.csv", [load_result(home / "runs" / keys.run_id(each)) for each in experiments(world)])
    return (home / "table.csv").read_bytes()


class RecordingStore(SharedStore):
    """A store that records every artifact that it created, after it is stored."""

    def get_or_create(self, *arguments: Any, **options: Any) -> Artifact:
        artifact = super().get_or_create(*arguments, **options)
        if not artifact.cached:
            with (self.root.parent / "created").open("a") as file:
                file.write(f"{artifact.stage}-{artifact.key}\n")
        return artifact


def created(home: Path) -> list[str]:
    """Return every artifact as often as a worker created it."""
    return (home / "created").read_text().split()


def start(world: Path, home: Path, threads: int = 2) -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(["harmbench_vaccine.runner", "harmbench_vaccine.training.trainer", __name__])
    process = context.Process(target=_work, args=(str(world), str(home), threads))
    process.start()
    return process


def _work(world: str, home: str, threads: int) -> None:
    """Work in a process of its own."""
    os.environ["HBV_HOME"] = home
    torch.set_num_threads(threads)
    store = RecordingStore(Path(home) / "store")
    work(experiments(Path(world)), store, Path(home) / "runs", pause=lambda: time.sleep(0.1))


@pytest.fixture(scope="session")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of one uninterrupted worker with two threads."""
    home = tmp_path_factory.mktemp("alone")
    process = start(world, home)
    process.join()
    assert process.exitcode == 0
    assert len(scores(home)) == len(DEFENSES) * len(ATTACKS) * len(SEEDS)
    return home


def check_same(world: Path, home: Path, alone: Path) -> None:
    """Check that workers made each stage at most once, with the results of one worker."""
    names = created(home)
    assert len(names) == len(set(names))
    assert set(names) <= set(created(alone))
    assert scores(home) == scores(alone)
    assert table(world, home) == table(world, alone)


@pytest.mark.slow
def test_three_workers_make_each_stage_once(world: Path, alone: Path, tmp_path: Path) -> None:
    workers = [start(world, tmp_path, threads) for threads in (1, 2, 1)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(created(tmp_path)) == sorted(created(alone))
    check_same(world, tmp_path, alone)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_workers_end_with_the_same_results(world: Path, alone: Path, tmp_path: Path) -> None:
    """Three workers, of which one is killed at a random moment and replaced, again and again."""
    draw = random.Random(os.environ.get("HBV_SEED", "0"))
    workers = [start(world, tmp_path, 1) for _ in range(3)]
    kills = 0
    while kills < KILLS and any(worker.is_alive() for worker in workers):
        time.sleep(draw.uniform(0, min(3.0, 60 / KILLS)))  # so that the work is not done before the last kill
        number = draw.randrange(3)
        workers[number].kill()
        workers[number].join()
        kills += workers[number].exitcode == -signal.SIGKILL
        workers[number] = start(world, tmp_path, 1)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert kills
    check_same(world, tmp_path, alone)
