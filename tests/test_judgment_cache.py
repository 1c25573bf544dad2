"""The cache of judgments where its file cannot be used: a note, and judging goes on without it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from harmbench_vaccine.core.types import RawJudgment
from harmbench_vaccine.evaluation import judgment_cache
from harmbench_vaccine.evaluation.judgment_cache import FILE, open_judgments
from support.runs import Notes
from support.users import open_folder, unprivileged

JUDGMENT = {"key": RawJudgment({"flagged": 0.5}, "text")}


def stored(root: Path) -> dict[str, RawJudgment]:
    with open_judgments(root) as cache:
        cache.put(JUDGMENT)
    with open_judgments(root) as cache:
        return cache.get(["key", "other"])


def unavailable(root: Path) -> str:
    """Use a cache that cannot be used, and return its only note."""
    notes = Notes()
    with open_judgments(root, notes) as cache:
        cache.put(JUDGMENT)
        assert cache.get(["key"]) == {}
    [text] = notes.texts
    assert text.startswith("raw judgments are not cached: ")
    return text


def test_judgments_are_stored(tmp_path: Path) -> None:
    assert stored(tmp_path) == JUDGMENT


def test_locked_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path)
    connect = sqlite3.connect
    monkeypatch.setattr(judgment_cache.sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.1))
    with closing(connect(tmp_path / FILE)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "locked" in unavailable(tmp_path)
    assert stored(tmp_path) == JUDGMENT
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_file_of_another_user(mode: int) -> None:
    with open_folder() as root:
        stored(root)
        (root / FILE).chmod(mode)
        with unprivileged():
            assert "Permission denied" in unavailable(root)
        assert stored(root) == JUDGMENT
        assert [path.name for path in root.iterdir()] == [FILE]


def test_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    assert str(tmp_path / FILE) in unavailable(tmp_path)


def test_database_of_another_program(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as other, other:
        other.execute("CREATE TABLE judgments (name TEXT)")
    assert "column" in unavailable(tmp_path)
