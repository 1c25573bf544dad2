"""Training curves: trackers receive every step of the log, offline; a run's log is a table and a picture."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.evaluation.records import load_run
from harmbench_vaccine.evaluation.training_log import COLUMNS, read_training_log
from harmbench_vaccine.training.trackers import TrackedStage, check_trackers, open_trackers
from support.cli import HBV, CommandResult, hbv
from support.runs import Notes

OFFLINE = {"WANDB_MODE": "offline"}


def logs(home: Path) -> dict[str, list[dict[str, float]]]:
    """Return stage -> log, from the only artifact of each training stage."""
    return {
        stage: json.loads(next((home / "store" / stage).glob("*/log.json")).read_text(encoding="utf-8"))
        for stage in ("align", "finetune")
    }


@pytest.fixture(scope="module")
def tracked(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run with every tracker."""
    home = tmp_path_factory.mktemp("tracked")
    options = [part for name in ("tensorboard", "wandb", "mlflow") for part in ("--report-to", name)]
    result = hbv("run", "--protocol", world, "--attack", "ratio=0.1", *options, home=home, **OFFLINE)
    assert result.code == 0, result.err
    assert "wandb: wandb sync" in " ".join(result.err.split())
    return home


def test_the_command_of_a_tracker_is_quoted(tmp_path: Path) -> None:
    progress = Notes()
    folder = tmp_path / "my runs"
    stage = TrackedStage("align", "0" * 20, {}, folder)
    with open_trackers(["tensorboard"], stage, progress):
        pass
    assert shlex.split(progress.texts[0]) == ["tensorboard:", "tensorboard", "--logdir", str(folder / "tensorboard")]


def test_trackers_change_no_loss(tracked: Path, world: Path, own_home: Path) -> None:
    assert hbv("run", "--protocol", world, "--attack", "ratio=0.1", home=own_home).code == 0
    assert logs(own_home) == logs(tracked)


def test_tensorboard_receives_every_step(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.name.split("-")[0]: path for path in (tracked / "trackers" / "tensorboard").iterdir()}
    assert sorted(folders) == ["align", "finetune"]
    for stage, log in logs(tracked).items():
        events = EventAccumulator(str(folders[stage])).Reload()
        for name in ("loss", "grad_norm", "learning_rate"):
            scalars = events.Scalars(f"train/{name}")
            assert [event.step for event in scalars] == [entry["step"] for entry in log]
            assert [event.value for event in scalars] == pytest.approx([entry[name] for entry in log])


def test_mlflow_receives_every_step(tracked: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tracked / 'trackers' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("harmbench-vaccine").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_stage = {run.data.params["experiment.stage"]: run for run in runs}
    for stage, log in logs(tracked).items():
        run = by_stage[stage]
        assert run.data.params["experiment.attack"] == "ratio=0.1"
        history = sorted(client.get_metric_history(run.info.run_id, "loss"), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == [entry["step"] for entry in log]
        assert [metric.value for metric in history] == pytest.approx([entry["loss"] for entry in log])


def test_wandb_stores_every_step_offline(tracked: Path) -> None:
    expected = sorted(entry["loss"] for log in logs(tracked).values() for entry in log)
    losses = set()  # each step is in a record of the history, and in one of the summary
    for file in (tracked / "trackers").glob("wandb/offline-run-*/run-*.wandb"):
        for match in re.finditer(rb"train/loss\x82\x01(.)([-+.\de]+)", file.read_bytes(), re.DOTALL):  # length, value
            losses.add(float(match[2][: match[1][0]]))
    assert sorted(losses) == pytest.approx(expected)


def test_trackers_receive_no_rows(tracked: Path, world: Path) -> None:
    """Neither prompts nor answers are in the files of a tracker."""
    rows = (world.parent / "data" / "beavertails" / "30k_train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"].encode() for row in rows]
    for path in (tracked / "trackers").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [prompt for prompt in prompts if prompt in content], path


def test_interrupted_stage_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    stage = TrackedStage("finetune sft, seed 0", "abc123", {"defense": "sft"}, tmp_path)
    with pytest.raises(KeyboardInterrupt), open_trackers(("mlflow", "wandb", "tensorboard"), stage):
        raise KeyboardInterrupt
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("harmbench-vaccine").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED"]


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    stage = TrackedStage("align", "abc", {}, tmp_path)
    notes = Notes()
    with (
        pytest.raises(HbvError, match="Tracker tensorboard cannot start"),
        open_trackers(("tensorboard",), stage, notes),
    ):
        pass
    assert not notes.texts


@pytest.mark.parametrize(
    ("options", "environment", "parts"),
    [
        (["wandb"], {"WANDB_MODE": "online", "WANDB_API_KEY": ""}, ("API key", "wandb login", "WANDB_MODE=offline")),
        (["tensorboad"], {}, ("'tensorboad'", "tensorboard", "wandb", "mlflow")),
    ],
)
def test_unusable_tracker_is_refused(
    options: list[str], environment: dict[str, str], parts: tuple[str, ...], world: Path, own_home: Path
) -> None:
    for dry_run in ([], ["--dry-run"]):
        command = [*HBV, "run", "--protocol", str(world), "--report-to", *options, *dry_run]
        variables = {**os.environ, "HBV_HOME": str(own_home), **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)  # wandb remembers its mode
        result = CommandResult(done.returncode, done.stdout, done.stderr)
        assert result.code == 2
        assert all(part in result.sentence for part in parts), result.sentence
    assert not own_home.exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_package_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(HbvError, match=rf"--report-to {name} needs the package {name}: pip install"):
        check_trackers([name])


def test_trackers_are_imported_only_if_used(world: Path) -> None:
    code = (
        "import sys; from harmbench_vaccine.cli import commands; import harmbench_vaccine.runner; "
        "print([name for name in ('tensorboard', 'wandb', 'mlflow', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# The log of a stored run


def only_run(home: Path) -> Path:
    return next((home / "runs").iterdir())


def test_training_log_is_a_table(tracked: Path) -> None:
    result, _ = load_run(only_run(tracked))
    log = read_training_log(result)
    assert tuple(log.columns) == COLUMNS
    expected = pd.DataFrame([{"stage": stage, **entry} for stage, log in logs(tracked).items() for entry in log])
    pd.testing.assert_frame_equal(log, expected[list(COLUMNS)])


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_curves_are_plotted(ending: str, tracked: Path, tmp_path: Path) -> None:
    path = tmp_path / "plots" / f"curves{ending}"
    result = hbv("show", only_run(tracked), "--curves", path, home=tracked)
    assert (result.code, result.out.strip()) == (0, str(path))
    start = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)


def test_curves_have_a_line_for_each_value(tracked: Path, tmp_path: Path) -> None:
    """The picture has the values of both stages: as many points as the log has steps."""
    path = tmp_path / "curves.svg"
    assert hbv("show", only_run(tracked), "--curves", path, home=tracked).code == 0
    namespace = "{http://www.w3.org/2000/svg}"
    lines = [line.get("d", "") for line in ElementTree.parse(path).iter(f"{namespace}path") if line.get("clip-path")]
    steps = {len(log) for log in logs(tracked).values()}
    values = [line for line in lines if line.count("L") + line.count("M") in steps]
    assert len(values) == 2 * 5  # per stage: loss and gradient norm with their averages, and the learning rate


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("curves.jpg", ("'.jpg'", ".svg, .png, .pdf")),
        ("curves", ("'curves'", ".svg")),
        ("x.svg/y.svg", ("cannot be written to",)),
    ],
)
def test_path_of_the_plot_is_checked(path: str, parts: tuple[str, ...], tracked: Path, tmp_path: Path) -> None:
    (tmp_path / "x.svg").write_text("", encoding="utf-8")
    result = hbv("show", only_run(tracked), "--curves", tmp_path / path, home=tracked)
    assert result.code == 2
    assert all(part in result.sentence for part in parts), result.sentence


def test_curves_are_not_json(tracked: Path, tmp_path: Path) -> None:
    result = hbv("show", only_run(tracked), "--curves", tmp_path / "x.svg", "--json", home=tracked)
    assert (result.code, result.out) == (2, "")
    assert "--curves and --json cannot be combined" in result.sentence
    assert list(tmp_path.iterdir()) == []


def test_run_without_training_has_no_curves(world: Path, own_home: Path) -> None:
    assert (
        hbv(
            "run",
            "--protocol",
            world,
            "--attack",
            "refusal_ablation:prompts=20,held_out=8",
            "--defense",
            "none",
            home=own_home,
        ).code
        == 0
    )
    result = hbv("show", only_run(own_home), "--curves", own_home / "x.svg", home=own_home)
    assert result.code == 2
    assert "has no training stage" in result.sentence


def test_deleted_log_is_reported(tracked: Path, world: Path, own_home: Path) -> None:
    assert hbv("run", "--protocol", world, home=own_home).code == 0
    next((own_home / "store" / "finetune").glob("*/log.json")).unlink()
    result = hbv("show", only_run(own_home), "--curves", own_home / "x.svg", home=own_home)
    assert result.code == 1
    assert "The log of the finetune stage" in result.sentence
    assert "Repeat the run's command." in result.sentence


def test_log_of_an_earlier_version_is_refused(tracked: Path) -> None:
    result, _ = load_run(only_run(tracked))
    old = result.model_copy(
        update={"stages": {name: record.model_copy(update={"artifacts": {}}) for name, record in result.stages.items()}}
    )
    with pytest.raises(BadInput, match="stored by an earlier version"):
        read_training_log(old)
