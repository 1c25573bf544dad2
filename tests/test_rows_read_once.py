"""Rows of many runs: each file is read once, as long as its content stays the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.data import sources
from harmbench_vaccine.experiment import rows
from harmbench_vaccine.experiment.experiment import Experiment, settle_all
from harmbench_vaccine.experiment.rows import check_rows, eval_sets, task_rows
from harmbench_vaccine.experiment.spec_lists import combine_specs
from support.world import make_world


@pytest.fixture
def own_world(tmp_path: Path) -> Path:
    return make_world(tmp_path / "world", models=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """Count the reads of each split of a data set."""
    counts: Counter[tuple[str, str]] = Counter()
    read_rows = sources.read_rows

    def counted(location: str, split: str, *arguments: Any) -> Any:
        counts[Path(location).name, split] += 1
        return read_rows(location, split, *arguments)

    monkeypatch.setattr(sources, "read_rows", counted)
    for reader in (rows._read_pools, rows._read_task_data):
        reader.cache_clear()
    yield counts
    for reader in (rows._read_pools, rows._read_task_data):
        reader.cache_clear()


def experiments(world: Path, *tasks: str) -> list[Experiment]:
    return settle_all(combine_specs(["sft", "vaccine"], ["ratio=0,0.1"], tasks, [0, 1, 2], protocol=str(world)))


def test_many_runs_read_each_split_once(own_world: Path, reads: Counter[tuple[str, str]]) -> None:
    for experiment in experiments(own_world, "sst2", "gsm8k"):
        check_rows(experiment)
        eval_sets(experiment)
    assert {name for name, _ in reads} == {"beavertails", "beavertails_refusals", "alpaca", "sst2", "gsm8k"}
    assert set(reads.values()) == {1}


def test_changed_file_is_read_again(own_world: Path, reads: Counter[tuple[str, str]]) -> None:
    experiment = experiments(own_world, "sst2")[0]
    before = task_rows(experiment)
    (file,) = (own_world.parent / "data" / "sst2").glob("train*.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    changed = {**json.loads(lines[0]), "sentence": "a sentence that no other row has"}
    file.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n", encoding="utf-8")
    after = task_rows(experiment)
    assert (after[0].input, after[1:]) == ("a sentence that no other row has", before[1:])


def test_tasks_of_one_class_read_their_own_rows(own_world: Path, reads: Counter[tuple[str, str]]) -> None:
    """Two tasks on one folder, which differ in a parameter."""
    data = own_world.parent / "data" / "alpaca"
    (data / "other.jsonl").write_text(json.dumps({"instruction": "Count to 1.", "output": "1"}) + "\n")
    task, other = (experiments(own_world, f"{data}:train={split},test=test")[0] for split in ("train", "other"))
    assert len(task_rows(task)) == 120
    assert [row.response for row in task_rows(other)] == ["1"]
