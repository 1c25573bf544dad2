"""The tutorial runs on the testbed: the test writes its files and runs its commands."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "your-own-defense.md"


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_tutorial_has_files_and_commands() -> None:
    assert [language for language, _ in blocks()] == ["sh", "python", "sh", "sh", "toml"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tutorial_produces_a_leaderboard_row(tmp_path: Path, testbed_home: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "HBV_HOME": str(testbed_home)}
    outputs = []
    for language, text in blocks():
        if language == "python":
            name = text.splitlines()[0].removeprefix("# ")
            (work / name).write_text(text, encoding="utf-8")
        if language == "sh":
            for line in text.splitlines():
                command = [sys.executable, "-m", "harmbench_vaccine", *shlex.split(line)[1:]]
                done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, (line, done.stdout, done.stderr)
                outputs.append(done.stdout)
    with (work / "surgery.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["defense"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"sft", "surgery"}
    assert all(row["collapsed"] == "False" and float(row["finetune_accuracy"]) > 90 for row in rows.values())
    board = (work / "board" / "leaderboard.md").read_text(encoding="utf-8")
    assert "surgery" in board
    assert "surgery" in outputs[-1]
