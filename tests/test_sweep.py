"""`hbv sweep`: the plan, the state, the outputs, local workers, and what a cleanup keeps for an unfinished sweep."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from rich.console import Console
from scipy import stats

import harmbench_vaccine as hbv_module
from harmbench_vaccine.core.disk_errors import DiskFull
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import Lines
from harmbench_vaccine.evaluation.planning import detectable_differences
from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.sweeps import local
from harmbench_vaccine.sweeps.failures import ATTEMPTS, Failures
from harmbench_vaccine.sweeps.leases import Holder, Lease, Leases
from harmbench_vaccine.sweeps.local import LocalWorkers, worker_environment
from harmbench_vaccine.sweeps.monitor import SweepMonitor, SweepStatus
from harmbench_vaccine.sweeps.shared_store import SharedStore
from harmbench_vaccine.sweeps.suite import load_suite
from harmbench_vaccine.sweeps.sweep import Sweep
from harmbench_vaccine.sweeps.views import status_view
from harmbench_vaccine.sweeps.worker import work
from support.cli import HBV, hbv
from support.results import make_result
from support.runs import Notes

RUNS = 4


@pytest.fixture(scope="module")
def suite(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite") / "pair.yaml", world)


def write_suite(path: Path, world: Path, **changes: Any) -> Path:
    values = {
        "name": "pair",
        "title": "Two defenses",
        "protocol": str(world),
        "defenses": ["sft", "vaccine"],
        "attacks": ["ratio=0,0.2"],
        **changes,
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which a worker has run the suite; no test changes it."""
    home = tmp_path_factory.mktemp("finished")
    with mock.patch.dict(os.environ, {"HBV_HOME": str(home)}):
        sweep = Sweep.open(load_suite(str(suite)), home)
        summary = work(sweep.experiments, SharedStore(sweep.store), sweep.runs)
        assert len(summary.finished) == RUNS
        sweep.write_outputs()
    return home


def opened(suite: Path, home: Path) -> Sweep:
    return Sweep.open(load_suite(str(suite)), home)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def test_table_and_costs(suite: Path, finished: Path) -> None:
    sweep = opened(suite, finished)
    rows = list(csv.DictReader(io.StringIO((sweep.folder / "results.csv").read_text())))
    assert [(row["attack"], row["defense"]) for row in rows] == [
        ("ratio=0", "sft"),
        ("ratio=0", "vaccine"),
        ("ratio=0.2", "sft"),
        ("ratio=0.2", "vaccine"),
    ]
    costs = list(csv.DictReader(io.StringIO((sweep.folder / "costs.csv").read_text())))
    results = {result.run: result for result in sweep.results()}
    assert len(costs) == sum(len(result.stages) for result in results.values())
    for row in costs:
        stage = results[row["run"]].stages[row["stage"]]
        assert float(row["seconds"]) == pytest.approx(stage.seconds, abs=1e-3)
        assert row["steps"] == ("" if stage.steps is None else str(stage.steps))
        assert row["peak_memory"] == ("" if stage.peak_memory is None else str(stage.peak_memory))
    trained = {(row["defense"], row["stage"]): row for row in costs if row["steps"]}
    assert {key: row["passes"] for key, row in trained.items()} == {
        ("sft", "align"): "1F 1B",
        ("vaccine", "align"): "2F 2B",
        ("sft", "finetune"): "1F 1B",
        ("vaccine", "finetune"): "1F 1B",
    }
    assert all(int(row["steps"]) == 20 and int(row["peak_memory"]) > 0 for row in trained.values())
    for row in trained.values():
        assert float(row["seconds_per_step"]) == pytest.approx(float(row["seconds"]) / 20, abs=1e-5)


def test_finished_sweep_starts_no_worker(suite: Path, finished: Path, tmp_path: Path) -> None:
    with mock.patch.object(local, "LocalWorkers", side_effect=AssertionError):
        result = hbv("sweep", suite, "--out", tmp_path / "out", home=finished)
    assert result.code == 0, result.err
    assert f"{RUNS} of {RUNS} runs: {tmp_path}/out/results.csv" in result.out
    assert (tmp_path / "out" / "results.csv").read_bytes() == (finished / "sweeps/pair/results.csv").read_bytes()
    with mock.patch.object(local, "LocalWorkers", side_effect=AssertionError):
        lines = hbv("sweep", suite, "--json", "--out", tmp_path / "out", home=finished).results
    assert len(lines) == RUNS


def test_python_interface(suite: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HBV_HOME", str(finished))
    results = hbv_module.sweep(suite, out=tmp_path / "out", progress=False)
    assert [result.defense for result in results] == ["sft", "vaccine"] * 2
    with pytest.raises(BadInput, match="Argument workers is 0; allowed: a whole number from 1, or None"):
        hbv_module.sweep(suite, workers=0)
    with pytest.raises(BadInput, match="Argument retry_failed is 1; allowed: True, False"):
        hbv_module.sweep(suite, retry_failed=1)  # type: ignore[arg-type]


def test_missing_results_are_reported(suite: Path, tmp_path: Path) -> None:
    sweep = opened(suite, tmp_path)
    stage = sweep.planned_stages[0]
    for _ in range(ATTEMPTS):
        Failures(sweep.store).record(stage.name, "RuntimeError: the engine stopped.", "node1 process 7")
    with pytest.raises(HbvError) as error:
        sweep.check_complete()
    assert str(error.value).startswith(
        "4 of 4 runs of pair have no result. align sft, seed 0 failed 3 times: RuntimeError: the engine stopped. "
    )
    assert str(error.value).endswith("and --retry-failed tries them again.")
    sweep.retry_failed()
    assert Failures(sweep.store).all() == []
    with pytest.raises(HbvError, match=r"4 of 4 runs of pair have no result\. .* Repeat the command to resume\.$"):
        sweep.check_complete()


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def test_plan_writes_nothing(suite: Path, own_home: Path) -> None:
    result = hbv("sweep", suite, "--plan", "--on", "h100-80gb", "--json", "--workers", 2, home=own_home)
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert (plan["suite"], plan["workers"], plan["finished"], len(plan["experiments"])) == ("pair", 2, 0, RUNS)
    stages = Counter(stage["stage"] for run in plan["experiments"] for stage in run["stages"])
    assert (stages["align"], stages["finetune"]) == (2, 4)
    estimates = [estimate["seconds"] for run in plan["experiments"] for estimate in run["estimate"]]
    assert plan["device_hours"] == pytest.approx(sum(estimates) / 3600)
    assert plan["device"]["name"] == "h100-80gb"
    assert not own_home.exists()


def test_plan_of_a_finished_sweep(suite: Path, finished: Path) -> None:
    result = hbv("sweep", suite, "--plan", home=finished, COLUMNS="80")
    assert result.code == 0, result.err
    assert all(len(line) <= 80 for line in result.out.splitlines())
    assert "4 (2 defenses, 2 attacks, 1 task, 1 seed), 4 finished" in result.out
    assert "nothing to run" in result.out
    assert "With one seed, a table has intervals over questions only" in " ".join(result.out.split())


def test_detectable_difference_with_an_assumed_dispersion(world: Path, tmp_path: Path) -> None:
    sweep = opened(write_suite(tmp_path / "pair.yaml", world, seeds="0..2"), tmp_path)
    planned = detectable_differences(sweep.experiments, sweep.runs)
    assert [(each.attack, each.defenses, each.seeds, each.stored_runs) for each in planned] == [
        ("ratio=0", 2, 3, 0),
        ("ratio=0.2", 2, 3, 0),
    ]
    degrees = 2 * (3 - 1)
    quantiles = stats.t.ppf(0.975, degrees) + stats.t.ppf(0.8, degrees)
    expected = 100 * quantiles * (2 * (3 / 8) * 0.5 * 0.5 / 3) ** 0.5  # 8 questions, 3 times the binomial variance
    assert planned[0].questions == 8
    assert planned[0].difference == pytest.approx(expected)


def test_detectable_difference_with_stored_runs(world: Path, tmp_path: Path) -> None:
    """Two seeds of SFT: phi is the squared deviation divided by m (1 - m), with one degree of freedom."""
    sweep = opened(write_suite(tmp_path / "pair.yaml", world, seeds=[0, 1], attacks=["ratio=0.2"]), tmp_path)
    first = sweep.experiments[0]
    identity = {"protocol_hash": first.protocol_hash, "model": first.model, "attack": "ratio=0.2", "defense": "sft"}
    for seed, score in ((0, 25.0), (1, 75.0)):
        result = make_result(**identity, seed=seed, harmful_score=score, run=f"sft-{seed}")
        (sweep.runs / result.run).mkdir(parents=True)
        write_run(sweep.runs / result.run, result, [])
    other = make_result(**{**identity, "protocol_hash": "0123"}, seed=0, harmful_score=1.0, run="other")
    (sweep.runs / "other").mkdir()
    write_run(sweep.runs / "other", other, [])
    (planned,) = detectable_differences(sweep.experiments, sweep.runs)
    phi = (0.25**2 + 0.25**2) / (0.5 * 0.5) / 1
    assert planned.dispersion == pytest.approx(8 * phi)
    assert (planned.stored_runs, planned.harmful_score) == (2, 50)
    quantiles = stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)
    assert planned.difference == pytest.approx(100 * quantiles * (2 * phi * 0.25 / 2) ** 0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--plan", "--status"], "--plan and --status cannot be combined"),
        (["--worker", "--retry-failed"], "--retry-failed and --worker cannot be combined"),
        (["--on", "h100-80gb"], "--on applies to --plan only"),
        (["--plan", "--on", "h100"], "Unknown device 'h100'. Did you mean 'h100-80gb'?"),
        (["--workers", "0"], "0 is not in the range 1<=x<=1024"),
        (["--data", "sst2"], "Invalid --data 'sst2'. Expected NAME=PATH."),
        (["--data", "sst=x", "--plan"], "Unknown data set 'sst' of protocol 'tiny'. Did you mean 'sst2'?"),
        (["--model", "absent.gguf", "--plan"], "'absent.gguf' does not exist"),
        (["--scorer", "refusal_keyword", "--plan"], "Did you mean 'refusal_keywords'?"),
    ],
)
def test_bad_options(suite: Path, own_home: Path, options: list[str], sentence: str) -> None:
    refused = hbv("sweep", suite, *options, home=own_home)
    assert refused.code == 2
    assert sentence in refused.sentence
    assert not own_home.exists()


def test_unknown_suite(own_home: Path) -> None:
    refused = hbv("sweep", "testbed-vaccine-tabel1", home=own_home)
    assert refused.code == 2
    assert "Did you mean 'testbed-vaccine-table1'?" in refused.sentence
    assert not own_home.exists()


def test_suites_are_listed(own_home: Path) -> None:
    assert "testbed-vaccine-table1" in json.loads(hbv("list", "suites", "--json", home=own_home).out)
    listed = hbv("list", "suites", home=own_home, COLUMNS="80").out
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert "testbed-vaccine-table1" in listed


# ---------------------------------------------------------------------------------------------------------------------
# Other models and data


def test_workers_read_the_model_and_the_data_of_the_command(world: Path, tmp_path: Path, own_home: Path) -> None:
    """The suite itself names locations that do not exist."""
    suite = write_suite(
        tmp_path / "pair.yaml", world, defenses=["sft"], model="absent/model", data={"sst2": "absent/data"}
    )
    model, data = (shutil.copytree(world.parent / name, tmp_path / name) for name in ("model", "data"))
    options = ("--model", model, "--data", f"sst2={data / 'sst2'}", "--scorer", "refusal_keywords")
    done = hbv("sweep", suite, *options, "--json", home=own_home)
    assert done.code == 0, done.err
    results = done.results
    assert len(results) == 2
    for result in results:
        assert result["model"] == str(model)
        assert result["data"]["sst2"]["location"] == str(data / "sst2")
        assert result["scorer"] == "refusal_keywords"
    status = json.loads(hbv("sweep", suite, *options, "--status", "--json", home=own_home).out)
    assert (status["finished"], status["runs"]) == (2, 2)
    file = own_home / "sweeps" / "pair" / "suite.yaml"
    assert "sft" in hbv("leaderboard", file, home=own_home).out
    assert load_suite(str(suite)).models == ("absent/model",)


def test_models_that_a_suite_compares_are_not_replaced(world: Path, tmp_path: Path, own_home: Path) -> None:
    entry = {"model": ["c"]}
    for changes in ({"model": ["a", "b"]}, {"include": [entry]}):
        suite = write_suite(tmp_path / "pair.yaml", world, **changes)
        refused = hbv("sweep", suite, "--plan", "--model", "x", home=own_home)
        assert refused.code == 2
        assert "--model cannot replace the models that suite 'pair' compares" in refused.sentence


# ---------------------------------------------------------------------------------------------------------------------
# State


def test_status_before_the_first_run(suite: Path, own_home: Path) -> None:
    result = hbv("sweep", suite, "--status", "--json", home=own_home)
    assert result.code == 0, result.err
    state = json.loads(result.out)
    assert (state["runs"], state["finished"], state["seconds_left"]) == (RUNS, 0, None)
    assert state["stages"]["finetune"] == {"done": 0, "running": 0, "failed": 0, "total": 4}
    assert not own_home.exists()


def test_status_of_running_and_failed_stages(suite: Path, tmp_path: Path) -> None:
    sweep = opened(suite, tmp_path)
    running, failing = (stage.name for stage in sweep.planned_stages[:2])
    leases = Leases(sweep.store)
    for _ in range(ATTEMPTS):
        Failures(sweep.store).record(failing, "OSError: disk", "node1 process 7")
    with leases.renewed(running, leases.take(running)):
        state = json.loads(hbv("sweep", suite, "--status", "--json", home=tmp_path).out)
        text = hbv("sweep", suite, "--status", home=tmp_path).out
    (worker,) = state["workers"]
    assert worker["label"] == "align sft, seed 0"
    assert worker["holder"] == f"{socket.gethostname()} process {os.getpid()}"
    (failure,) = state["failed"]
    assert (failure["stage"], failure["attempts"], failure["parked"]) == (failing, ATTEMPTS, True)
    assert "pair: 0 of 4 runs, 1 stage running, 1 failed" in text
    assert f"{failure['label']} failed 3 times, last on node1 process 7: OSError: disk" in text
    assert "--retry-failed tries failed stages again." in text


def test_monitor_sees_what_is_stored(suite: Path, finished: Path) -> None:
    status = SweepMonitor(opened(suite, finished)).status()
    assert (status.finished, status.done, status.running) == (RUNS, status.stages, {})
    assert status.time_left is None


def state(**changes: Any) -> SweepStatus:
    name = "finetune-0a1b2c3d4e5f6a7b8c9d"
    status = SweepStatus(
        name="testbed-vaccine-table1",
        runs=90,
        finished=34,
        stages=Counter(align=18, finetune=90),
        done=Counter(align=15, finetune=61),
        running={name: Lease(name, 1, Holder("a-node-of-a-cluster-with-a-long-name", 4194304, 0.0, "70_3"), 5, 75)},
        failures=[],
        labels={name: "finetune vaccine:rho=5+backdoor_align, ratio=0.2,samples=1000, sst2, seed 2"},
        seconds_left=1260,
    )
    return replace(status, **changes)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_state_fits_the_terminal(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(status_view(state()), crop=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    assert "1 min" in text


def test_time_left_is_unknown_without_workers() -> None:
    assert state().time_left == 1260
    assert state(running={}).time_left is None
    assert state(seconds_left=float("inf")).time_left is None


# ---------------------------------------------------------------------------------------------------------------------
# Local workers


class Monitor:
    """Observes a sweep of two stages, of which each second call finds one more stored."""

    def __init__(self) -> None:
        self.calls = 0

    def status(self) -> SweepStatus:
        self.calls += 1
        return state(done=Counter(align=min(18, self.calls // 2)))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_LOOK", 0.02)


def run_commands(folder: Path, code: str, count: int = 1, monitor: Any = None) -> list[str]:
    """Run Python code as workers, and return the notes."""
    notes = Notes()
    workers = LocalWorkers([sys.executable, "-c", code], [{}] * count, folder / "logs", notes)
    workers.run(monitor or Monitor())
    return notes.texts


@pytest.mark.usefixtures("fast")
def test_killed_worker_is_started_again(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
starts = pathlib.Path({str(tmp_path)!r}, "starts")
with starts.open("a") as file: file.write("x")
if len(starts.read_text()) < 3: os.kill(os.getpid(), 9)
"""
    notes = run_commands(tmp_path, code)
    assert (tmp_path / "starts").read_text() == "xxx"
    assert notes == ["Worker 0 was killed by SIGKILL, possibly because memory ran out; it is started again."] * 2


@pytest.mark.usefixtures("fast")
def test_worker_that_is_killed_without_progress_is_given_up(tmp_path: Path) -> None:
    monitor = mock.Mock(status=state)
    notes = run_commands(tmp_path, "import os; os.kill(os.getpid(), 11)", monitor=monitor)
    assert len(notes) == 4
    assert notes[0] == "Worker 0 was killed by SIGSEGV; it is started again."
    assert notes[-1].startswith("Worker 0 ended with exit code -11.")


@pytest.mark.usefixtures("fast")
def test_failed_worker_leaves_the_others(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, sys, time
first = pathlib.Path({str(tmp_path)!r}, "first")
try: first.mkdir()
except FileExistsError: time.sleep(0.3); pathlib.Path({str(tmp_path)!r}, "done").touch()
else: sys.exit("hbv: no memory")
"""
    notes = run_commands(tmp_path, code, count=2)
    assert (tmp_path / "done").exists()
    assert len(notes) == 1
    assert notes[0].endswith("ended with exit code 1. hbv: no memory")


@pytest.mark.usefixtures("fast")
def test_interruption_ends_the_workers(tmp_path: Path) -> None:
    """The workers get SIGTERM and can finish what they do."""
    code = f"""
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path({str(tmp_path)!r}, "checkpoint").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(tmp_path)!r}, "ready").touch()
time.sleep(60)
"""

    def interrupt() -> SweepStatus:
        if (tmp_path / "ready").exists():
            raise KeyboardInterrupt
        return state()

    with pytest.raises(KeyboardInterrupt):
        run_commands(tmp_path, code, monitor=mock.Mock(status=interrupt))
    assert (tmp_path / "checkpoint").exists()


def test_worker_ends_with_its_coordinator(tmp_path: Path) -> None:
    """The coordinator is killed with SIGKILL, which it cannot pass on."""
    worker = """
import os, pathlib, sys, time
from harmbench_vaccine.sweeps.local import end_with_coordinator
end_with_coordinator()
print("ready", flush=True)
time.sleep(60)
"""
    coordinator = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {worker!r}], env={{**os.environ, "HBV_COORDINATOR": str(os.getpid())}})
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", coordinator], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.kill()
    process.wait()
    killed = time.monotonic()
    assert process.stdout.read() == ""  # the end of the worker closes the pipe
    assert time.monotonic() - killed < 30


@pytest.mark.usefixtures("fast")
def test_progress_in_lines(tmp_path: Path) -> None:
    lines: list[str] = []
    workers = LocalWorkers([sys.executable, "-c", "import time; time.sleep(0.3)"], [{}], tmp_path, Lines(lines.append))
    workers.run(Monitor())  # type: ignore[arg-type]
    assert lines[0] == "testbed-vaccine-table1: 108 steps"


def test_threads_are_divided() -> None:
    def threads(workers: int, gpus: list[str], **environment: str) -> str:
        return worker_environment(0, workers, gpus, 16, environment)["OMP_NUM_THREADS"]

    assert [threads(1, ["0"]), threads(3, ["0"]), threads(100, ["0"])] == ["16", "5", "1"]
    assert [threads(1, []), threads(8, []), threads(9, []), threads(100, [])] == ["2", "2", "1", "1"]
    assert threads(2, ["0"], OMP_NUM_THREADS="2") == "2"
    assert threads(2, ["0"], MKL_NUM_THREADS="12") == "8"
    assert worker_environment(3, 4, ["4", "7"], 16, {})["CUDA_VISIBLE_DEVICES"] == "7"


def test_full_disk_ends_a_worker(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried again or parked: after space is freed, the command is repeated."""
    sweep, pauses = opened(suite, tmp_path), mock.Mock()

    def fill(*_: object) -> None:
        raise DiskFull("The disk is full.")

    monkeypatch.setattr("harmbench_vaccine.sweeps.worker.run", fill)
    with pytest.raises(DiskFull):
        work(sweep.experiments, SharedStore(sweep.store), sweep.runs, pause=pauses)
    pauses.assert_not_called()
    assert Failures(sweep.store).all() == []


# ---------------------------------------------------------------------------------------------------------------------
# Cleanup


@pytest.fixture
def unfinished(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which the second half of a sweep has no result yet."""
    home = tmp_path / "unfinished"
    monkeypatch.setenv("HBV_HOME", str(home))
    sweep = opened(suite, home)
    sweep.prepare(Notes())
    work(sweep.experiments[:2], SharedStore(sweep.store), sweep.runs)
    return home


def artifacts(home: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in (home / "store").glob("[!.]*/*")}


def test_cleanup_keeps_what_an_unfinished_sweep_needs(suite: Path, unfinished: Path) -> None:
    sweep, before = opened(suite, unfinished), artifacts(unfinished)
    for run in (keys.run_id(experiment) for experiment in sweep.experiments[:2]):
        for path in (sweep.runs / run).iterdir():
            path.unlink()
        (sweep.runs / run).rmdir()  # without the sweep, no run needs any artifact
    (sweep.store / ".leases" / "align-0a.1").write_text("{}")
    os.utime(sweep.store / ".leases" / "align-0a.1", (0, 0))
    Failures(sweep.store).record("align-0a", "OSError: disk", "node1 process 7")
    Failures(sweep.store).record(sweep.planned_stages[0].name, "OSError: disk", "node1 process 7")
    for command in (["doctor"], ["store", "du"], ["store", "ls"], ["store", "verify"]):
        assert hbv(*command, home=unfinished).code == 0, command
    cleaned = hbv("store", "gc", "--yes", home=unfinished)
    assert cleaned.code == 0
    assert "Sweep pair has no result for 4 of 4 runs, so what it needs stays." in " ".join(cleaned.out.split())
    assert artifacts(unfinished) == before
    assert Leases(sweep.store).all() == {}
    assert [failure.name for failure in Failures(sweep.store).all()] == [sweep.planned_stages[0].name]
    dropped = hbv("store", "gc", "--sweep", "pair", "--yes", home=unfinished)
    assert dropped.code == 0
    assert artifacts(unfinished) == set()
    assert Failures(sweep.store).all() == []
    refused = hbv("store", "gc", "--sweep", "pair", home=unfinished)
    assert (refused.code, refused.sentence) == (2, "hbv: Unknown unfinished sweep 'pair'. Allowed: none.")


def test_a_finished_sweep_keeps_nothing(suite: Path, unfinished: Path) -> None:
    sweep = opened(suite, unfinished)
    work(sweep.experiments, SharedStore(sweep.store), sweep.runs)
    assert sweep.is_complete
    sweep.write_outputs()
    assert list((sweep.store / ".sweeps").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# The complete command


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("nothing happened")


@pytest.fixture
def running(suite: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*HBV, "sweep", str(suite), "--workers", "2"],
        env={**os.environ, "HBV_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def lease_of_worker(home: Path) -> Lease | None:
    leases = Leases(home / "store").all() if (home / "store").is_dir() else {}
    return next((lease for lease in leases.values() if lease.is_valid()), None)


@pytest.mark.slow
def test_killed_worker_is_replaced(running: Any, suite: Path, finished: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    lease = wait_for(lambda: lease_of_worker(home))
    os.kill(lease.holder.pid, signal.SIGKILL)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert "was killed by SIGKILL" in err
    assert f"{RUNS} of {RUNS} runs" in out
    assert (home / "sweeps/pair/results.csv").read_bytes() == (finished / "sweeps/pair/results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_sweep(running: Any, tmp_path: Path, number: int, code: int) -> None:
    home = tmp_path / "home"
    lease = wait_for(lambda: lease_of_worker(home))
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert err.splitlines()[-1].endswith("Repeat the command to resume.")
    with pytest.raises(ProcessLookupError):
        os.kill(lease.holder.pid, 0)
    assert lease_of_worker(home) is None
    assert "interrupted by SIGTERM" in (home / f"sweeps/pair/worker-{socket.gethostname()}-0.log").read_text()
