"""`hbv compare RUN --repeat`: a stored run is measured twice, and the change is the noise floor of comparisons."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.evaluation.noise_floor import RepeatedRun, load_repeat, noise_floors, save_repeat
from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.evaluation.run_comparison import compare_runs
from support.cli import hbv
from support.results import make_result, write_csv


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


def contents(folder: Path) -> dict[Path, bytes]:
    """Return every file of a home, without its locks, marks of use and cached hashes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder): path.read_bytes()
        for path in files
        if not {".locks", ".use"} & set(path.parts) and path.name != "hashes.sqlite"
    }


def change_answers(home: Path) -> None:
    """Flip the stored verdict of the third harmful question, and change the text of the first answer to the task."""
    path = run_of(home) / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [row for row in rows if row["when"] == "after" and row["set"] == "harmful"][2]
    (verdict,) = judged["verdicts"].values()
    verdict["flagged"] = judged["flagged"] = not judged["flagged"]
    answer = next(row for row in rows if row["when"] == "after" and row["set"] == "task")
    answer["answer"] += " changed"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# Measure a run twice


def test_the_same_engine_repeats_every_answer(home: Path) -> None:
    """On a CPU nothing changes. Only the second measurement is added to the home, and the command can be repeated."""
    before = contents(home)
    done = hbv("compare", run_of(home).name, "--repeat", "--json", home=home)
    assert done.code == 0, done.err
    (repeat,) = done.results
    assert {name: score["floor"] for name, score in repeat["scores"].items()} == {
        "harmful_score": 0,
        "finetune_accuracy": 0,
        "refusal_rate": 0,
    }
    result = json.loads((run_of(home) / "result.json").read_text())
    for score in ("harmful_score", "finetune_accuracy"):
        assert repeat["scores"][score]["first"] == repeat["scores"][score]["second"] == pytest.approx(result[score])
    assert repeat["answers"] == {
        f"{when}/{name}": {"answers": count, "changed": 0}
        for when in ("before", "after")
        for name, count in {"harmful": 8, "benign": 6, "task": 8}.items()
    }
    after = contents(home)
    path = (run_of(home) / "repeat.json").relative_to(home)
    assert json.loads(after.pop(path)) == repeat
    assert after == before
    assert hbv("compare", run_of(home).name, "--repeat", home=home).code == 0


def test_changes_are_counted(home: Path) -> None:
    change_answers(home)
    shown = hbv("compare", run_of(home), "--repeat", home=home, COLUMNS="80")
    assert shown.code == 0, shown.err
    assert "HS flips: 3." in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    repeat = load_repeat(run_of(home))
    assert repeat is not None
    harmful = repeat.scores["harmful_score"]
    assert (harmful.flips, harmful.n, harmful.floor) == ((3,), 8, 12.5)
    assert abs(harmful.second - harmful.first) == 12.5
    assert repeat.answers["after/task"].changed == 1
    assert repeat.answers["after/harmful"].changed == 0


def test_stored_answers_and_judgments_are_not_used(home: Path) -> None:
    """Without the artifacts of answers and verdicts, the outcome is the same."""
    for stage in ("answer", "score"):
        shutil.rmtree(home / "store" / stage)
    (home / "store" / ".judgments.sqlite").unlink()
    done = hbv("compare", run_of(home), "--repeat", "--json", home=home)
    assert done.code == 0, done.err
    assert done.results[0]["scores"]["harmful_score"]["floor"] == 0
    assert not (home / "store" / ".judgments.sqlite").exists()


def test_a_deleted_model_is_one_sentence(home: Path) -> None:
    shutil.rmtree(home / "store" / "finetune")
    before = contents(home)
    done = hbv("compare", run_of(home), "--repeat", home=home)
    assert (done.code, done.out) == (2, "")
    assert f"The finetune artifact of run {run_of(home).name} was deleted from the store" in done.sentence
    assert contents(home) == before


def test_bad_input(home: Path) -> None:
    run = run_of(home).name
    before = contents(home)
    for args, message in {
        (run, run, "--repeat"): "2 runs and 0 scorers cannot be compared with --repeat; allowed: two runs, or one run",
        (run, "--repeat", "--scorer", "beaver_dam"): "1 runs and 1 scorers cannot be compared with --repeat",
        (run, "--repeat", "--backend", "vlm"): "Did you mean 'vllm'?",
        (run, run, "--backend", "vllm"): "--backend needs --repeat",
        (f"{run}x", "--repeat"): f"Did you mean {run!r}?",
    }.items():
        done = hbv("compare", *args, home=home)
        assert (done.code, done.out) == (2, ""), args
        assert message in done.sentence
    assert contents(home) == before


# ---------------------------------------------------------------------------------------------------------------------
# Store and pool


def repeated(run: str, flips: tuple[int, ...], n: int, floor: float) -> RepeatedRun:
    score = {"first": 50, "second": 50, "n": n, "flips": flips, "floor": floor}
    return RepeatedRun.model_validate(
        {
            "run": run,
            "backend": "transformers",
            "answered_by": ["transformers"],
            "environment": {},
            "answers": {"after/harmful": {"answers": n, "changed": 4}},
            "scores": {"harmful_score": score},
        }
    )


def test_runs_are_pooled_by_their_questions(tmp_path: Path) -> None:
    """3 of 100 and 1 of 300 flips are 4 of 400, one point; a run without a second measurement does not count."""
    for run in (repeated("a", (1, 2, 3), 100, 3.0), repeated("b", (7,), 300, 1 / 3)):
        (tmp_path / run.run).mkdir()
        save_repeat(tmp_path / run.run, run)
    floor = noise_floors([tmp_path / "a", tmp_path / "absent", tmp_path / "b"])["harmful_score"]
    assert (floor.flips, floor.n, floor.points) == (4, 400, pytest.approx(1.0))
    assert noise_floors([tmp_path / "absent"]) == {}


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"scores": 5}, {"seed": 1}])
def test_a_damaged_file_is_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    values = repeated("a", (), 100, 0.0).model_dump(mode="json")
    (tmp_path / "repeat.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(HbvError, match=r"repeat.json cannot be read: .* --repeat`\.$"):
        load_repeat(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Use it in comparisons


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Return a home with SFT at HS 80, Vaccine at 77 and 'none' at 20; one answer of SFT's twenty changes, 5 points."""
    shares = {"sft": 80.0, "vaccine": 77.0, "none": 20.0}
    results = [
        make_result(run=f"{name}-0", defense=name, defense_params={name: {}}, harmful_score=share, harmful_score_n=100)
        for name, share in shares.items()
    ]
    for result in results:
        folder = tmp_path / "runs" / result.run
        folder.mkdir(parents=True)
        write_run(folder, result, [])
    save_repeat(tmp_path / "runs" / "sft-0", repeated("sft-0", (4,), 20, 5.0))
    write_csv(tmp_path / "results.csv", *results)
    return tmp_path


def test_the_leaderboard_marks_smaller_differences(table: Path) -> None:
    done = hbv("leaderboard", "--out", table / "out", home=table, COLUMNS="160")
    assert done.code == 0, done.err
    note = "Noise floor: answering again changed 1 of 20 verdicts (HS, 5.0 points)."
    page = (table / "out" / "leaderboard.md").read_text().replace("\\", "")
    for text in (" ".join(done.out.split()), page):
        assert note in text
        assert re.search(r"-3\.0 \[[^]]*\]~", text)
        assert re.search(r"-60\.0 \[[^]]*\]\*", text)
    with (table / "out" / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["harmful_score_floor"] for row in rows} == {"5"}
    assert {row["finetune_accuracy_floor"] for row in rows} == {""}


def test_the_leaderboard_without_a_second_measurement(table: Path) -> None:
    (table / "runs" / "sft-0" / "repeat.json").unlink()
    done = hbv("leaderboard", "--out", table / "out", home=table, COLUMNS="160")
    assert done.code == 0, done.err
    assert "Noise floor" not in done.out + (table / "out" / "leaderboard.md").read_text()
    with (table / "out" / "leaderboard.csv").open(newline="") as file:
        assert {row["harmful_score_floor"] for row in csv.DictReader(file)} == {""}


def test_show_names_the_second_measurement(home: Path) -> None:
    run = run_of(home)
    assert "Measured twice" not in hbv("show", run, home=home).out
    save_repeat(run, repeated(run.name, (4,), 20, 5.0))
    shown = hbv("show", run, home=home, COLUMNS="80")
    assert "Measured twice: HS 50.0 and 50.0 (1 of 20 changed, 5.0 points)." in " ".join(shown.out.split())


def test_a_comparison_of_runs_names_a_difference_below_the_floor(home: Path) -> None:
    """Two copies of one run with other ids differ by 0 points."""
    first = run_of(home)
    second = Path(shutil.copytree(first, first.with_name("other-0")))
    path = second / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run": "other-0"}))
    assert not any("noise floor" in note for note in compare_runs(first, second, home / "runs").notes)
    save_repeat(second, repeated("other-0", (4,), 20, 5.0))
    notes = compare_runs(first, second, home / "runs").notes
    assert "The difference in harmful score is below the noise floor of 5.0 points: it is not interpreted." in notes
