"""Entries of a shared leaderboard: `hbv leaderboard add`, and entries as an input of `hbv leaderboard`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.evaluation.verification import Mismatch, VerifiedRun
from harmbench_vaccine.reporting.leaderboard import entries
from support.cli import hbv
from support.results import make_result


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the verification, which other tests check; a test may set its mismatches."""
    values: dict[str, Any] = {"checked": ("harmful scores",), "mismatches": ()}
    monkeypatch.setattr(entries, "verify_run", lambda run, *rest: VerifiedRun(run.name, **values))
    return values


def store_run(folder: Path, **fields: Any) -> Path:
    """Write the folder of a run, and return its `result.json`."""
    result = make_result(**fields)
    run = folder / result.run
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps(result.to_json()))
    (run / "answers.jsonl").write_text("")
    return run / "result.json"


def add(result: Path, folder: Path) -> Any:
    return hbv("leaderboard", "add", result, "--entries", folder)


@pytest.fixture
def entry(tmp_path: Path, verified: dict[str, Any]) -> Path:
    """Return the file of the only entry, of run `sft-1`."""
    done = add(store_run(tmp_path / "runs", run="sft-1"), tmp_path / "entries")
    assert done.code == 0, done.err
    return Path(done.out.strip())


def test_an_entry_ranks_like_its_result(entry: Path, tmp_path: Path) -> None:
    assert entry == tmp_path / "entries" / "aa11" / "sft-1.json"
    assert entry.stat().st_size < 4000
    for source in (entry, tmp_path / "entries"):
        (row,) = hbv("leaderboard", source, "--json").results[0]
        assert (row["defense"], row["harmful_score"], row["finetune_accuracy"]) == ("sft", 50.0, 97.0)


def test_a_group_of_commands_still_ranks_without_one(entry: Path, tmp_path: Path) -> None:
    without, named = (hbv("leaderboard", *words, tmp_path / "entries", "--json") for words in ([], ["rank"]))
    assert without.results == named.results


def test_a_duplicate_is_refused(entry: Path, tmp_path: Path) -> None:
    again = add(tmp_path / "runs" / "sft-1" / "result.json", tmp_path / "entries")
    assert again.code == 2
    assert "Run sft-1 already has an entry" in again.sentence
    other = add(store_run(tmp_path / "runs", run="sft-2"), tmp_path / "entries")
    assert other.code == 2
    assert "The experiment of run sft-2 already has an entry" in other.sentence
    assert add(store_run(tmp_path / "runs", run="sft-3", seed=1), tmp_path / "entries").code == 0
    assert {path.name for path in (tmp_path / "entries").rglob("*.json")} == {"sft-1.json", "sft-3.json"}


def test_a_run_that_differs_from_its_answers_is_refused(tmp_path: Path, verified: dict[str, Any]) -> None:
    verified["mismatches"] = (Mismatch("harmful_score", 1.0, 50.0),)
    done = add(store_run(tmp_path / "runs", run="sft-1"), tmp_path / "entries")
    assert done.code == 1
    assert "harmful_score: 1.0 instead of 50.0" in done.sentence
    assert not (tmp_path / "entries").exists()


def test_a_run_whose_metrics_cannot_be_computed_again_is_refused(tmp_path: Path, verified: dict[str, Any]) -> None:
    verified["uncomputed"] = ("validity.hollow: absent from the result",)
    done = add(store_run(tmp_path / "runs", run="sft-1"), tmp_path / "entries")
    assert done.code == 1
    assert "not all of its metrics could be computed again. Not verified: validity.hollow: absent" in done.sentence
    assert not (tmp_path / "entries").exists()


def test_bad_input(tmp_path: Path, verified: dict[str, Any]) -> None:
    result = store_run(tmp_path / "runs", run="sft-1")
    moved = Path(shutil.copy(result, tmp_path / "other.json"))
    (result.parent / "answers.jsonl").unlink()
    for path, message in ((moved, "is not the result.json of a run"), (result, "has no answers.jsonl")):
        done = add(path, tmp_path / "entries")
        assert done.code == 2
        assert message in done.sentence
    assert not (tmp_path / "entries").exists()


def test_a_changed_or_misplaced_entry_is_refused(entry: Path, tmp_path: Path) -> None:
    text = entry.read_text()
    values = json.loads(text)
    values["cells"]["harmful_score"] = "1"
    entry.write_text(json.dumps(values))
    assert "was changed after it was added" in hbv("leaderboard", entry).sentence
    entry.write_text("{}")
    assert "is not an entry of a leaderboard" in hbv("leaderboard", entry).sentence
    moved = tmp_path / "entries" / "bb22" / "sft-1.json"
    moved.parent.mkdir()
    moved.write_text(text)
    assert "is misplaced: move it to aa11/sft-1.json" in hbv("leaderboard", moved).sentence
    empty = tmp_path / "empty"
    empty.mkdir()
    done = hbv("leaderboard", empty)
    assert (done.code, "has no entries" in done.sentence) == (2, True)
