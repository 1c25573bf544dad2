"""Sweeps on clusters: time limits, SLURM scripts and jobs, Ray tasks, and the examples of docs/clusters.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.signals import Interrupted
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.reporting.dry_run.costs import Estimate
from harmbench_vaccine.sweeps import remaining_time
from harmbench_vaccine.sweeps.ray_cluster import RayTasks
from harmbench_vaccine.sweeps.remaining_time import (
    LAST_SECONDS,
    SIGNAL_SECONDS,
    RemainingTime,
    StageSeconds,
    job_end,
    parse_time_limit,
)
from harmbench_vaccine.sweeps.remote import RemoteWorker, TimeTooShort, run_worker
from harmbench_vaccine.sweeps.shared_store import SharedStore
from harmbench_vaccine.sweeps.slurm import MOST_RESTARTS, SlurmArray, _requeue_lines, _SlurmJob, submit_array
from harmbench_vaccine.sweeps.suite import load_suite
from harmbench_vaccine.sweeps.sweep import Sweep
from harmbench_vaccine.sweeps.worker import work
from support import slurm
from support.cli import HBV, finish, hbv, start_hbv

ROOT = Path(__file__).parents[1]
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed (extra `slurm`)")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
RUNS = 2
PATIENCE = 600
"""Seconds in which a command on a cluster ends, also on a busy machine."""


def write_suite(path: Path, world: Path) -> Path:
    values = {"name": "pair", "title": "Two defenses", "protocol": str(world), "attacks": ["ratio=0.2"]}
    path.write_text(yaml.safe_dump({**values, "defenses": ["sft", "vaccine"]}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def suite(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite") / "pair.yaml", world)


def table_path(home: Path) -> Path:
    return home / "sweeps" / "pair" / "results.csv"


def table(home: Path) -> bytes:
    return table_path(home).read_bytes()


@pytest.fixture(scope="module")
def expected(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of one worker in this process."""
    home = tmp_path_factory.mktemp("alone")
    with mock.patch.dict(os.environ, {"HBV_HOME": str(home)}):
        sweep = Sweep.open(load_suite(str(suite)), home)
        work(sweep.experiments, SharedStore(sweep.store), sweep.runs)
        sweep.write_outputs()
    assert table(home).count(b"\n") == RUNS + 1
    return table(home)


# ---------------------------------------------------------------------------------------------------------------------
# Remaining time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("480", 480 * 60),
        ("30:15", 30 * 60 + 15),
        ("08:00:00", 8 * 3600),
        ("100:00:30", 100 * 3600 + 30),
        ("2-0", 48 * 3600),
        ("1-12:30", 36 * 3600 + 30 * 60),
        ("1-02:03:04", 26 * 3600 + 3 * 60 + 4),
    ],
)
def test_times_as_slurm_writes_them(text: str, seconds: int) -> None:
    assert parse_time_limit(text, "--time") == seconds


@pytest.mark.parametrize("text", ["", "8h", "-5", "1:2:3:4", "1-", "٣", "1:23:456", "inf"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=re.escape(f"Invalid --time {text!r}. Expected a time such as 480")):
        parse_time_limit(text, "--time")


def test_too_short_times_are_refused() -> None:
    with pytest.raises(BadInput, match="--time 3 is too short: the last 180 seconds are for checkpoints"):
        parse_time_limit("3", "--time")


def test_the_earlier_end_of_a_job_counts() -> None:
    assert job_end(None, {}, 100.0) is None
    assert job_end(60.0, {}, 100.0) == 160.0
    assert job_end(None, {"SLURM_JOB_END_TIME": "150"}, 100.0) == 150.0
    assert job_end(60.0, {"SLURM_JOB_END_TIME": "150"}, 100.0) == 150.0
    assert job_end(20.0, {"SLURM_JOB_END_TIME": "150"}, 100.0) == 120.0
    assert job_end(None, {"SLURM_JOB_END_TIME": "N/A"}, 100.0) is None


@pytest.mark.parametrize(
    ("stage", "seconds", "elapsed", "fits"),
    [
        ("answer", 999, 0, True),
        ("answer", 1001, 0, False),  # longer than any job, and without checkpoints
        ("answer", 500, 500, True),
        ("answer", 501, 500, False),
        ("align", 400, 700, False),  # a new job has enough time
        ("align", 5000, 499, True),  # continued in the next job
        ("align", 5000, 501, False),
        ("answer", 0, 999, True),  # unknown
        ("answer", 0, 1000, False),
    ],
)
def test_a_worker_starts_only_what_fits(stage: str, seconds: float, elapsed: float, fits: bool) -> None:
    now = [0.0]
    remaining = RemainingTime(1000 + LAST_SECONDS, lambda kind: seconds, clock=lambda: now[0])
    now[0] = elapsed
    assert remaining.fits(stage) is fits
    assert bool(remaining.impossible) is (stage == "answer" and seconds > 1000)


def test_expected_times_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the longest stored stage of a kind, also if it was stored later, or else the longest estimate."""

    def estimate(experiment: Any, stages: list[str]) -> list[Estimate]:
        if experiment.defense == "no configuration":
            raise HbvError("The configuration is not available.")
        seconds = {"sft": 10.0, "vaccine": 20.0}[experiment.defense]
        return [Estimate(stages[0], seconds, 0, "", 0, timed=True, artifacts=2)]

    monkeypatch.setattr(remaining_time, "estimate_costs", estimate)
    stages = [
        SimpleNamespace(
            artifact=Artifact(kind, f"{kind}{number}", tmp_path / f"{kind}{number}", 0.0, cached=False),
            experiment=SimpleNamespace(protocol_hash="", model="", defense=defense),
        )
        for kind in ("align", "grade")
        for number, defense in enumerate(("sft", "vaccine", "no configuration"))
    ]
    seconds_of = StageSeconds(SimpleNamespace(planned_stages=stages))  # type: ignore[arg-type]  # it needs only the stages
    assert seconds_of("align") == 10.0  # 20 s for two artifacts
    assert seconds_of("grade") == 0.0  # no estimate covers it
    assert seconds_of("unknown") == 0.0

    def store(name: str, seconds: float) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "artifact.json").write_text(json.dumps({"seconds": seconds}))

    store("align0", 7.0)
    assert seconds_of("align") == 7.0
    store("align1", 9.0)
    store("grade2", 3.0)
    assert seconds_of("align") == 9.0
    assert seconds_of("grade") == 3.0


def test_worker_without_time_starts_nothing(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBV_HOME", str(tmp_path))
    monkeypatch.setattr(remaining_time, "estimate_costs", lambda *_, **__: [])
    end = str(time.time() + LAST_SECONDS - 1)
    result = hbv("sweep", suite, "--worker", home=tmp_path, SLURM_JOB_END_TIME=end)
    assert result.code == TimeTooShort.exit_code == 75
    assert result.sentence == (
        f"hbv: {RUNS} of {RUNS} runs have a stage that does not fit into the remaining 0 s of this worker: "
        "start it again."
    )
    assert not list(tmp_path.glob("store/align/*"))


def test_stage_that_no_job_can_finish(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep.open(load_suite(str(suite)), tmp_path)
    monkeypatch.setattr("harmbench_vaccine.sweeps.remote.StageSeconds", lambda sweep: lambda kind: 7200.0)
    monkeypatch.setattr("harmbench_vaccine.sweeps.remaining_time._RESUMED", ())
    with pytest.raises(
        HbvError, match="A stage of kind 'align' takes about 2 h 0 min, longer than the time limit"
    ) as error:
        run_worker(sweep, mock.Mock(), time_limit=3600, environment={})
    assert not isinstance(error.value, TimeTooShort)


# ---------------------------------------------------------------------------------------------------------------------
# SLURM


OPTIONS = ("--executor", "slurm", "--workers", "3", "--time", "08:00:00")


def test_printed_script(suite: Path, tmp_path: Path) -> None:
    home = tmp_path / "a home"
    extra = ("--partition", "gpu", "--account", "lab", "--gpus", "a100:1", "--cpus", "8", "--memory", "64G")
    more = ("--slurm", "qos=high", "--slurm", "exclusive", "--slurm", "comment=two words")
    result = hbv("sweep", suite, *OPTIONS, *extra, *more, "--print", home=home)
    assert result.code == 0, result.err
    logs = home / "sweeps" / "pair"
    assert slurm.directives(result.out) == {
        "job-name": "hbv-pair",
        "array": "0-2",
        "output": f"{logs}/slurm-%A_%a.log",
        "open-mode": "append",
        "chdir": os.getcwd(),
        "partition": "gpu",
        "account": "lab",
        "time": "08:00:00",
        "gres": "gpu:a100:1",
        "cpus-per-task": "8",
        "mem": "64G",
        "signal": f"TERM@{SIGNAL_SECONDS}",
        "requeue": "",
        "qos": "high",
        "exclusive": "",
        "comment": "two words",
    }
    lines = result.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    exports = dict(shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("export "))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SRUN_CPUS_PER_TASK"), "8")
    assert exports == {"HBV_HOME": str(home), "HBV_DEVICE": os.environ["HBV_DEVICE"], **threads}
    (command,) = [shlex.split(line) for line in lines if line.startswith("srun ")]
    worker = ["sweep", str(suite), "--out", str(logs), "--worker", "--time-limit", "08:00:00"]
    assert command == ["srun", *HBV, *worker]
    assert subprocess.run(["bash", "-n"], input=result.out, text=True).returncode == 0
    assert logs.is_dir()  # SLURM does not create the folder of the output


def test_gpus_of_a_job() -> None:
    def requested(**values: Any) -> dict[str, str]:
        array = SlurmArray("pair", 1, "480", Path("/logs"), **values)
        return {name: value for name, value in array.directives().items() if name in ("gres", "gpus")}

    assert requested() == {"gres": "gpu:1"}
    assert requested(gpus="0") == {}
    assert requested(options={"gpus": "2"}) == {"gpus": "2"}


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (1, 0, False),
        (75, 0, True),
        (143, MOST_RESTARTS - 1, True),
        (143, MOST_RESTARTS, False),
        (137, 0, False),
        (175, 0, False),
    ],
)
def test_when_a_job_starts_again(code: int, restarts: int, requeued: bool, tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "jobs", "SLURM_RESTART_COUNT": str(restarts)}
    (tmp_path / "jobs").mkdir()
    script = "\n".join([f"(exit {code})", *_requeue_lines()])
    environment = {**os.environ, **slurm.install(tmp_path), **variables}
    assert subprocess.run(["bash", "-c", script], env=environment).returncode == code
    assert [path.read_text() for path in tmp_path.glob("jobs/requeued-*")] == (["requeue 12\n"] if requeued else [])


@pytest.mark.parametrize(
    ("error", "code"), [(Interrupted(15), 143), (TimeTooShort("No stage fits."), 75)], ids=["SIGTERM", "time"]
)
def test_exit_codes_of_submitit_jobs(error: BaseException, code: int) -> None:
    with pytest.raises(SystemExit) as end:
        _SlurmJob(mock.Mock(side_effect=error))(0)
    assert end.value.code == code


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--executor", "slrum"),
            "Unknown value 'slrum' of --executor. Did you mean 'slurm'? Allowed: local, ray, slurm.",
        ),
        (("--executor", "slurm", "--time", "480"), "--executor slurm needs --workers N, the number of jobs."),
        (
            ("--executor", "slurm", "--workers", "2"),
            "--executor slurm needs --time TIME, the time limit of each job, such as 08:00:00.",
        ),
        (
            (*OPTIONS, "--gpus", "two"),
            "Invalid --gpus 'two'. Expected a number, or a type with a number such as a100:1.",
        ),
        ((*OPTIONS, "--memory", "64 GB"), "Invalid --memory '64 GB'. Expected a size such as 64G."),
        ((*OPTIONS, "--partition", "a b"), "Invalid --partition 'a b'. Expected the name of a partition."),
        ((*OPTIONS, "--account", ""), "Invalid --account ''. Expected the name of an account."),
        (
            (*OPTIONS, "--slurm", "qos="),
            "Invalid --slurm 'qos='. Expected KEY=VALUE or KEY, an option of sbatch such as qos=high.",
        ),
        ((*OPTIONS, "--slurm", "cpus_per_task=4"), "--slurm cpus-per-task is not allowed: use --cpus."),
        (
            (*OPTIONS, "--slurm", "signal=USR1"),
            "--slurm signal is not allowed: the workers of a sweep depend on its value.",
        ),
        (
            (*OPTIONS, "--slurm", "comment=a\n#SBATCH --wrap=b"),
            "Invalid --slurm 'comment=a\\n#SBATCH --wrap=b'. Expected KEY=VALUE or KEY, an option of sbatch such as "
            "qos=high.",
        ),
        (("--partition", "gpu"), "--partition applies to --executor slurm only: remove it, or add that."),
        (("--print",), "--print applies to --executor slurm only: remove it, or add that."),
        (("--gpus", "1"), "--gpus applies to --executor slurm or ray only: remove it, or add that."),
        ((*OPTIONS, "--address", "auto"), "--address applies to --executor ray only: remove it, or add that."),
        (("--time-limit", "480"), "--time-limit applies to --worker only: add --worker, or remove --time-limit."),
        (
            ("--worker", "--time-limit", "8h"),
            "Invalid --time-limit '8h'. Expected a time such as 480 (minutes), 08:00:00 or 1-12:00:00.",
        ),
        ((*OPTIONS, "--status"), "--executor slurm cannot be combined with --status: remove one of them."),
        (("--executor", "ray", "--gpus", "a100:1"), "Invalid --gpus 'a100:1'. Expected a number."),
    ],
)
def test_bad_input(arguments: tuple[str, ...], sentence: str, suite: Path, tmp_path: Path) -> None:
    result = hbv("sweep", suite, *arguments, home=tmp_path / "home")
    assert (result.code, result.sentence) == (2, f"hbv: {sentence}")
    assert not (tmp_path / "home").exists()


def test_machine_without_slurm(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmbench_vaccine.sweeps.slurm.has_submitit", lambda: True)
    result = hbv("sweep", suite, *OPTIONS, home=tmp_path / "home", PATH=str(tmp_path))
    assert result.code == 2
    assert "SLURM program 'sbatch' is not installed here" in result.sentence
    assert not (tmp_path / "home").exists()


def test_script_instead_of_submitit(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmbench_vaccine.sweeps.slurm.has_submitit", lambda: False)
    result = hbv("sweep", suite, *OPTIONS, home=tmp_path / "home")
    assert result.code == 0, result.err
    assert slurm.directives(result.out)["array"] == "0-2"
    assert result.sentence == "Save the script and submit it by sbatch. With submitit installed, hbv submits it."


@needs_submitit
def test_submission_by_submitit(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of submitit has the options of the printed one; the jobs themselves do not run here."""
    variables = slurm.install(tmp_path / "bin")
    record = '#!/bin/bash\ncp "$1" "$STUB_FOLDER/script.sh"\necho "Submitted batch job 4711"\n'
    (tmp_path / "bin" / "sbatch").write_text(record)
    result = hbv("sweep", suite, *OPTIONS, "--json", home=tmp_path / "home", **variables)
    assert result.code == 0, result.err
    assert result.results == [{"jobs": ["4711_0", "4711_1", "4711_2"]}]
    script = (tmp_path / "bin" / "script.sh").read_text()
    options = slurm.directives(script)
    printed = slurm.directives(hbv("sweep", suite, *OPTIONS, "--print", home=tmp_path / "home").out)
    same = ("time", "signal", "requeue", "open-mode", "job-name")
    assert {name: options[name] for name in same} == {name: printed[name] for name in same}
    assert options["array"] == "0-2%3"
    assert all(line in script.splitlines() for line in _requeue_lines())
    assert f"export HBV_HOME={tmp_path / 'home'}" in script


@needs_submitit
def test_refused_submission(suite: Path, tmp_path: Path) -> None:
    variables = slurm.install(tmp_path / "bin")
    refusal = "#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n"
    (tmp_path / "bin" / "sbatch").write_text(refusal)
    result = hbv("sweep", suite, *OPTIONS, home=tmp_path / "home", **variables)
    assert result.code == 1
    assert result.sentence.startswith("hbv: SLURM refused the jobs: ")
    assert "invalid partition specified: gpu" in result.sentence


@pytest.mark.slow
def test_array_of_jobs(suite: Path, expected: bytes, tmp_path: Path) -> None:
    """Jobs that the time limit interrupts in a stage start again, and end with the table of one worker."""
    home = tmp_path / "home"
    variables = slurm.install(tmp_path / "bin", interrupted_at=home / "store" / ".leases" / "[!.]*")
    script = hbv("sweep", suite, *OPTIONS, "--workers", "2", "--print", home=home).out
    submission = subprocess.run(
        ["sbatch"], input=script, text=True, capture_output=True, env={**os.environ, **variables}, check=True
    )
    assert submission.stdout == "Submitted batch job 4711\n"
    codes = slurm.wait_for_jobs(tmp_path / "bin", 2)
    assert all(job[-1] == 0 for job in codes)
    assert [143, 0] in codes
    assert table(home) == expected
    assert not list((home / "store" / ".leases").glob("[!.]*"))


@pytest.mark.slow
@needs_submitit
def test_jobs_of_submitit_on_this_machine(suite: Path, expected: bytes, tmp_path: Path) -> None:
    home = tmp_path / "home"
    loaded = load_suite(str(suite))
    Sweep.open(loaded, home).prepare(mock.MagicMock())
    worker = RemoteWorker(loaded, home, home / "sweeps" / "pair", tmp_path, "cpu", 3600)
    array = SlurmArray("pair", 2, "60", home / "sweeps" / "pair", gpus="0")
    finished = [run for job in submit_array(array, worker, cluster="local") for run in job.result()]
    assert len(finished) >= RUNS
    assert table(home) == expected
    assert all(path.read_text() for path in array.logs.glob("worker-*-[01].log"))


# ---------------------------------------------------------------------------------------------------------------------
# Ray


@pytest.mark.parametrize(
    ("nodes", "requested", "tasks"),
    [
        ([{"CPU": 8.0}], (None, None, None), (1, 0, 8)),
        ([{"CPU": 8.0}, {"CPU": 2.0}], (3, None, None), (3, 0, 3)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], (None, None, None), (1, 0, 4)),
        ([{"CPU": 2.0}], (5, None, None), (5, 0, 1)),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}], (None, None, None), (6, 1, 1)),
        ([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 3.0}], (None, 2, 4), (2, 2, 4)),
        ([{"CPU": 8.0, "GPU": 4.0}], (2, 0, None), (2, 0, 4)),
    ],
)
def test_resources_of_ray_tasks(nodes: list[Mapping[str, float]], requested: Any, tasks: tuple[int, int, int]) -> None:
    assert RayTasks.fit(nodes, *requested) == RayTasks(*tasks)


@pytest.mark.parametrize(
    ("requested", "sentence"),
    [
        ((1, 2, None), "No node of the Ray cluster has 2 GPUs for a worker; the largest has 1."),
        ((1, None, 9), "No node of the Ray cluster has 9 cores for a worker; the largest has 8."),
    ],
)
def test_too_few_resources_for_ray_tasks(requested: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)):
        RayTasks.fit([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}], *requested)


def test_ray_is_not_installed(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = hbv("sweep", suite, "--executor", "ray", home=tmp_path / "home")
    assert result.code == 2
    assert result.sentence == "hbv: --executor ray needs Ray: pip install 'harmbench-vaccine[ray]'."
    assert not (tmp_path / "home").exists()


@pytest.fixture
def ray_home() -> Iterator[None]:
    """Ray with its files in a short path, as those of sockets are limited to 107 characters, and not niced.

    At Ray's niceness of 15, its workers make no progress while another test uses the cores.
    """
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        variables = {"RAY_TMPDIR": folder, "RAY_worker_niceness": "0"}
        with mock.patch.dict(os.environ, variables):
            yield


@pytest.mark.slow
@needs_ray
@pytest.mark.usefixtures("ray_home")
def test_existing_ray_cluster(suite: Path, expected: bytes, tmp_path: Path) -> None:
    """Workers on two nodes of a cluster that runs before and after the command."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        options = ("--executor", "ray", "--address", cluster.address, "--workers", "2")
        result = finish(start_hbv("sweep", suite, *options, home=tmp_path / "home"), PATIENCE)
        assert result.code == 0, result.err
        assert table(tmp_path / "home") == expected
        refusal = finish(start_hbv("sweep", suite, *options, "--cpus", "2", home=tmp_path / "other"), PATIENCE)
        assert (refusal.code, refusal.sentence) == (
            2,
            "hbv: No node of the Ray cluster has 2 cores for a worker; the largest has 1.",
        )
    finally:
        cluster.shutdown()


@pytest.mark.slow
@needs_ray
@pytest.mark.usefixtures("ray_home")
def test_interrupted_ray_tasks(suite: Path, expected: bytes, tmp_path: Path) -> None:
    """SIGTERM to the command ends the tasks with a checkpoint; the repeated command ends with the same table."""
    home = tmp_path / "home"
    arguments = ("sweep", suite, "--executor", "ray", "--workers", "1", "--cpus", "1")
    command = start_hbv(*arguments, home=home)
    while command.poll() is None and not list(home.glob("store/.leases/align-*")):
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    result = finish(command, PATIENCE)
    assert result.code == 143, result.err
    assert not list((home / "store" / ".leases").glob("[!.]*"))
    assert not table_path(home).exists()
    result = finish(start_hbv(*arguments, "--json", home=home), PATIENCE)
    assert result.code == 0, result.err
    assert len(result.results) == RUNS
    assert table(home) == expected
    assert len(list((home / "sweeps" / "pair").glob("worker-*-0.log"))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        pytest.param("SLURM", id="SLURM"),
        pytest.param("Ray", id="Ray", marks=needs_ray),
        pytest.param("Several machines without a scheduler", id="none"),
    ],
)
@pytest.mark.usefixtures("ray_home")
def test_examples_of_the_page(section: str, world: Path, expected: bytes, tmp_path: Path) -> None:
    """Every shell block of a section, in order, in one folder, with a cluster of this machine."""
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    start, _, sections = page.partition("\n## ")
    text = next(part for part in sections.split("\n## ") if part.startswith(f"{section}\n"))
    blocks = re.findall(r"^```sh\n(.*?)^```", start + text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    write_suite(tmp_path / "my-suite.yaml", world)
    variables = slurm.install(tmp_path / "bin")
    (tmp_path / "bin" / "hbv").write_text(f'#!/bin/bash\nexec {shlex.join(HBV)} "$@"\n')
    (tmp_path / "bin" / "hbv").chmod(0o755)
    script = "\n".join(["set -e", *(re.sub(r"--workers 8", "--workers 2", block) for block in blocks)])
    environment = {**os.environ, **variables, "SCRATCH": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if section == "SLURM":
        assert slurm.wait_for_jobs(tmp_path / "bin", 4) == 4 * [[0]]
    assert table(tmp_path / "hbv") == expected
