"""Artifacts are whole or not there, made once, and a full disk or a killed process leaves nothing in the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from harmbench_vaccine.core import store as store_module
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.jsonl import write_atomically
from harmbench_vaccine.core.store import META, Artifact, Store

INPUTS = {"a": 1, "b": [2.5, "x"]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def writer(calls: list[int] | None = None, text: str = "whole") -> Callable[[Path, Path], None]:
    """A maker of two files, one in a folder; it counts its calls."""

    def make(folder: Path, checkpoints: Path) -> None:
        if calls is not None:
            calls.append(1)
        (folder / "inner").mkdir()
        (folder / "one.txt").write_text(text)
        (folder / "inner" / "two.txt").write_text(text * 2)

    return make


def artifacts(store: Store) -> list[Path]:
    """Every folder that a reader could take for an artifact."""
    return [path for path in store.root.glob("*/*") if not path.parent.name.startswith(".")]


def left_aside(store: Store) -> list[Path]:
    return list((store.root / ".aside").glob("*"))


def python(script: str, *args: object, **more: Any) -> subprocess.Popen[str]:
    """Another process that has `Store` at hand."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom harmbench_vaccine.core.store import Store\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(script), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Made once


def test_the_second_call_finds_what_the_first_made(store: Store) -> None:
    calls: list[int] = []
    first = store.get_or_create("align", INPUTS, writer(calls))
    second = store.get_or_create("align", dict(reversed(INPUTS.items())), writer(calls))
    assert calls == [1]
    assert (first.cached, second.cached) == (False, True)
    assert (second.path, second.key, second.stage) == (first.path, first.key, "align")
    assert second.seconds == round(first.seconds, 3)
    assert (second.path / "inner" / "two.txt").read_text() == "wholewhole"
    assert Store(store.root).get_or_create("align", INPUTS, writer(calls)).cached


def test_other_inputs_or_another_stage_are_another_artifact(store: Store) -> None:
    made = [
        store.get_or_create("align", INPUTS, writer()),
        store.get_or_create("align", {**INPUTS, "a": 2}, writer()),
        store.get_or_create("align", {**INPUTS, "c": None}, writer()),
        store.get_or_create("finetune", INPUTS, writer()),
    ]
    assert len({artifact.path for artifact in made}) == 4
    assert not any(artifact.cached for artifact in made)


def test_an_artifact_describes_itself(store: Store) -> None:
    artifact = store.get_or_create("align", INPUTS, writer())
    meta = artifact.json(META)
    assert (meta["stage"], meta["key"], meta["inputs"]) == ("align", artifact.key, INPUTS)
    assert set(meta["files"]) == {"one.txt", "inner/two.txt"}
    # echo -n whole | sha256sum
    assert meta["files"]["one.txt"] == "5d5766cf2d78701614200418ee1450690d9af12c84d52545e4802f001ad53099"
    assert not left_aside(store)


def test_a_maker_sees_an_empty_folder_and_is_published_only_when_done(store: Store) -> None:
    seen: list[Any] = []

    def make(folder: Path, checkpoints: Path) -> None:
        seen.append((list(folder.iterdir()), list(checkpoints.iterdir()), artifacts(store)))
        (folder / "x").write_text("x")
        seen.append(artifacts(store))

    store.get_or_create("align", INPUTS, make)
    assert seen == [([], [], []), []]


def test_two_processes_make_it_once(tmp_path: Path) -> None:
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
    said = [process.communicate(timeout=60) for process in both]
    assert sorted(out.strip() for out, _ in said) == ["False", "True"], said
    assert (tmp_path / "log").read_text() == "made\n"


# ---------------------------------------------------------------------------------------------------------------------
# Failures and interruptions


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_a_maker_that_raises_leaves_nothing(store: Store, failure: BaseException) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        writer()(folder, checkpoints)
        raise failure

    with pytest.raises(type(failure)):
        store.get_or_create("align", INPUTS, make)
    assert not artifacts(store)
    assert not left_aside(store)
    assert not store.get_or_create("align", INPUTS, writer()).cached


def test_checkpoints_outlive_a_failure_and_are_gone_when_the_artifact_is_whole(store: Store) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        seen.append(sorted(path.name for path in checkpoints.iterdir()))
        (checkpoints / f"step-{len(seen)}").write_text("half way")
        (folder / "x").write_text("x")
        if len(seen) < 3:
            raise RuntimeError("interrupted")

    seen: list[list[str]] = []
    for _ in range(2):
        with pytest.raises(RuntimeError):
            store.get_or_create("align", INPUTS, make)
    artifact = store.get_or_create("align", INPUTS, make)
    assert seen == [[], ["step-1"], ["step-1", "step-2"]]
    assert sorted(path.name for path in artifact.path.iterdir()) == [META, "x"]
    assert not list((store.root / ".work").glob("*"))


def test_checkpoints_are_kept_apart_by_inputs(store: Store) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        assert not list(checkpoints.iterdir())
        (checkpoints / "mine").write_text("x")
        raise RuntimeError("interrupted")

    for number in range(2):
        with pytest.raises(RuntimeError, match="interrupted"):
            store.get_or_create("align", {"number": number}, make)


@pytest.mark.timeout(60)
def test_a_killed_process_leaves_no_artifact_and_no_lock(store: Store) -> None:
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
    assert [path.name for path in store.root.glob(".aside/*/half")] == ["half"]  # it was killed in the middle
    seen: list[Any] = []

    def make(folder: Path, checkpoints: Path) -> None:
        seen.append([list(folder.iterdir()), [path.name for path in checkpoints.iterdir()]])
        (folder / "x").write_text("x")

    artifact = store.get_or_create("align", INPUTS, make)
    assert not artifact.cached
    assert seen == [[[], ["step-1"]]]
    assert sorted(path.name for path in artifact.path.iterdir()) == [META, "x"]


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "meta cut", "meta gone", "meta empty", "meta other"])
def test_a_damaged_artifact_is_made_again(store: Store, damage: str) -> None:
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


def test_a_damaged_artifact_that_cannot_be_made_again_is_not_found(store: Store) -> None:
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
    said = str(error)
    assert "\n" not in said
    assert said.endswith(".")
    return said


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "size limit")],
)
def test_a_full_disk_is_told_in_one_sentence_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    whole = Path.write_text

    def full(path: Path, text: str, *args: Any, **named: Any) -> int:
        if path.name == "two.txt":
            whole(path, text[:3])
            raise OSError(code, os.strerror(code), str(path))
        return whole(path, text, *args, **named)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(HbvError, match=said) as failure:
        store.get_or_create("align", INPUTS, writer())
    assert failure.value.exit_code == 1
    assert "align" in one_sentence(failure.value)
    assert not artifacts(store)
    assert not left_aside(store)
    monkeypatch.undo()
    assert not store.get_or_create("align", INPUTS, writer()).cached


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_disk_that_fills_up_while_publishing(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, call, full)
    with pytest.raises(HbvError, match="the disk is full"):
        store.get_or_create("align", INPUTS, writer())
    monkeypatch.undo()
    assert not artifacts(store)
    assert not left_aside(store)


def test_a_disk_too_full_for_the_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filelock.FileLock, "acquire", full)
    with pytest.raises(HbvError, match="the disk is full"):
        store.get_or_create("align", INPUTS, writer())


def test_a_disk_error_deep_in_the_chain_is_found(store: Store) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("a library's own words") from error

    with pytest.raises(HbvError, match="the disk is full"):
        store.get_or_create("align", INPUTS, make)


@pytest.mark.parametrize(
    "other", [OSError(errno.EACCES, "Permission denied"), ValueError("os errors are many"), RuntimeError("os error 2")]
)
def test_other_errors_stay_what_they_are(store: Store, other: Exception) -> None:
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
def test_a_file_size_limit_whichever_library_meets_it(tmp_path: Path, library: str, write: str) -> None:
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
finally:  # what measures coverage in here writes more than that when the process ends
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
    assert not left_aside(store)


# ---------------------------------------------------------------------------------------------------------------------
# Single files


def test_write_text_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "ü old")
    assert path.read_text(encoding="utf-8") == "ü old"

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "ü old"
    assert [one.name for one in tmp_path.iterdir()] == ["result.json"]


def test_the_json_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": [1]}))
    assert Artifact("s", "k", tmp_path, 0.0, cached=True).json("x.json") == {"a": [1]}
