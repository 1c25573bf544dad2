"""`hbv verify`: an unchanged run is verified, and every kind of change is found."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import hbv


@pytest.fixture(scope="module")
def stored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with one run."""
    home = tmp_path_factory.mktemp("home")
    done = hbv("run", "--protocol", world, "--defense", "none", "--attack", "samples=8", home=home)
    assert done.code == 0, done.err
    return home


@pytest.fixture
def home(stored: Path, tmp_path: Path) -> Path:
    """Return a copy of the home, which a test may change."""
    return Path(shutil.copytree(stored, tmp_path / "copy"))


def run_of(home: Path) -> Path:
    (result,) = home.glob("runs/*/result.json")
    return result.parent


def change_result(home: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run_of(home) / "result.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_answer(home: Path, **values: Any) -> None:
    """Change fields of the last judged answer."""
    path = run_of(home) / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = [row for row in rows if "verdicts" in row][-1]
    row.update(values)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fields(home: Path, *options: str) -> list[str]:
    """Verify the run, and return the fields that differ; the exit code follows from them."""
    done = hbv("verify", run_of(home).name, "--json", *options, home=home)
    (outcome,) = done.results[0]
    assert done.code == (1 if outcome["mismatches"] else 0)
    assert outcome["verified"] == (not outcome["mismatches"])
    return [mismatch["field"] for mismatch in outcome["mismatches"]]


def test_an_unchanged_run_is_verified_and_nothing_is_written(home: Path) -> None:
    before = {path: path.read_bytes() for path in (home / "runs").rglob("*") if path.is_file()}
    done = hbv("verify", run_of(home), "--json", home=home)
    assert done.code == 0, done.err
    (outcome,) = done.results[0]
    assert (outcome["mismatches"], outcome["unverified"], outcome["uncomputed"]) == ([], [], [])
    assert {"harmful scores", "accuracy and validity", "code, data and parameters"} <= set(outcome["checked"])
    assert {path: path.read_bytes() for path in (home / "runs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("harmful_score", 12.5),
        ("harmful_score_hits", 77),
        ("finetune_accuracy", 61.0),
        ("alignment_loss", 0.001),
        ("embedding_drift", 1.0),
        ("harmful_token_share", 50.0),
        ("protocol_hash", "0" * 12),
        ("judge_cut", 5),
        ("defense", "vaccine"),
        ("attack", "ratio=0.2"),
        ("seed", 7),
        ("task", "agnews"),
        ("model", "other/model"),
        ("trained", False),
    ],
)
def test_a_changed_field_is_found(name: str, value: Any, home: Path) -> None:
    change_result(home, lambda values: values.update({name: value}))
    assert fields(home, "--cached") == [name]


def test_a_changed_score_inside_a_record_is_found(home: Path) -> None:
    change_result(home, lambda values: values["validity"]["shares"]["after"].update(over_refusal=99.0))
    assert fields(home, "--cached") == ["validity.shares.after.over_refusal"]


def test_a_changed_parameter_and_an_added_tuning_are_found(home: Path) -> None:
    change_result(home, lambda values: values["attack_params"]["samples"].update(n=7))
    assert fields(home, "--cached") == ["attack_params.samples.n"]
    change_result(home, lambda values: values.update(tuning={"untuned_hash": "aa", "runs": 1, "seconds": 2.0}))
    assert "tuning.runs" in fields(home, "--cached")


def test_artifacts_of_another_seed_are_found(home: Path, world: Path) -> None:
    mine = run_of(home)
    options = ("--protocol", world, "--defense", "none", "--attack", "samples=8", "--seed", "1")
    assert hbv("run", *options, home=home).code == 0
    (other,) = (path for path in (home / "runs").iterdir() if path != mine)
    (mine / "answers.jsonl").write_bytes((other / "answers.jsonl").read_bytes())
    stages = json.loads((other / "result.json").read_text())["stages"]
    values = json.loads((mine / "result.json").read_text())
    (mine / "result.json").write_text(json.dumps({**values, "stages": stages}))
    done = hbv("verify", mine, "--cached", "--json", home=home)
    (outcome,) = done.results[0]
    assert done.code == 1
    seeds = {entry["field"]: (entry["stored"], entry["computed"]) for entry in outcome["mismatches"]}
    assert seeds["inputs of finetune: seed"] == (1, 0)


def test_an_absent_metric_is_named(home: Path) -> None:
    change_result(home, lambda values: values["validity"].pop("hollow"))
    done = hbv("verify", run_of(home), "--cached", "--json", home=home)
    (outcome,) = done.results[0]
    assert (done.code, outcome["uncomputed"]) == (0, ["validity.hollow: absent from the result"])


def test_a_result_of_an_earlier_version_needs_no_token_share(home: Path) -> None:
    change_result(home, lambda values: values.pop("harmful_token_share"))
    done = hbv("verify", run_of(home).name, "--cached", "--json", home=home)
    (outcome,) = done.results[0]
    assert (done.code, outcome["mismatches"], outcome["uncomputed"]) == (0, [], [])
    assert "the harmful token share" not in outcome["checked"]


def test_a_changed_answer_differs_from_the_store(home: Path) -> None:
    change_answer(home, answer="I am sorry, I cannot help.")
    assert any(name.startswith("answers after/") for name in fields(home))


def test_a_changed_verdict_is_judged_again_even_where_the_row_agrees_with_it(home: Path) -> None:
    path = run_of(home) / "answers.jsonl"
    row = [json.loads(line) for line in path.read_text().splitlines() if "verdicts" in line][-1]
    ((judge, verdict),) = row["verdicts"].items()
    flagged = not verdict["flagged"]
    change_answer(home, flagged=flagged, verdicts={judge: {**verdict, "flagged": flagged}})
    (name,) = fields(home)
    assert name.startswith(f"verdicts of {judge}: 1 of ")


def test_a_damaged_artifact_is_found_and_a_missing_one_is_reported(home: Path) -> None:
    (drift,) = (home / "store").glob("drift/*/drift.json")
    drift.write_text("{}")
    assert fields(home, "--cached") == ["stages.score.artifacts.drift"]
    shutil.rmtree(home / "store" / "drift")
    done = hbv("verify", run_of(home), "--cached", home=home)
    assert done.code == 0
    assert "alignment loss and drift: their artifact is not in the store" in " ".join(done.out.split())


def test_a_changed_row_of_a_csv_is_found_and_a_run_without_its_folder_is_reported(home: Path) -> None:
    table = home / "results.csv"
    rows = list(csv.DictReader(table.open()))
    assert hbv("verify", table, "--cached", home=home).code == 0
    copies = [{**rows[0], "harmful_score": "1.5"}, {**rows[0], "run": "other-12345678"}]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(copies)
    done = hbv("verify", table, "--cached", "--json", home=home)
    changed, other = done.results[0]
    assert done.code == 1
    assert [mismatch["field"] for mismatch in changed["mismatches"]] == ["harmful_score"]
    assert other["unverified"][0].startswith("the row: the folder of the run is not in")
    shutil.rmtree(home / "runs")
    nothing = hbv("verify", table, home=home)
    assert nothing.code == 1
    assert "Nothing could be verified" in nothing.sentence


def test_bad_input(home: Path) -> None:
    for source, message in (("nonne-1", "Unknown run 'nonne-1'"), ("absent.csv", "does not exist")):
        done = hbv("verify", source, home=home)
        assert done.code == 2
        assert message in done.sentence
