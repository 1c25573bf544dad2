"""The store: artifacts are complete or absent and created once, also after a full disk or a killed process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import pytest

from harmbench_vaccine.core import store as store_module
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.store import META, Artifact, Store

INPUTS = {"a": 1, "b": [2.5, "x"]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def writer(calls: list[int] | None = None, text: str = "whole") -> Callable[[Path, Path], None]:
    """Return a function that creates two files, one of them in a folder, and counts its calls."""

    def make(folder: Path, checkpoints: Path) -> None:
        if calls is not None:
            calls.append(1)
        (folder / "inner").mkdir()
        (folder / "one.txt").write_text(text)
        (folder / "inner" / "two.txt").write_text(text * 2)

    return make


def artifacts(store: Store) -> list[Path]:
    """List every folder that looks like an artifact to a reader."""
    return [path for path in store.root.glob("*/*") if not path.parent.name.startswith(".")]


def unfinished(store: Store) -> list[Path]:
    """List the folders of artifacts that were not completed."""
    return list((store.root / ".aside").glob("*"))


def python(script: str, *args: object, **more: Any) -> subprocess.Popen[str]:
    """Start another process that has imported `Store`."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom harmbench_vaccine.core.store import Store\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Created once


def test_second_call_returns_the_cached_artifact(store: Store) -> None:
    calls: list[int] = []
    first = store.get_or_create("align", INPUTS, writer(calls))
    second = store.get_or_create("align", dict(reversed(INPUTS.items())), writer(calls))
    assert calls == [1]
    assert (first.cached, second.cached) == (False, True)
    assert (second.path, second.key, second.stage) == (first.path, first.key, "align")
    assert second.seconds == round(first.seconds, 3)
    assert (second.path / "inner" / "two.txt").read_text() == "wholewhole"
    assert Store(store.root).get_or_create("align", INPUTS, writer(calls)).cached


def test_inputs_and_stage_identify_the_artifact(store: Store) -> None:
    created = [
        store.get_or_create("align", INPUTS, writer()),
        store.get_or_create("align", {**INPUTS, "a": 2}, writer()),
        store.get_or_create("align", {**INPUTS, "c": None}, writer()),
        store.get_or_create("finetune", INPUTS, writer()),
    ]
    assert len({artifact.path for artifact in created}) == 4
    assert not any(artifact.cached for artifact in created)


def test_artifact_has_metadata(store: Store) -> None:
    artifact = store.get_or_create("align", INPUTS, writer())
    meta = artifact.json(META)
    assert (meta["stage"], meta["key"], meta["inputs"]) == ("align", artifact.key, INPUTS)
    assert set(meta["files"]) == {"one.txt", "inner/two.txt"}
    # echo -n whole | sha256sum
    assert meta["files"]["one.txt"] == "5d5766cf2d78701614200418ee1450690d9af12c84d52545e4802f001ad53099"
    assert not unfinished(store)


def test_artifact_is_published_only_when_complete(store: Store) -> None:
    listings: list[Any] = []

    def make(folder: Path, checkpoints: Path) -> None:
        listings.append((list(folder.iterdir()), list(checkpoints.iterdir()), artifacts(store)))
        (folder / "x").write_text("x")
        listings.append(artifacts(store))

    store.get_or_create("align", INPUTS, make)
    assert listings == [([], [], []), []]


def test_two_processes_create_it_once(tmp_path: Path) -> None:
    script = """
        root, log = Path(sys.argv[1]), Path(sys.argv[2])
        def make(folder, checkpoints):
            with log.open("a") as file:
                file.write("made\\n")
            time.sleep(0.5)
            (folder / "x").write_text("x")
        (log.parent / f"ready-{os.getpid()}").touch()
        while len(list(log.parent.glob("ready-*"))) < 2:
            time.sleep(0.01)
        print(Store(root).get_or_create("align", {"a": 1}, make).cached)
    """
    both = [python(script, tmp_path / "store", tmp_path / "log") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert sorted(out.strip() for out, _ in outputs) == ["False", "True"], outputs
    assert (tmp_path / "log").read_text() == "made\n"


# ---------------------------------------------------------------------------------------------------------------------
# Failures and interruptions


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_failed_creation_leaves_no_artifact(store: Store, failure: BaseException) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        writer()(folder, checkpoints)
        raise failure

    with pytest.raises(type(failure)):
        store.get_or_create("align", INPUTS, make)
    assert not artifacts(store)
    assert not unfinished(store)
    assert not store.get_or_create("align", INPUTS, writer()).cached


def test_checkpoints_are_kept_until_the_artifact_is_complete(store: Store) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        checkpoints_at_start.append(sorted(path.name for path in checkpoints.glob("step-*")))
        (checkpoints / f"step-{len(checkpoints_at_start)}").write_text("half way")
        (folder / "x").write_text("x")
        if len(checkpoints_at_start) < 3:
            raise RuntimeError("interrupted")

    checkpoints_at_start: list[list[str]] = []
    for _ in range(2):
        with pytest.raises(RuntimeError):
            store.get_or_create("align", INPUTS, make)
    artifact = store.get_or_create("align", INPUTS, make)
    assert checkpoints_at_start == [[], ["step-1"], ["step-1", "step-2"]]
    assert sorted(path.name for path in artifact.path.iterdir()) == [META, "x"]
    assert not list((store.root / ".work").glob("*"))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_time_has_the_interrupted_attempts_that_it_resumes(
    checkpointed: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that left no checkpoint is repeated in full, so its time does not count."""
    now = [1000.0]
    monkeypatch.setattr("harmbench_vaccine.core.store.time.monotonic", lambda: now[0])

    def make(folder: Path, checkpoints: Path, ends: bool = False) -> None:
        now[0] += 10
        if checkpointed:
            (checkpoints / "step").write_text("half way")
        (folder / "x").write_text("x")
        if not ends:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.get_or_create("align", INPUTS, make)
        now[0] += 500  # between two attempts
    artifact = store.get_or_create("align", INPUTS, partial(make, ends=True))
    assert artifact.seconds == store.get_or_create("align", INPUTS, make).seconds == (30 if checkpointed else 10)


def test_checkpoints_of_different_inputs_are_separate(store: Store) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        assert not list(checkpoints.iterdir())
        (checkpoints / "mine").write_text("x")
        raise RuntimeError("interrupted")

    for number in range(2):
        with pytest.raises(RuntimeError, match="interrupted"):
            store.get_or_create("align", {"number": number}, make)


@pytest.mark.timeout(60)
def test_killed_process_leaves_no_artifact_and_no_lock(store: Store) -> None:
    process = python(
        """
        def make(folder, checkpoints):
            (folder / "half").write_text("half")
            (checkpoints / "step-1").write_text("kept")
            print("making", flush=True)
            time.sleep(600)
        Store(Path(sys.argv[1])).get_or_create("align", {"a": 1, "b": [2.5, "x"]}, make)
        """,
        store.root,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not artifacts(store)
    assert [path.name for path in store.root.glob(".aside/*/half")] == ["half"]  # killed while it was writing
    listings: list[Any] = []

    def make(folder: Path, checkpoints: Path) -> None:
        listings.append([list(folder.iterdir()), [path.name for path in checkpoints.iterdir()]])
        (folder / "x").write_text("x")

    artifact = store.get_or_create("align", INPUTS, make)
    assert not artifact.cached
    assert listings == [[[], ["step-1"]]]
    assert sorted(path.name for path in artifact.path.iterdir()) == [META, "x"]


@pytest.mark.timeout(60)
def test_what_killed_processes_left_is_removed_by_any_next_process(store: Store) -> None:
    """The next process has everything stored, so it creates nothing."""
    stored = store.get_or_create("align", INPUTS, writer())
    for folder in (".aside/align-killed", ".aside/align-killed-rank1", f".work/align-{stored.key}", ".work/align-late"):
        (store.root / folder / "inner").mkdir(parents=True)
    living = python(
        """
        def make(folder, checkpoints):
            print("making", flush=True)
            time.sleep(600)
        Store(Path(sys.argv[1])).get_or_create("align", {"a": 2}, make)
        """,
        store.root,
    )
    assert living.stdout is not None
    assert living.stdout.readline() == "making\n"
    key = store.path_of("align", {"a": 2}).name
    try:
        assert Store(store.root).get_or_create("align", INPUTS, writer()).cached
        assert [path.name for path in unfinished(store)] == [f"align-{key}"]
        left = {path.name for path in (store.root / ".work").iterdir()}
        assert left == {f"align-{key}", "align-late"}  # checkpoints of unfinished stages are kept
    finally:
        living.kill()
        living.communicate()


def test_finished_artifacts_leave_no_lock_files(store: Store) -> None:
    for number in range(3):
        store.get_or_create("align", {"number": number}, writer())
    assert list((store.root / ".locks").iterdir()) == []


@pytest.mark.parametrize("place", ["store", "store/align", "store/.aside", "store/.work", "store/.locks", "KEY"])
def test_file_in_the_place_of_a_folder(place: str, store: Store) -> None:
    path = store.path_of("align", INPUTS) if place == "KEY" else store.root.parent / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("foreign")
    with pytest.raises(HbvError, match="a file is in the place of a folder") as failure:
        store.get_or_create("align", INPUTS, writer())
    assert str(path) in one_sentence(failure.value)
    assert path.read_text() == "foreign"


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "meta cut", "meta gone", "meta empty", "meta other"])
def test_damaged_artifact_is_created_again(store: Store, damage: str) -> None:
    calls: list[int] = []
    first = store.get_or_create("align", INPUTS, writer(calls))
    meta = first.path / META
    match damage:
        case "changed":
            (first.path / "inner" / "two.txt").write_text("wholewhol!")
        case "missing":
            (first.path / "one.txt").unlink()
        case "extra":
            (first.path / "three.txt").write_text("")
        case "meta cut":
            meta.write_text(meta.read_text()[:40])
        case "meta gone":
            meta.unlink()
        case "meta empty":
            meta.write_text("{}")
        case "meta other":
            meta.write_text("[1]")
    again = store.get_or_create("align", INPUTS, writer(calls))
    assert not again.cached
    assert calls == [1, 1]
    assert again.path == first.path
    assert {path.name for path in again.path.iterdir()} == {"one.txt", "inner", META}
    assert (again.path / "inner" / "two.txt").read_text() == "wholewhole"
    assert store.get_or_create("align", INPUTS, writer(calls)).cached


def test_damaged_artifact_is_not_returned(store: Store) -> None:
    first = store.get_or_create("align", INPUTS, writer())
    (first.path / "one.txt").write_text("other")

    def fail(folder: Path, checkpoints: Path) -> None:
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            store.get_or_create("align", INPUTS, fail)


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


def one_sentence(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "size limit")],
)
def test_full_disk_is_one_sentence_and_leaves_no_artifact(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    write_text = Path.write_text

    def full(path: Path, text: str, *args: Any, **named: Any) -> int:
        if path.name == "two.txt":
            write_text(path, text[:3])
            raise OSError(code, os.strerror(code), str(path))
        return write_text(path, text, *args, **named)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(HbvError, match=message) as failure:
        store.get_or_create("align", INPUTS, writer())
    assert failure.value.exit_code == 1
    assert "align" in one_sentence(failure.value)
    assert not artifacts(store)
    assert not unfinished(store)
    monkeypatch.undo()
    assert not store.get_or_create("align", INPUTS, writer()).cached


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_full_disk_while_publishing(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, call, full)
    with pytest.raises(HbvError, match="the disk is full"):
        store.get_or_create("align", INPUTS, writer())
    monkeypatch.undo()
    assert not artifacts(store)
    assert not unfinished(store)


def test_full_disk_while_locking(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filelock.FileLock, "acquire", full)
    with pytest.raises(HbvError, match="the disk is full"):
        store.get_or_create("align", INPUTS, writer())


def test_full_disk_is_detected_as_a_cause(store: Store) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("an error of a library") from error

    with pytest.raises(HbvError, match="the disk is full"):
        store.get_or_create("align", INPUTS, make)


@pytest.mark.parametrize(
    "other", [OSError(errno.EACCES, "Permission denied"), ValueError("os errors are many"), RuntimeError("os error 2")]
)
def test_other_errors_are_unchanged(store: Store, other: Exception) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        raise other

    with pytest.raises(type(other)) as failure:
        store.get_or_create("align", INPUTS, make)
    assert failure.value is other


@pytest.mark.parametrize(
    ("library", "write"),
    [
        ("plain", "(folder / 'big').write_bytes(bytes(200_000))"),
        ("safetensors", "save_file({'w': torch.zeros(50_000)}, folder / 'big.safetensors')"),
        ("torch", "torch.save({'w': torch.zeros(50_000)}, folder / 'big.pt')"),
    ],
)
def test_file_size_limit(tmp_path: Path, library: str, write: str) -> None:
    heavy = "import torch\nfrom safetensors.torch import save_file\n" if library in ("safetensors", "torch") else ""
    process = python(
        f"""
import resource
{heavy}from harmbench_vaccine.core.errors import HbvError
def make(folder, checkpoints):
    (folder / "small").write_text("x")
    {write}
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
try:
    Store(Path(sys.argv[1])).get_or_create("align", {{"a": 1}}, make)
except HbvError as error:
    print(f"{{error.exit_code}} {{error}}")
finally:  # coverage writes a larger file when the process ends
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
        tmp_path / "store",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("1 While writing the align stage")
    assert out.count("\n") == 1
    assert err == ""
    store = Store(tmp_path / "store")
    assert not artifacts(store)
    assert not unfinished(store)


# ---------------------------------------------------------------------------------------------------------------------
# Single files


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "ü old")
    assert path.read_text(encoding="utf-8") == "ü old"

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "ü old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_json_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": [1]}))
    assert Artifact("s", "k", tmp_path, 0.0, cached=True).json("x.json") == {"a": [1]}
