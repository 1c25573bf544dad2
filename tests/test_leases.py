"""Leases and parked stages: one worker at a time creates an artifact, and none waits for a dead one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.disk_errors import DiskFull
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.sweeps.failures import ATTEMPTS, Failures, StageParked
from harmbench_vaccine.sweeps.leases import Holder, Leases, current_holder
from harmbench_vaccine.sweeps.shared_store import SharedStore, StageBusy, StageTooLong

PROCESSES = multiprocessing.get_context("fork")


def write_lease(store: Path, name: str, holder: Holder, *, age: float = 0.0, generation: int = 1) -> Path:
    folder = store / ".leases"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{generation}"
    path.write_text(json.dumps(vars(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


ELSEWHERE = Holder("another-host", 1, 0.0)


def test_one_of_many_takes_a_lease(tmp_path: Path) -> None:
    def race(results: Any, start: Any) -> None:
        start.wait()
        results.put(Leases(tmp_path).take("align-a"))

    results, start = PROCESSES.Queue(), PROCESSES.Event()
    workers = [PROCESSES.Process(target=race, args=(results, start)) for _ in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    generations = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    # The winner may have ended before a later one looks, which then takes the next generation.
    taken = sorted(generation for generation in generations if generation)
    assert taken == list(range(1, len(taken) + 1))


def test_a_lease_of_a_living_worker_is_left_to_it(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    assert leases.take("align-a") == 1
    assert leases.take("align-a") == 0
    assert leases.take("align-b") == 1
    write_lease(tmp_path, "align-c", ELSEWHERE, age=200)
    assert leases.take("align-c") == 0


def test_an_expired_lease_is_taken_over(tmp_path: Path) -> None:
    write_lease(tmp_path, "align-a", ELSEWHERE, age=400)
    leases = Leases(tmp_path)
    assert leases.take("align-a") == 2
    assert leases.take("align-a") == 0


def test_a_dead_worker_of_this_host_is_noticed_at_once(tmp_path: Path) -> None:
    process = PROCESSES.Process(target=lambda: None)
    process.start()
    process.join()
    assert process.pid is not None
    write_lease(tmp_path, "align-a", Holder(socket.gethostname(), process.pid, time.time()))
    reused = current_holder()
    write_lease(tmp_path, "align-b", Holder(reused.host, reused.pid, reused.started - 1000))
    assert [Leases(tmp_path).take(name) for name in ("align-a", "align-b")] == [2, 2]


def test_a_renewed_lease_does_not_expire(tmp_path: Path) -> None:
    owner, other = Leases(tmp_path, expiry=0.4), Leases(tmp_path, expiry=0.4)
    generation = owner.take("align-a")
    with owner.renewed("align-a", generation):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert other.take("align-a") == 0
            time.sleep(0.05)
    assert other.newest("align-a") is None


def test_times_are_those_of_the_file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the host is an hour late and must not matter."""
    write_lease(tmp_path, "align-a", ELSEWHERE, age=400)
    write_lease(tmp_path, "align-b", ELSEWHERE)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    leases = Leases(tmp_path)
    assert [leases.take(name) for name in ("align-a", "align-b")] == [2, 0]


def test_time_of_holding_is_longer_than_that_since_renewal(tmp_path: Path) -> None:
    leases = Leases(tmp_path, expiry=0.4)
    with leases.renewed("align-a", leases.take("align-a")):
        time.sleep(0.3)
        lease = leases.newest("align-a")
    assert lease is not None
    assert lease.held >= 0.25 > lease.age


def test_reader_without_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    write_lease(tmp_path, "align-a", ELSEWHERE, age=100)
    monkeypatch.setattr(Path, "touch", refuse)
    assert Leases(tmp_path).all()["align-a"].age == pytest.approx(100, abs=5)


def test_abandoned_files_are_removed(tmp_path: Path) -> None:
    write_lease(tmp_path, "align-a", ELSEWHERE, age=400)
    write_lease(tmp_path, "align-a", ELSEWHERE, age=350, generation=2)
    valid = write_lease(tmp_path, "align-b", ELSEWHERE)
    draft = tmp_path / ".leases" / ".draft-host-1-ab"
    draft.touch()
    os.utime(draft, (time.time() - 400,) * 2)
    assert Leases(tmp_path).remove_abandoned() == 1
    assert list((tmp_path / ".leases").iterdir()) == [valid]


def test_a_damaged_lease_expires(tmp_path: Path) -> None:
    path = write_lease(tmp_path, "align-a", ELSEWHERE, age=10)
    path.write_text("{")
    os.utime(path, (time.time() - 10,) * 2)
    assert Leases(tmp_path).take("align-a") == 0
    os.utime(path, (time.time() - 400,) * 2)
    assert Leases(tmp_path).take("align-a") == 2


def test_job_of_the_scheduler() -> None:
    environment = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    assert current_holder(environment).name.endswith(f"process {os.getpid()} job 70_3")
    assert current_holder({"SLURM_JOB_ID": "71"}).job == "71"
    assert current_holder({}).job == ""


# ---------------------------------------------------------------------------------------------------------------------
# The store of a worker


def create(folder: Path, checkpoints: Path) -> None:
    (folder / "value").write_text("1")


def fail(folder: Path, checkpoints: Path) -> None:
    raise RuntimeError("the engine\nstopped")


def lease_name(store: SharedStore, inputs: dict[str, int]) -> str:
    return f"align-{store.path_of('align', inputs).name}"


def test_store_creates_and_removes_the_lease(tmp_path: Path) -> None:
    store = SharedStore(tmp_path)
    first = store.get_or_create("align", {"a": 1}, create)
    again = store.get_or_create("align", {"a": 1}, fail)
    assert isinstance(first, Artifact)
    assert (first.cached, again.cached) == (False, True)
    assert Leases(tmp_path).all() == {}


def test_busy_stage(tmp_path: Path) -> None:
    store = SharedStore(tmp_path)
    write_lease(tmp_path, lease_name(store, {"a": 1}), ELSEWHERE)
    with pytest.raises(StageBusy):
        store.get_or_create("align", {"a": 1}, create)
    assert store.get_or_create("align", {"a": 2}, create).path.exists()


def test_stage_is_parked_after_its_attempts(tmp_path: Path) -> None:
    store = SharedStore(tmp_path)
    for _ in range(ATTEMPTS):
        with pytest.raises(RuntimeError):
            store.get_or_create("align", {"a": 1}, fail)
    with pytest.raises(StageParked, match=r"3 times, last on .*: RuntimeError: the engine stopped"):
        store.get_or_create("align", {"a": 1}, create)
    assert [failure.is_parked for failure in Failures(tmp_path).all()] == [True]
    Failures(tmp_path).forget(lease_name(store, {"a": 1}))
    store.get_or_create("align", {"a": 1}, create)
    assert Failures(tmp_path).all() == []


def test_success_forgets_earlier_failures(tmp_path: Path) -> None:
    store = SharedStore(tmp_path)
    with pytest.raises(RuntimeError):
        store.get_or_create("align", {"a": 1}, fail)
    store.get_or_create("align", {"a": 1}, create)
    assert Failures(tmp_path).all() == []


def test_interruption_is_not_a_failure(tmp_path: Path) -> None:
    def interrupt(folder: Path, checkpoints: Path) -> None:
        raise KeyboardInterrupt

    store = SharedStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get_or_create("align", {"a": 1}, interrupt)
    assert Failures(tmp_path).all() == []
    assert Leases(tmp_path).all() == {}


def test_full_disk_is_not_a_failure_of_the_stage(tmp_path: Path) -> None:
    """Otherwise a full disk would park every stage within seconds, and to free space would not be enough."""

    def fill(folder: Path, checkpoints: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "answers.jsonl"))

    store = SharedStore(tmp_path)
    with pytest.raises(DiskFull, match="the disk is full"):
        store.get_or_create("align", {"a": 1}, fill)
    assert Failures(tmp_path).all() == []
    assert Leases(tmp_path).all() == {}


def test_stage_that_does_not_fit_is_not_started(tmp_path: Path) -> None:
    store = SharedStore(tmp_path, fits=lambda stage: stage != "align")
    with pytest.raises(StageTooLong):
        store.get_or_create("align", {"a": 1}, create)
    assert store.get_or_create("answer", {"a": 1}, create).path.exists()
    assert Leases(tmp_path).all() == {}


def test_stage_that_another_command_creates_is_busy(tmp_path: Path) -> None:
    """`hbv run` takes the lock of a stage, but no lease; a worker does not wait for it."""
    store = SharedStore(tmp_path)
    path = store.path_of("align", {"a": 1})
    with Store(tmp_path).locked("align", path.name):
        with pytest.raises(StageBusy):
            store.get_or_create("align", {"a": 1}, create)
        assert store.get_or_create("align", {"a": 2}, create).path.exists()
    assert store.get_or_create("align", {"a": 1}, create).path == path
    assert Failures(tmp_path).all() == []
    assert Leases(tmp_path).all() == {}


def test_stage_that_needs_a_busy_stage_does_not_fail(tmp_path: Path) -> None:
    store = SharedStore(tmp_path)
    write_lease(tmp_path, lease_name(store, {"a": 1}), ELSEWHERE)

    def create_nested(folder: Path, checkpoints: Path) -> None:
        store.get_or_create("align", {"a": 1}, create)

    with pytest.raises(StageBusy):
        store.get_or_create("finetune", {"b": 1}, create_nested)
    assert Failures(tmp_path).all() == []
