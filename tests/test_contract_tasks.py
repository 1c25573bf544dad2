"""Contract checks of tasks: the built-in ones hold, and one broken task for each check fails with its line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.plugins.contract import ContractReport, find_plugins, run_contract
from harmbench_vaccine.plugins.contract.findings import Fails
from harmbench_vaccine.plugins.contract.side_effects import observe_side_effects
from harmbench_vaccine.plugins.registry import TASKS
from harmbench_vaccine.plugins.task_rows import training_and_test_rows
from support import tiny
from support.cli import hbv
from support.world import make_world

TASK = '''"""Sums: the sum of two numbers."""

import random
import socket
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PrivateAttr

from harmbench_vaccine.plugins import Example, Grade, Task, param


class Sums(Task):
    """Adds two numbers."""

    dataset: ClassVar[str] = "sums"
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")
    train_split: ClassVar[str] = "train[:-10]"
    test_split: ClassVar[str] = "train[-10:]"
    chance: ClassVar[float] = 0.0
    scoring_only: ClassVar[tuple[str, ...]] = ("loose",)

    data: str = param("sums.jsonl", "file with the rows", source="a test", main=True)
    loose: bool = param(False, "an answer may have more words", source="a test")
    _uses: int = PrivateAttr(0)

    def locations(self):
        return {"sums": self.data}

    def rows(self, read):
        return read("sums", self.train_split), read("sums", self.test_split)

    def example(self, id, row):
        sum = row["answer"]
        return Example(id, row["question"], response=sum, target=sum)

    def flexible(self, answer, target):
        parts = answer.split()
        return target in parts if self.loose else parts == [target]

    def scores(self, rule, rows):
        return [float(getattr(self, rule)(row["answer"], row["target"])) for row in rows]
'''
ROWS = 'return read("sums", self.train_split), read("sums", self.test_split)'
SUM = 'sum = row["answer"]'
SPLIT = "parts = answer.split()"
ROW_SCORE = 'float(getattr(self, rule)(row["answer"], row["target"]))'
LOOSE = "target in parts if self.loose else parts == [target]"
DEF_ROWS = "    def rows"


def grading(grade: str) -> str:
    """Return the code of a judge that gives every item this grade."""
    method = f"    def grade(self, rows, progress=None):\n        return [{grade} for row in rows]"
    return f"    graded: ClassVar[bool] = True\n\n{method}\n\n{DEF_ROWS}"


BROKEN: dict[str, tuple[str, dict[str, str], str]] = {
    "docstring": ("described", {'    """Adds two numbers."""\n': ""}, "no docstring"),
    "source": ("described", {'main=True': 'main=True', 'words", source="a test"': 'words", source=""'}, "'loose' has"),
    "chance": ("facts", {"[float] = 0.0": "[float] = 120"}, "Chance is 120, allowed: a percentage from 0 to 100"),
    "length": ("facts", {"[float] = 0.0": "[float] = 0; max_new_tokens: ClassVar[int] = 0"}, "allowed: 1 or more"),
    "measure": ("facts", {"[float] = 0.0": '[float] = 0; measure: ClassVar[str] = ""'}, "Measure is empty"),
    "scoring": ("facts", {'("loose",)': '("lose",)'}, "unknown parameter 'lose'"),
    "any": ("parameters", {"data: str": "data: Any"}, "Parameter 'data' accepts any value"),
    "pair": ("rows", {ROWS: 'return read("sums", "train")'}, "allowed: a pair of lists of Example"),
    "kind": ("rows", {ROWS: 'return ["a"], ["b"]'}, "allowed: a pair of lists of Example"),
    "none": ("rows", {ROWS: 'return read("sums", "train"), []'}, "as test items, returned no row"),
    "target": ("rows", {"target=sum": "", SPLIT: "return True"}, "has no target"),
    "refused": ("rows", {SUM: "sum = str(int(row['question']))"}, "sums.jsonl, line 1 is not a row of task"),
    "other": ("data", {"dataset: ClassVar[str] = \"sums\"": "dataset: ClassVar[str] = \"mine\""}, "names only mine"),
    "field": ("fields", {SUM: 'sum = row["answer"] + row["hint"]'}, "reads the field 'hint'"),
    "number": ("rows", {"response=sum": "response=int(sum)"}, "its response is 3, but must be a text"),
    "error": ("damaged rows", {SUM: 'Decimal(row["answer"]); sum = row["answer"]'}, "InvalidOperation for answer=''"),
    "random rows": ("rows repeat", {ROWS: ROWS.replace("return", "rows =") + "; random.shuffle(rows[0]); return rows"},
                    "training rows differ"),
    "double": ("unique", {ROWS: ROWS.replace("self.train_split)", "self.train_split) * 2")}, "occurs 2 times"),
    "same row": ("unique", {ROWS: 'rows = read("sums", "train"); return rows, rows'}, "occurs 2 times"),
    "two targets": ("unique", {'row["question"]': '"How many?"'}, "with another target"),
    "leak": ("held out", {'row["question"]': 'row["question"] if not id.endswith(":0") else "What is 39 plus 3?"'},
             "1 of 10 test questions"),
    "many": ("fewer rows", {ROWS: "first, last = read('sums', 'train[:-10]'), read('sums', 'train[-10:]'); "
             "return first[20:], last"}, "has no training rows"),
    "key": ("training key", {SUM: "sum = row['answer'] + ' !' * self.loose", LOOSE: "target in answer"},
            "loose=True changes a training row"),
    "wrong": ("right answers", {ROW_SCORE: "0.5"}, "scores 0.5 instead of 1"),
    "empty": ("wrong answers", {SPLIT: "parts = answer.split() or [target]"}, "An empty answer to item"),
    "all": ("wrong answers", {SPLIT: "parts = [target] * bool(answer)"}, "of another item is right"),
    "digits": ("any answer", {SPLIT: "parts = answer.split(); answer.isdigit() and int(answer)"},
               "ValueError for a number of 5000 digits"),
    "range": ("any answer", {ROW_SCORE: "2.0"}, "scores returned 2.0; allowed: a number from 0 to 1"),
    "short": ("any answer", {"in rows]": "in rows[: max(1, len(rows) - 1)]]"}, "with one number for each item"),
    "batch": ("one by one", {ROW_SCORE: f"{ROW_SCORE} / (1 + (len(rows) > 1 and row == rows[0]))"}, "one by one"),
    "grades": ("judge", {DEF_ROWS: grading("Grade(2.0, '')")}, "the score 2.0"),
    "grade type": ("judge", {DEF_ROWS: grading("1.0")}, "allowed: a list of Grade"),
    "grade batch": ("judge", {DEF_ROWS: grading("Grade(1 / len(rows), '')")}, "one by one than together"),
    "write": ("no writes", {SUM: "Path('log.txt').write_text('x'); " + SUM}, "log.txt"),
    "network": ("no writes", {SPLIT: "socket.socket().connect_ex(('127.0.0.1', 9)); " + SPLIT}, "It connects to"),
    "state": ("no state", {SPLIT: "self._uses += 1; " + SPLIT}, "_uses"),
}  # fmt: skip
"""Case -> the check that fails, the replaced code, and a part of the finding."""


def write(folder: Path, changes: dict[str, str]) -> Path:
    """Write the task with other code, and its rows."""
    code = TASK
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    lines = [{"question": f"What is {n} plus 3?", "answer": str(n + 3), "hint": ""} for n in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = folder / "sums.py"
    path.write_text(code, encoding="utf-8")
    return path


def examined(text: object) -> ContractReport:
    """Return the report of a task."""
    (resolved,) = [plugin for plugin in find_plugins(str(text)) if plugin.plugin.kind == "task"]
    return run_contract(resolved)


def outcomes(report: ContractReport) -> dict[str, str]:
    """Return check -> outcome."""
    return {finding.check: finding.outcome for finding in report.findings}


def test_correct_task_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = examined(write(tmp_path, {}))
    assert {check for check, outcome in outcomes(report).items() if outcome != "ok"} == {"judge"}
    assert {check for check, *_ in BROKEN.values()} == set(outcomes(report))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_task_fails_with_its_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check, changes, reason = BROKEN[case]
    failures = {f.check: f.reason for f in examined(write(tmp_path, changes)).findings if f.outcome == "fails"}
    assert reason in failures[check]
    assert len(failures[check].splitlines()) == 1


def test_a_misspelled_field_of_the_testbed_is_named(tmp_path: Path) -> None:
    hbv("new", "task", "mine", "--dir", tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(path.read_text().replace('"label")', '"lable")'))
    (failure,) = [finding for finding in examined(path).findings if finding.outcome == "fails"]
    assert (failure.check, failure.reason) == (
        "fields",
        "`fields` declares 'lable', but a row has idx, sentence, label.",
    )


def test_failing_task_ends_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = hbv("check", write(tmp_path, BROKEN["empty"][1]))
    assert done.code == 1
    assert "FAILS wrong answers " in done.out
    (report,) = json.loads(hbv("check", "sst2", "--json").out)
    assert (report["kind"], report["holds"]) == ("task", True)


# ---------------------------------------------------------------------------------------------------------------------
# Built-in tasks


@pytest.mark.parametrize(
    ("text", "open_checks"),
    [
        ("sst2", {"judge"}),
        ("sst2:rule=contains", {"judge"}),
        ("agnews:rule=equals", {"judge"}),
        ("gsm8k", {"judge"}),
        ("dialogsum", {"data", "judge"}),
        ("own:data=sums.jsonl", {"judge"}),
        ("own:data=sums.jsonl,rule=number", {"judge"}),
        ("own:data=sums.jsonl,rule=first_word", {"judge"}),
    ],
)
def test_every_built_in_task_holds(
    text: str, open_checks: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_own_rows(tmp_path)
    report = examined(text)
    assert report.holds, report.lines()
    assert {check for check, outcome in outcomes(report).items() if outcome == "n/a"} == open_checks


def _write_own_rows(folder: Path) -> None:
    lines = [{"instruction": f"What is {n} plus 3?", "output": f"{n + 3}"} for n in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["own:data=sums.jsonl,rule=judge", pytest.param("alpaca_eval:", marks=pytest.mark.slow)]
)
def test_tasks_with_a_judge_hold(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge with random weights, whose text is unread: the grades are the same one by one."""
    monkeypatch.chdir(tmp_path)
    _write_own_rows(tmp_path)
    words = tiny.tokenizer(["yes no m M"])
    tiny.save(tiny.model(vocab_size=len(words), max_position_embeddings=4096), words, tmp_path / "judge")
    report = examined(f"{text}{'' if text.endswith(':') else ','}model={tmp_path / 'judge'}")
    assert report.holds, report.lines()
    assert outcomes(report)["judge"] == "ok", report.lines()
    assert outcomes(report)["right answers"] == "n/a"


def test_task_without_its_judge_names_what_is_not_checked() -> None:
    report = examined("alpaca_eval:model=owner/none")
    assert report.holds
    reasons = {finding.check: finding.reason for finding in report.findings if finding.outcome == "n/a"}
    assert reasons["judge"] == "Not checked: its judge 'owner/none' is not on this machine."
    assert reasons["data"].startswith("Data set 'alpaca_eval' is not on this machine: the checks use placeholders")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("own", "hbv: Task 'own' needs data: write own:data=PATH"),
        ("alpaca_eval", "hbv: Task 'alpaca_eval' needs a chat model"),
        ("own:data=nothing.jsonl,rule=nonsense", "rule=nonsense is not allowed"),
        ("sst3", "Unknown plug-in 'sst3'. Did you mean 'sst2'?"),
    ],
)
def test_check_refuses_incomplete_parameters(text: str, sentence: str) -> None:
    done = hbv("check", text)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.sentence


def test_data_that_does_not_exist_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = examined("own:data=./nothing.jsonl")
    reasons = {finding.check: finding.reason for finding in report.findings if finding.outcome == "fails"}
    assert list(reasons) == ["rows"]
    assert "'./nothing.jsonl' does not exist" in reasons["rows"]


# ---------------------------------------------------------------------------------------------------------------------
# New tasks, and wrong results in a run


def test_new_task_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, with a parameter of the command line and one of the protocol."""
    monkeypatch.chdir(tmp_path)
    world = make_world(tmp_path / "world", {"tasks": {"mine": {"instruction": "Is it good?"}}})
    assert hbv("new", "task", "mine").code == 0
    assert examined("./mine.py").holds
    rows = tmp_path / "world" / "data" / "sst2" / "train.jsonl"
    done = hbv("run", "--json", "--protocol", world, "--attack", "ratio=0.1", "--task", f"./mine.py={rows}")
    assert done.code == 0, done.err
    (result,) = done.results
    assert result["finetune_accuracy"] is not None
    assert result["task_params"] == {"data": str(rows), "instruction": "Is it good?"}


def test_new_task_refuses_answers_with_both_labels(tmp_path: Path) -> None:
    assert hbv("new", "task", "mine", "--dir", tmp_path).code == 0
    task = TASKS.get(str(tmp_path / "mine.py"))()
    answers = ("Positive.", "negative", "positive or negative", "")
    assert [task.flexible(answer, "positive") for answer in answers] == [True, False, False, False]


@pytest.mark.parametrize("value", [None, [], ([], ["row"]), (Example("a", "b"),) * 2, ([], [], [])])
def test_rows_that_are_not_two_lists_are_refused(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = TASKS.get("sst2")
    monkeypatch.setattr(cls, "rows", lambda self, read: value)
    with pytest.raises(BadInput, match="allowed: a pair of lists of Example"):
        training_and_test_rows(cls(), lambda dataset, split: [])


# ---------------------------------------------------------------------------------------------------------------------
# Side effects


@pytest.mark.parametrize(
    ("act", "part"),
    [
        (lambda path: path.write_text("x"), "It changes"),
        (lambda path: path.touch(), "It changes"),
        (lambda path: path.mkdir(), "It changes"),
        (lambda path: os.symlink("a", path), "It changes"),
        (lambda path: subprocess.run(["true"], check=True), "It starts the program 'true'"),
        (lambda path: socket.socket().connect_ex(("127.0.0.1", 9)), "It connects to"),
    ],
    ids=["write", "touch", "mkdir", "link", "program", "connection"],
)
def test_side_effects_are_observed(act: Any, part: str, tmp_path: Path) -> None:
    with observe_side_effects() as effects:
        act(tmp_path / "new")
    with pytest.raises(Fails, match=part):
        effects.require_none()


def test_reading_and_an_allowed_folder_are_not_side_effects(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with observe_side_effects(tmp_path) as effects:
        path.write_text("x")
        path.read_text()
    (tmp_path / "after").touch()
    effects.require_none()
    assert effects.changes == []
