"""The typed result: its schema, older schemas, and what it records of the machine."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

import harmbench_vaccine
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.evaluation import environment
from harmbench_vaccine.evaluation.records import load_run, write_run
from harmbench_vaccine.evaluation.result import SCHEMA_VERSION, Result
from harmbench_vaccine.evaluation.results_csv import COLUMNS, csv_row
from harmbench_vaccine.reporting.result_views import results_table, scores_view
from harmbench_vaccine.training import peak_memory
from support.cli import hbv
from support.world import make_world

SCHEMA_1 = Path(__file__).parent / "reference" / "result-schema-1.json"


@pytest.fixture
def old() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(SCHEMA_1.read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The result of a small run, and its home."""
    folder = tmp_path_factory.mktemp("run")
    world = make_world(folder / "world", {"align": {"rows": 8}, "finetune": {"samples": 8}})
    done = hbv("run", "--protocol", world, "--defense", "vaccine+antidote", "--json", home=folder / "home")
    assert done.code == 0, done.err
    return done.results[0], folder / "home"


def test_a_result_names_its_artifacts_and_what_they_took(stored: tuple[dict[str, Any], Path]) -> None:
    values, home = stored
    stages = values["stages"]
    assert list(stages) == ["align", "finetune", "repair", "answer", "score"]
    for stage in ("align", "finetune", "repair"):
        artifact = stages[stage]["artifacts"][stage]
        assert Path(artifact["path"]) == home / "store" / stage / artifact["key"]
        assert (Path(stages[stage]["adapter"]) / "adapter_model.safetensors").is_file()
        assert stages[stage]["peak_memory"] > 1 << 20
    assert {stage: stages[stage]["steps"] for stage in ("align", "finetune", "repair")} == {
        "align": 4,
        "finetune": 4,
        "repair": 0,
    }
    assert list(stages["answer"]["artifacts"])[:2] == ["before/harmful", "before/benign"]


def test_a_result_names_the_machine_and_the_code(stored: tuple[dict[str, Any], Path]) -> None:
    values = stored[0]["environment"]
    assert values["date"].startswith("20")
    assert values["host"]
    assert values["cpu"]
    assert {"python", "torch", "numpy", "datasets", "cuda", "transformers", "peft"} <= values["versions"].keys()
    commit = subprocess.run(
        ["git", "-C", str(Path(harmbench_vaccine.__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert values["git_commit"] == (commit.stdout.strip() or None)


def test_an_installed_copy_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "harmbench_vaccine"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # the environment is inside another project
    monkeypatch.setattr(harmbench_vaccine, "__file__", str(package / "__init__.py"))
    environment._git_state.cache_clear()
    assert environment._git_state() == (None, None)
    environment._git_state.cache_clear()


def test_a_result_reads_back_from_json(stored: tuple[dict[str, Any], Path]) -> None:
    values, home = stored
    result = Result.from_json(values)
    assert result.to_json() == values
    assert load_run(home / "runs" / values["run"])[0] == result
    assert list(csv_row(result)) == COLUMNS


def test_schema_1_is_read_and_upgraded(old: dict[str, Any]) -> None:
    result = Result.from_json(old)
    assert result.schema_version == SCHEMA_VERSION
    assert (result.harmful_score, result.finetune_accuracy) == (old["harmful_score"], old["finetune_accuracy"])
    assert result.environment.versions == old["versions"]
    assert result.scores["beaver_dam"].license == old["scores"]["beaver_dam"]["licence"]
    assert {name: stage.seconds for name, stage in result.stages.items()} == {
        name: stage["seconds"] for name, stage in old["stages"].items()
    }
    assert Result.from_json(result.to_json()) == result
    console = Console(width=170, file=io.StringIO())
    console.print(results_table([result]), scores_view(result))
    assert "66.0 [59.9, 71.6]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_stored_run_of_schema_1_is_shown(old: dict[str, Any], own_home: Path) -> None:
    folder = own_home / "runs" / old["run"]
    folder.mkdir(parents=True)
    row = {"when": "after", "set": "harmful", "id": "q:0", "instruction": "How?", "input": "", "target": ""}
    answers = [{**row, "answer": "First.", "flagged": True, "categories": ["theft"], "probabilities": {}}]
    answers.append({**answers[0], "when": "before", "flagged": False})
    write_run(folder, Result.from_json(old), answers)
    (folder / "result.json").write_text(SCHEMA_1.read_text())
    shown = hbv("show", old["run"])
    assert (shown.code, "flagged: theft" in shown.out) == (0, True)
    why = hbv("why", old["run"])
    assert (why.code, "stored by an earlier version" in why.sentence) == (2, True)


EVIL = "\x1b]0;owned\x07\x1b[2J \x9b31m \u202egnp.exe"
ANSWER = {"when": "after", "set": "harmful", "id": "1", "instruction": EVIL, "input": "", "target": "", "answer": EVIL}


def store_run(home: Path, result: Any, *answers: dict[str, Any]) -> None:
    """Write the files of the run `sft-0`."""
    folder = home / "runs" / "sft-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
    (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")


def test_an_incomplete_result_is_shown_without_what_it_lacks(own_home: Path) -> None:
    answers = [{**ANSWER, "flagged": True, "categories": [EVIL], "verdicts": {}}]
    answers += [{**answers[0], "when": "before"}, {**ANSWER, "id": "2", "flagged": None, "when": "before"}]
    store_run(own_home, {"run": "sft-0", "defense": "sft", "attack": "ratio=0"}, *answers)
    done = hbv("show", "sft-0", COLUMNS="80")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    assert "HS not recorded, FA not recorded, task not recorded, seed not recorded, model not recorded" in text
    assert "Unread verdicts: 0 after the user stage, 1 before it." in text
    assert "(not recorded)" in done.out  # the answer of question 2 after the user stage
    assert not [char for char in done.out if unicodedata.category(char) in ("Cc", "Cf") and char != "\n"]
    assert r"\x1b" in done.out
    as_json = hbv("show", "sft-0", "--json")
    assert as_json.results == answers
    assert not [char for char in as_json.out if unicodedata.category(char) in ("Cc", "Cf") and char != "\n"]


def test_the_scores_of_an_old_result_are_shown(old: dict[str, Any], own_home: Path) -> None:
    store_run(own_home, old, {**ANSWER, "flagged": False})
    text = " ".join(hbv("show", "sft-0").out.split())
    assert f"HS {old['harmful_score']:.1f}, FA {old['finetune_accuracy']:.1f}, task {old['task']}, seed 0" in text
    assert f"hash {old['protocol_hash']}, harmful token share not recorded." in text
    assert "not recorded," not in text


@pytest.mark.parametrize(
    ("result", "answer", "message"),
    [
        ({"harmful_score": 150}, {}, "result.json is not a result of this version: harmful_score is 150"),
        ({"finetune_accuracy": -1}, {}, "finetune_accuracy is -1"),
        ({"run": None}, {}, "run is None"),
        ({}, {"when": "later"}, "answers.jsonl, answer 1, is damaged: when is 'later'"),
        ({}, {"answer": None}, "answer is None"),
        ({}, {"flagged": "yes"}, "flagged is 'yes'"),
        ({}, {"verdicts": {"judge": {}}}, "verdicts.judge.flagged is missing"),
        ({}, {"categories": "theft"}, "categories is 'theft'"),
    ],
)
def test_damaged_values_are_refused_in_one_sentence(
    result: dict[str, Any], answer: dict[str, Any], message: str, own_home: Path
) -> None:
    store_run(own_home, {"run": "sft-0", "defense": "sft", "attack": "ratio=0", **result}, {**ANSWER, **answer})
    done = hbv("show", "sft-0")
    assert (done.code, done.out) == (1, "")
    assert message in done.sentence


@pytest.mark.parametrize("field", ["harmful_score", "finetune_accuracy_n", "environment"])
def test_values_out_of_range_are_refused(field: str, stored: tuple[dict[str, Any], Path]) -> None:
    for value in (150.5, -1, math.inf, math.nan, {"date": "yesterday"}, {"date": ""}):
        with pytest.raises(ValidationError):
            Result.from_json({**stored[0], field: value})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 3, "run": 1}'])
def test_a_damaged_result_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(HbvError, match=r"result\.json (is not a result of this version|cannot be read): "):
        load_run(tmp_path)


def test_an_unknown_field_is_refused(stored: tuple[dict[str, Any], Path]) -> None:
    with pytest.raises(ValidationError, match="unheard"):
        Result.from_json({**stored[0], "unheard": 1})


def test_every_field_has_a_docstring_in_the_schema() -> None:
    schema = json.loads(hbv("schema").out)
    models = {"Result": schema, **schema["$defs"]}
    undocumented = [
        f"{name}.{field}"
        for name, model in models.items()
        for field, properties in model.get("properties", {}).items()
        if not properties.get("description")
    ]
    assert undocumented == []
    assert schema["properties"]["schema_version"]["default"] == SCHEMA_VERSION


def test_peak_memory_is_unknown_where_the_system_does_not_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows: neither /proc nor the module `resource` exists."""
    for name in ("_STATUS", "_RESET"):
        monkeypatch.setattr(peak_memory, name, Path("absent") / "file")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    with peak_memory.peak_memory() as peak:
        assert peak() is None
