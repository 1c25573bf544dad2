"""Files that survive kills, power cuts and other users: atomic writes, sealed folders, locks, temporary folders."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import filelock
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmbench_vaccine.core import durable, locks
from harmbench_vaccine.core.disk_errors import ensure_space, readable_disk_errors
from harmbench_vaccine.core.durable import read_sealed, seal, write_atomically
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.store import Store
from support.examples import examples
from support.users import open_folder, unprivileged


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes


def kill_while_writing(path: Path) -> None:
    """Kill a process between its write of a temporary file and the rename."""
    script = "import os, sys, signal\nfrom pathlib import Path\nfrom harmbench_vaccine.core import durable\n"
    script += "durable.os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "durable.write_atomically(Path(sys.argv[1]), 'half')\n"
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)


def test_temporary_file_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    path, other = tmp_path / "result.json", tmp_path / "other.json"
    kill_while_writing(path)
    assert len(names(tmp_path)) == 1
    write_atomically(other, "other")
    assert len(names(tmp_path)) == 2  # only whoever writes the same file knows that it is abandoned
    write_atomically(path, "new")
    assert names(tmp_path) == {"result.json", "other.json"}
    assert path.read_text() == "new"


def test_temporary_file_of_a_living_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "result.json", os.replace

    def write_in_between(source: Path, target: Path) -> None:
        monkeypatch.undo()
        write_atomically(path, "second")
        replace(source, target)

    monkeypatch.setattr(durable.os, "replace", write_in_between)
    write_atomically(path, "first")
    assert (path.read_text(), names(tmp_path)) == ("first", {"result.json"})


def test_symbolic_link_and_mode_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target.csv", tmp_path / "link.csv"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert (target.read_text(), mode(target), names(target.parent)) == ("new", 0o640, {"target.csv"})


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        descriptor = os.open(folder / "private", os.O_CREAT | os.O_WRONLY, 0o600)  # as safetensors does
        os.close(descriptor)
        (folder / "inner").mkdir()
        (folder / "inner" / "public").touch(0o666)

    with umask(mask):
        store = Store(tmp_path / "store")
        store.get_or_create("align", {}, make)
        with locks.shared_lock(tmp_path / "lock"):
            write_atomically(tmp_path / "file", "")
    paths = [*store.root.rglob("*"), tmp_path / "lock", tmp_path / "file"]
    assert {mode(path) for path in paths if path.is_file()} == {0o666 & ~mask}
    assert {mode(path) for path in paths if path.is_dir()} == {0o777 & ~mask}


def test_longest_name(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), "text")
    assert names(tmp_path) == {"x" * 255}


# ---------------------------------------------------------------------------------------------------------------------
# Sealed folders

CONTENT = {"weights.bin": bytes(range(256)), "inner/config.json": b'{"r": 4}', "inner/deep/empty": b""}


def sealed(folder: Path) -> Path:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    seal(folder, "manifest", {"number": 1.5, "text": "ü\n"})
    return folder


def test_sealed_folder_is_whole(tmp_path: Path) -> None:
    manifest = read_sealed(sealed(tmp_path), "manifest")
    assert manifest is not None
    assert (manifest["number"], manifest["text"], set(manifest["files"])) == (1.5, "ü\n", set(CONTENT))
    # printf '{"r": 4}' | sha256sum
    assert manifest["files"]["inner/config.json"] == "9006e6a425deba9a8a1a50c0aebc3c76c5b8eaaceb5fee108f8ef0518b60ba11"


@settings(max_examples=examples(100), deadline=None)
@given(st.data())
def test_no_damage_of_a_sealed_folder_is_unnoticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name, mock.patch.object(durable.os, "fsync"):  # which takes most of the time
        folder = sealed(Path(name))
        intact = read_sealed(folder, "manifest")
        path = folder / data.draw(st.sampled_from(["manifest", *CONTENT]))
        content = path.read_bytes()
        kinds = ["remove", "append", "folder", "extra"] + ["cut", "empty", "flip"] * bool(content)
        match data.draw(st.sampled_from(kinds)):
            case "cut":
                path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
            case "empty":
                path.write_bytes(b"")
            case "flip":
                place, bit = data.draw(st.integers(0, len(content) - 1)), 1 << data.draw(st.integers(0, 7))
                path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            case "remove":
                path.unlink()
            case "append":
                path.write_bytes(content + b"\0")
            case "folder":
                path.unlink()
                path.mkdir()
            case "extra":
                path.with_name("extra").touch()
        with suppress(FileNotFoundError, IsADirectoryError):  # no manifest
            manifest = read_sealed(folder, "manifest")
            assert manifest is None, intact


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"files": {}, "checksum": 1}', "\ud800"])
def test_manifest_that_is_not_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest").write_bytes(text.encode(errors="surrogatepass"))
    assert read_sealed(tmp_path, "manifest") is None


@pytest.mark.parametrize("name", ["artifact.json", "weights.bin", "inner", "."])
def test_unreadable_artifact_is_reported_and_not_created_again(name: str) -> None:
    def make(folder: Path, checkpoints: Path) -> None:
        sealed(folder)

    with open_folder() as root:
        store = Store(root)
        locked = store.get_or_create("align", {}, make).path / name
        before = mode(locked)
        locked.chmod(0)
        try:
            with unprivileged(), pytest.raises(HbvError) as failure:
                store.get_or_create("align", {}, make)
        finally:
            locked.chmod(before)
        assert store.get_or_create("align", {}, make).cached
    assert f"permission denied: {locked}" in str(failure.value)
    assert "damaged" not in str(failure.value)


# ---------------------------------------------------------------------------------------------------------------------
# Disk errors


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (lambda folder: (folder / ("x" * 256)).touch(), "the name is too long"),
        (lambda folder: (folder / "file" / "x").write_text(""), "a file is in the place of a folder"),
        (lambda folder: (folder / "file").mkdir(), "a file is in the place of a folder"),
        (lambda folder: (folder / "inner").write_text(""), "a folder is in the place of a file"),
        (lambda folder: (folder / "loop").write_text(""), "its symbolic links form a loop"),
    ],
)
def test_disk_errors_name_the_path(action: object, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(HbvError) as failure, readable_disk_errors("the result", tmp_path / "other"):
        action(tmp_path)  # type: ignore[operator]
    assert reason in str(failure.value)
    assert f"{tmp_path}/" in str(failure.value)
    assert f"{tmp_path}/other" not in str(failure.value)


def test_disk_errors_of_a_library_in_rust(tmp_path: Path) -> None:
    message = "Error while serializing: I/O error: Read-only file system (os error 30)"
    with (
        pytest.raises(HbvError, match=f"the file system is read-only: {tmp_path}"),
        readable_disk_errors("the align stage", tmp_path),
    ):
        raise RuntimeError(message)


def fail_after_a_handled_error(folder: Path) -> None:
    try:
        (folder / ("x" * 256)).touch()
    except OSError:
        raise ValueError("other")  # noqa: B904  # the earlier error is only the context


def test_handled_errors_do_not_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other"), readable_disk_errors("the align stage", tmp_path):
        fail_after_a_handled_error(tmp_path)


def test_space_is_checked(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    ensure_space(tmp_path, free // 2, "the align stage")
    with pytest.raises(
        HbvError, match=f"The disk is full: the align stage needs about .* GB, but {tmp_path} has .* left"
    ):
        ensure_space(tmp_path, 2 * free, "the align stage")


@pytest.mark.parametrize(("free", "text"), [(400, "0.4 kB"), (25_000_000, "25.0 MB"), (7_500_000_000, "7.5 GB")])
def test_space_is_readable(free: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(HbvError, match=f"has {text} left"):
        ensure_space(tmp_path, 2 * free, "the align stage")


# ---------------------------------------------------------------------------------------------------------------------
# Temporary folders


def test_temporary_folders_of_dead_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, lock = locks.temporary_folder("hbv-test-")
    dead, lock_of_dead = locks.temporary_folder("hbv-test-")
    (dead / "model").write_text("large")
    lock_of_dead.release()  # the kernel does so if the process is killed
    new, _ = locks.temporary_folder("hbv-test-")
    assert {living, dead, new} == set(tmp_path.iterdir())  # a process that has just begun may not have its lock yet
    for folder in (living, dead):
        os.utime(folder, (0, time.time() - 100))
    newest, _ = locks.temporary_folder("hbv-test-")
    assert {living, new, newest} == set(tmp_path.iterdir())
    assert lock.is_locked


def test_lock_is_usable_by_the_group(tmp_path: Path) -> None:
    with umask(0o002), locks.shared_lock(tmp_path / "lock") as lock:
        assert isinstance(lock, filelock.FileLock)
        assert mode(tmp_path / "lock") == 0o664
