"""Hashes of files and folders: they cover everything that is read, and every folder can be hashed or is named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmbench_vaccine.core import hashing
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.hashing import CACHED_ABOVE, content_hash
from harmbench_vaccine.data.sources import read_rows
from support.users import open_folder, unprivileged

ROW = '{"instruction": "a", "output": "b"}\n'


def read(path: Path) -> int:
    return len(read_rows(str(path), "train", ("instruction", "output")))


def test_hash_of_a_folder_covers_a_linked_folder_whose_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "copy" / "data").mkdir(parents=True)
    for folder in ("elsewhere", "copy/data"):
        (tmp_path / folder / "train.jsonl").write_text(ROW)
    assert read(tmp_path / "set") == 1
    assert content_hash(tmp_path / "set") == content_hash(tmp_path / "copy")
    (tmp_path / "elsewhere" / "train.jsonl").write_text(ROW * 2)
    assert read(tmp_path / "set") == 2
    assert content_hash(tmp_path / "set") != content_hash(tmp_path / "copy")


def test_folder_with_a_link_to_itself_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "set" / "train.jsonl").write_text(ROW)
    first = content_hash(tmp_path / "set")
    (tmp_path / "set" / "inner" / "up").symlink_to(tmp_path / "set")
    assert content_hash(tmp_path / "set") == first


@pytest.mark.parametrize("size", [1, CACHED_ABOVE + 1])
def test_file_with_a_name_in_another_encoding_is_hashed(tmp_path: Path, size: int) -> None:
    (tmp_path / "set").mkdir()
    hashes = {content_hash(tmp_path / "set")}
    for content in (b"a", b"b"):
        (tmp_path / "set" / os.fsdecode(b"\xff.bin")).write_bytes(content * size)
        hashes.add(content_hash(tmp_path / "set"))
    assert len(hashes) == 3


def test_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changed a moment ago is read again: another change may leave the same size and times."""
    reads: list[Path] = []
    sha256 = hashing.sha256
    monkeypatch.setattr(hashing, "sha256", lambda path: reads.append(path) or sha256(path))
    (tmp_path / "rows.jsonl").write_text(ROW)
    for recent, count in ((hashing._RECENT, 3), (0, 1)):
        monkeypatch.setattr(hashing, "_RECENT", recent)
        reads.clear()
        assert len({content_hash(tmp_path) for _ in range(3)}) == 1
        assert len(reads) == count


@pytest.mark.parametrize("recent", [0, hashing._RECENT])
@pytest.mark.parametrize("change", ["write", "replace", "keep times"])
def test_changed_file_of_the_same_size_has_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, recent: int
) -> None:
    monkeypatch.setattr(hashing, "_RECENT", recent)
    path, hashes = tmp_path / "rows.jsonl", []
    for number in range(5):
        written = tmp_path / "new" if change == "replace" else path
        before = path.stat() if path.exists() else None
        written.write_bytes(str(number).encode())
        if change == "keep times" and before:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(written, path)
        hashes.append(content_hash(path))
        time.sleep(0.02)  # longer than a tick of the clock of the file system
    assert len(set(hashes)) == 5


@pytest.mark.parametrize("use", [read, content_hash])
def test_unreadable_files_and_folders_are_named(use: Callable[[Path], object]) -> None:
    with open_folder() as folder:
        (folder / "rows.jsonl").write_text(ROW)
        (folder / "rows.jsonl").chmod(0)
        for name, mode in {"closed": 0o000, "listed": 0o444, "inside/data": 0o000}.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "train.jsonl").write_text(ROW)
            (folder / name).chmod(mode)
        with unprivileged():
            for name in ("rows.jsonl", "closed", "listed", "inside"):
                with pytest.raises(BadInput, match=r"cannot be read: Permission denied\.") as raised:
                    use(folder / name)
                assert str(folder / name) in str(raised.value)
        for name in ("closed", "listed", "inside/data"):
            (folder / name).chmod(0o700)  # so that the folder can be deleted


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_split_that_is_not_a_regular_file_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "train.jsonl")
    with pytest.raises(BadInput, match=r"train\.jsonl is not a regular file"):
        read(tmp_path)


def test_split_that_is_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(BadInput, match=r"train\.jsonl cannot be read: No such file or directory"):
        read(tmp_path)
