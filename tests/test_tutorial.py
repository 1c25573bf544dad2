"""The tutorial runs on the testbed: the test writes its files and runs its commands."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from support.cli import hbv

TUTORIAL = Path(__file__).parents[1] / "docs" / "your-own-defense.md"


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_tutorial_has_files_and_commands() -> None:
    assert [language for language, _ in blocks()] == ["sh", "python", "sh", "sh", "toml"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tutorial_produces_a_leaderboard_row(
    tmp_path: Path, testbed_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    outputs = []
    for language, text in blocks():
        if language == "python":
            name = text.splitlines()[0].removeprefix("# ")
            (work / name).write_text(text, encoding="utf-8")
        if language == "sh":
            for line in text.splitlines():
                done = hbv(*shlex.split(line)[1:], home=testbed_home)
                assert done.code == 0, (line, done.out, done.err)
                outputs.append(done.out)
    with (work / "surgery.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["defense"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"sft", "surgery"}
    assert all(row["collapsed"] == "False" and float(row["finetune_accuracy"]) > 90 for row in rows.values())
    board = (work / "board" / "leaderboard.md").read_text(encoding="utf-8")
    assert "surgery" in board
    assert "surgery" in outputs[-1]
