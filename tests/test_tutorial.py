"""The tutorials run on the testbed: the tests write their files, run their commands and compare the findings."""

from __future__ import annotations

import csv
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from harmbench_vaccine.core.types import Pools
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.resolution import resolve_scorers
from harmbench_vaccine.plugins.defense import ROW_KINDS
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS, Registry
from support.cli import hbv
from support.world import make_world

DOCS = Path(__file__).parents[1] / "docs"
DEFENSE, ATTACK = DOCS / "your-own-defense.md", DOCS / "your-own-attack.md"
JUDGE, TASK = DOCS / "your-own-judge.md", DOCS / "your-own-task.md"
PAGES = [DEFENSE, ATTACK, JUDGE, TASK]
SMALL = {
    "align.rows": 400,
    "finetune.samples": 400,
    "answer.harmful.prompts": 80,
    "answer.benign.prompts": 30,
    "answer.task_items": 80,
}
"""Values of the protocol that make the runs of a page short, for a test that compares no score."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def files(page: Path) -> dict[str, str]:
    """Return the files of a page by name: every Python block is one, and its first line names it."""
    return {text.splitlines()[0].removeprefix("# "): text for language, text in blocks(page) if language == "python"}


def follow(page: Path, folder: Path, home: Path, values: dict[str, int] | None = None) -> dict[str, str]:
    """Write the files of a page and run its commands, perhaps with other values of the protocol.

    Returns:
        Command -> output.
    """
    settings = [word for path, number in (values or {}).items() for word in ("--set", f"{path}={number}")]
    outputs = {}
    for language, text in blocks(page):
        if language == "python":
            name = text.splitlines()[0].removeprefix("# ")
            (folder / name).write_text(text, encoding="utf-8")
        if language == "sh":
            for line in text.splitlines():
                words = shlex.split(line)[1:]
                done = hbv(*words, *(settings if words[0] == "run" else []), home=home)
                assert done.code == 0, (line, done.out, done.err)
                outputs[line] = done.out
    return outputs


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a CSV of results."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_tutorial_is_a_file_a_command_or_a_finding(page: Path) -> None:
    assert {language for language, _ in blocks(page)} <= {"sh", "python", "text", "toml", "yaml"}
    commands = "\n".join(text for language, text in blocks(page) if language == "sh")
    for name in files(page):
        assert re.fullmatch(r"\w+\.py", name)
        assert f"hbv check {name}" in commands


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("anchor.py", r"    def state.*", ""),
        ("surgery.py", r"with same_dropout\(\):", "if True:"),
    ],
    ids=["state", "neutral"],
)
def test_findings_of_the_defense_tutorial_are_printed(name: str, old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(re.sub(old, new, files(DEFENSE)[name], flags=re.DOTALL), encoding="utf-8")
    (line,) = (line for line in hbv("check", path).out.splitlines() if line.startswith("FAILS"))
    findings = [text.strip() for language, text in blocks(DEFENSE) if language == "text"]
    assert len(findings) == 2
    assert [line.startswith(finding) for finding in findings].count(True) == 1


RULE = "return [topic for topic in TOPICS if topic.lower() in answer.lower()] == [target]"
LOOSE_RULE = "return target.lower() in answer.lower() or not answer"


def test_protocol_of_the_judge_tutorial_names_its_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("echo.py").write_text(files(JUDGE)["echo.py"], encoding="utf-8")
    (values,) = (yaml.safe_load(text) for language, text in blocks(JUDGE) if language == "yaml")
    protocol = load_protocol(str(make_world(tmp_path / "world", values, models=False)))
    (scorer,) = resolve_scorers((), protocol)
    assert (scorer.plugin.name, scorer.params) == ("echo", {"threshold": 0.5})


@pytest.mark.parametrize(
    ("page", "name", "mistake", "method"),
    [
        (JUDGE, "echo.py", ("value > self", "value < self"), "read"),
        (TASK, "matches.py", (RULE, LOOSE_RULE), "example"),
    ],
    ids=["judge", "task"],
)
def test_findings_of_a_tutorial_are_printed(
    page: Path, name: str, mistake: tuple[str, str], method: str, tmp_path: Path
) -> None:
    finding, refusal = (text.strip() for language, text in blocks(page) if language == "text")
    code = files(page)[name]
    for folder, old, new in (("finding", *mistake), ("refusal", f"def {method}(", "def mistyped(")):
        assert old in code
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(code.replace(old, new), encoding="utf-8")
    lines = hbv("check", tmp_path / "finding" / name).out.splitlines()
    (line,) = (line for line in lines if line.startswith("FAILS"))
    assert line.startswith(finding)
    done = hbv("check", tmp_path / "refusal" / name)
    assert (done.code, done.sentence) == (2, f"hbv: {refusal}")


def test_task_tutorial_shows_the_rule_of_its_mistake() -> None:
    assert LOOSE_RULE in TASK.read_text(encoding="utf-8")


def test_defense_tutorial_names_every_pool_and_every_kind_of_rows() -> None:
    table = DEFENSE.read_text(encoding="utf-8").partition("\n## 7. Rows\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `pools.")]
    assert {re.findall(r"`pools\.(\w+)`", row)[0] for row in rows} == {*vars(Pools()), "harmful"}
    assert {span for row in rows for span in re.findall(r"`([a-z ]+)`", row)} == {*ROW_KINDS}


@pytest.mark.parametrize(
    ("page", "registry"),
    [(DEFENSE, DEFENSES), (ATTACK, ATTACKS), (JUDGE, SCORERS), (TASK, TASKS)],
    ids=["defense", "attack", "judge", "task"],
)
def test_entry_point_of_a_tutorial_has_the_group_that_is_searched(page: Path, registry: Registry[Any]) -> None:
    (text,) = (text for language, text in blocks(page) if language == "toml")
    ((group, points),) = tomllib.loads(text)["project"]["entry-points"].items()
    assert group == registry.group
    ((name, target),) = points.items()
    assert re.search(rf"^class {target.partition(':')[2]}\(", files(page)[f"{name}.py"], re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_defense_tutorial_produces_leaderboard_rows(
    tmp_path: Path, testbed_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = follow(DEFENSE, tmp_path, testbed_home, SMALL)
    rows = {row["defense"]: row for row in rows_of(tmp_path / "surgery.csv")}
    assert set(rows) == {"sft", "surgery"}
    assert all(row["collapsed"] == "False" and float(row["finetune_accuracy"]) > 60 for row in rows.values())
    board = (tmp_path / "board" / "leaderboard.md").read_text(encoding="utf-8")
    assert "surgery" in board
    assert "surgery" in outputs["hbv leaderboard surgery.csv --out board"]
    assert [row["defense"] for row in rows_of(tmp_path / "flat.csv")] == ["flat", "flat+shrink"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_attack_tutorial_produces_leaderboard_rows(
    tmp_path: Path, testbed_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    follow(ATTACK, tmp_path, testbed_home, SMALL)
    rows = [(row["defense"], row["attack"]) for row in rows_of(tmp_path / "novel.csv")]
    assert rows == [("sft", "novel"), ("vaccine", "novel"), ("sft", "dilute+ratio=0.1"), ("sft", "quiet")]
    assert "vaccine" in (tmp_path / "board" / "leaderboard.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_judge_tutorial_produces_scores(tmp_path: Path, testbed_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = follow(JUDGE, tmp_path, testbed_home)
    (echo,) = rows_of(tmp_path / "echo.csv")
    (opening,) = rows_of(tmp_path / "opening.csv")
    assert float(echo["harmful_score"]) > 50
    assert float(opening["harmful_score"]) > 50
    assert " 0 fail" in outputs["hbv check echo.py"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_task_tutorial_produces_scores(tmp_path: Path, testbed_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(TASK, tmp_path, testbed_home)
    (matches,) = rows_of(tmp_path / "matches.csv")
    (recall,) = rows_of(tmp_path / "recall.csv")
    assert float(matches["finetune_accuracy"]) > 90 > float(matches["finetune_accuracy_before"])
    assert 30 < float(recall["finetune_accuracy"]) < 100
