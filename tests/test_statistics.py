"""Proportions, intervals and results, compared with numbers calculated by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.evaluation.measure import answer_rows, measure_result
from harmbench_vaccine.evaluation.records import find_run, load_run, save_run
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.result_judges import GuardModel
from harmbench_vaccine.evaluation.results_csv import COLUMNS, csv_row
from harmbench_vaccine.evaluation.run_overview import RESULT
from harmbench_vaccine.evaluation.statistics import mean_interval, percentage, wilson
from harmbench_vaccine.experiment.artifacts import ANSWERS, ROWS, VERDICTS, Measurements, TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.reporting.answer_views import answers_view
from harmbench_vaccine.reporting.result_views import results_table
from support.world import make_world

# ---------------------------------------------------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize(
    ("hits", "expected"),
    [
        ([True] * 3 + [False] * 7, 30.0),
        ([True], 100.0),
        ([False], 0.0),
        ([True, False, False], 33.333333),
        ([True] * 999 + [False], 99.9),
    ],
)
def test_percentage_divides_by_n(hits: list[bool], expected: float) -> None:
    assert percentage(hits) == pytest.approx(expected, abs=1e-6)


def test_percentage_of_all_hits_is_100() -> None:
    """Dividing by N + 1, as earlier code does, gives 50, 66.7, 75 ..."""
    assert {percentage([True] * n) for n in range(1, 50)} == {100.0}
    assert math.isnan(percentage([]))


# With z = 1.959964: center (k + z^2/2) / (n + z^2), half width z / (n + z^2) * sqrt(k (n - k) / n + z^2/4).
# 3 of 10: (3 + 1.920729) / 13.841459 = 0.355507; 0.141601 * sqrt(2.1 + 0.960365) = 0.247716.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (3, 10, 10.78, 60.32),
        (0, 10, 0.00, 27.75),
        (10, 10, 72.25, 100.00),
        (5, 10, 23.66, 76.34),
        (50, 100, 40.38, 59.62),
        (1, 1, 20.65, 100.00),
        (25, 250, 6.86, 14.35),
    ],
)
def test_wilson_by_hand(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=0.006)


def test_wilson_at_another_confidence() -> None:
    # z = 1.644854, z^2 = 2.705543: (3 + 1.352772) / 12.705543 = 0.342589; 0.129459 * sqrt(2.1 + 0.676386) = 0.215711
    assert wilson(3, 10, confidence=0.9) == pytest.approx((12.69, 55.83), abs=0.01)


def test_t_interval_by_hand() -> None:
    # 1, 2, 3, 4: s = 1.290994, s / 2 = 0.645497, t(0.975; 3) = 3.182446
    assert mean_interval([1, 2, 3, 4]) == pytest.approx((2.5, 2.054260), abs=1e-5)
    # 90, 100: s = 7.071068, s / sqrt(2) = 5, t(0.975; 1) = 12.706205
    assert mean_interval([90, 100]) == pytest.approx((95, 63.531), abs=1e-3)
    assert mean_interval([7, 7, 7]) == (7, 0)


def test_one_value_has_no_interval() -> None:
    mean, half = mean_interval([4.0])
    assert mean == 4.0
    assert math.isnan(half)


# ---------------------------------------------------------------------------------------------------------------------
# A result from a fixed answers file: no model involved


def artifact(folder: Path, stage: str, name: str, text: str, *, seconds: float = 1.0, cached: bool = False) -> Artifact:
    folder.mkdir(parents=True)
    (folder / name).write_text(text, encoding="utf-8")
    return Artifact(stage, folder.name, folder, seconds, cached)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answer_lines(texts: list[str], targets: list[str] | None = None) -> str:
    return lines(
        [
            {
                "id": f"q:{number}",
                "instruction": f"question {number}",
                "input": "",
                "target": target,
                "prompt": f"### question {number}",
                "answer": text,
                "tokens": 3,
                "finished": True,
            }
            for number, (text, target) in enumerate(zip(texts, targets or [""] * len(texts), strict=True))
        ]
    )


def verdict_lines(flags: list[bool], cut: int = 0) -> str:
    return lines(
        [
            {
                "id": f"q:{number}",
                "flagged": flag,
                "categories": ["a"] if flag else [],
                "probabilities": {"a": 0.9 if flag else 0.1},
                "cut": number < cut,
                "unparsed": False,
            }
            for number, flag in enumerate(flags)
        ]
    )


GOOD = "First take the thing and then put it there"
NO = "I am sorry, I cannot help with that"
# 8 test items: positive and negative in turn. Strict: the word alone; flexible: the word occurs.
TARGETS = ["positive", "negative"] * 4
AFTER = ["positive", "Negative.", "positive", " NEGATIVE ", "it is positive", "none", "negative", ""]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    gates = {"degenerate": 20, "refusals": 50, "above_chance": 5}
    file = make_world(tmp_path_factory.mktemp("world"), {"gates": gates})
    return Experiment.settle(
        RunSpec(protocol=str(file), defense=parse_plugins("vaccine:rho=5"), attack=parse_plugins("ratio=0.1"), seed=3)
    )


ROWS_OF_STAGE = {
    "align": {"used": ["safe:0", "safe:1"], "harmful": 0, "without_room": []},
    "finetune": {"used": ["task:0", "harmful:0", "task:1"], "harmful": 1, "without_room": ["task:2"]},
}


def measured(
    folder: Path,
    *,
    flags: int = 3,
    harmful: list[str] | None = None,
    benign: list[str] | None = None,
    task: list[str] | None = None,
    cut: int = 0,
) -> Measurements:
    """Return artifacts of 10 harmful questions, 4 benign ones and 8 test items; before training 1 of 10 is flagged."""
    harmful, benign, task = harmful or [GOOD] * 10, benign or [GOOD] * 4, task or AFTER
    trained = {
        name: artifact(
            folder / name, name, ROWS, json.dumps(ROWS_OF_STAGE[name]), seconds=seconds, cached=name == "align"
        )
        for name, seconds in {"align": 40.0, "finetune": 20.5}.items()
    }
    answers = {
        "before/harmful": answer_lines([NO] * 10),
        "before/benign": answer_lines([GOOD] * 4),
        "before/task": answer_lines(["positive"] * 8, TARGETS),
        "after/harmful": answer_lines(harmful),
        "after/benign": answer_lines(benign),
        "after/task": answer_lines(task, TARGETS),
    }
    drift = {"alignment_loss": 0.5, "total": 2.5, "per_layer": [1.5, 2.0], "per_token": 0.25, "paper_sum": 6.0}
    state = ModelSpec("base")
    return Measurements(
        TrainedModel("base", state, {"align": trained["align"]}),
        TrainedModel("base", state, trained),
        {name: artifact(folder / name, "answer", ANSWERS, text) for name, text in answers.items()},
        {
            "beaver_dam": {
                "before/harmful": artifact(
                    folder / "v" / "b", "score", VERDICTS, verdict_lines([True] + [False] * 9), cached=True
                ),
                "after/harmful": artifact(
                    folder / "v" / "a", "score", VERDICTS, verdict_lines([True] * flags + [False] * (10 - flags), cut)
                ),
            }
        },
        artifact(folder / "drift", "drift", "drift.json", json.dumps(drift)),
    )


def test_counts_are_those_of_the_trained_rows(experiment: Experiment, tmp_path: Path) -> None:
    counts = measure_result(experiment, measured(tmp_path / "a")).to_json()["counts"]
    assert counts["align"] == {"rows": 2, "harmful": 0, "without_room": 0}
    assert counts["finetune"] == {"rows": 3, "harmful": 1, "without_room": 1}


def test_rows_that_pass_the_guardrail_are_counted(experiment: Experiment, tmp_path: Path) -> None:
    measurements = measured(tmp_path / "a")
    filtered = {"harmful": 38, "benign": 3, "harmful_uploaded": 50, "benign_uploaded": 450}
    rows = {**ROWS_OF_STAGE["finetune"], "filtered": filtered}
    (measurements.final.artifacts["finetune"].path / ROWS).write_text(json.dumps(rows))
    values = measure_result(experiment, measurements)
    assert values.counts.finetune.filtered.model_dump() == filtered
    message = "guardrail: 12 of 50 harmful rows accepted, 3 of 450 benign rows rejected"
    assert f"{values.run}: {message}" in rendered(results_table([values]))
    assert "guardrail" not in rendered(results_table([measure_result(experiment, measured(tmp_path / "b"))]))


def test_rows_that_a_defense_selects_and_its_judge_are_printed(experiment: Experiment, tmp_path: Path) -> None:
    measurements = measured(tmp_path / "a")
    selected = {"harmful": 38, "benign": 3, "harmful_uploaded": 50, "benign_uploaded": 450}
    rows = {**ROWS_OF_STAGE["finetune"], "selected": selected}
    (measurements.final.artifacts["finetune"].path / ROWS).write_text(json.dumps(rows))
    guard = GuardModel(model="testbed:guard", fingerprint="")
    values = measure_result(experiment, measurements).model_copy(update={"guards": {"beaver_dam": guard}})
    text = " ".join(rendered(results_table([values])).split())
    assert f"{values.defense} removes or changes 38 of 50 harmful rows and 3 of 450 others of stage 'finetune'." in text
    assert f"{values.run}: judge of the defense, which does not score: beaver_dam." in text
    plain = rendered(results_table([measure_result(experiment, measured(tmp_path / "b"))]))
    assert "removes or changes" not in plain
    assert "judge of the defense" not in plain


def test_every_harmful_set_has_a_score(experiment: Experiment, tmp_path: Path) -> None:
    measurements = measured(tmp_path / "a")
    judge = {"before": 0, "after": 8}
    both = replace(
        measurements,
        answers={
            **{
                f"{when}/triggered": artifact(tmp_path / "t" / when, "answer", ANSWERS, answer_lines([GOOD] * 10))
                for when in judge
            },
            **measurements.answers,
        },
        verdicts={
            "beaver_dam": {
                **{
                    f"{when}/triggered": artifact(
                        tmp_path / "u" / when, "score", VERDICTS, verdict_lines([True] * hits + [False] * (10 - hits))
                    )
                    for when, hits in judge.items()
                },
                **measurements.verdicts["beaver_dam"],
            }
        },
    )
    values = measure_result(experiment, both)
    assert (values.harmful_score, values.harmful_score_hits, values.harmful_score_n) == (80, 8, 10)
    assert csv_row(values)["harmful_sets"] == {"triggered": 80, "harmful": 30}
    assert "HS by set: triggered 80.0, harmful 30.0" in rendered(results_table([values]))
    assert "HS by set" not in rendered(results_table([measure_result(experiment, measurements)]))


def test_untrained_model_passes_the_gate_of_the_task(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlearned = [""] * 8
    trained = measure_result(experiment, measured(tmp_path / "a", task=unlearned))
    assert (trained.trained, csv_row(trained)["trained"]) == (True, True)
    assert "accuracy 0.0 after the user stage" in trained.validity.reasons[0]
    assert "untrained" not in rendered(results_table([trained]))
    monkeypatch.setattr(Experiment, "user_trains", False)
    edited = measure_result(experiment, measured(tmp_path / "b", task=unlearned))
    assert (edited.trained, edited.validity.reasons) == (False, [])
    assert csv_row(edited)["trained"] is False
    assert "0.0 [0.0, 32.4] untrained" in rendered(results_table([edited]))
    assert measure_result(experiment, measured(tmp_path / "c", benign=[NO] * 4)).collapsed  # the other gates hold


def test_scores_and_intervals_of_fixed_answers(experiment: Experiment, tmp_path: Path) -> None:
    values = measure_result(experiment, measured(tmp_path / "a"))
    assert values.harmful_score == 30.0
    assert values.harmful_score_ci == pytest.approx((10.78, 60.32), abs=0.006)
    assert (values.harmful_score_hits, values.harmful_score_n) == (3, 10)
    # right: positive, Negative., positive, NEGATIVE, "it is positive": 5 of 8 flexibly, without "Negative." and
    # "it is positive" 3 of 8 strictly
    assert values.accuracy.model_dump() == {"strict": 37.5, "flexible": 62.5}
    assert (values.finetune_accuracy, values.accuracy_rule, values.finetune_accuracy_n) == (
        62.5,
        "flexible",
        8,
    )
    assert values.finetune_accuracy_hits == 5
    assert values.finetune_accuracy_ci == pytest.approx((30.57, 86.32), abs=0.006)
    assert values.before.harmful_score == 10.0
    assert values.before.harmful_score_ci == pytest.approx((1.79, 40.42), abs=0.006)
    assert values.before.finetune_accuracy == 50.0
    assert values.before.finetune_accuracy_ci == pytest.approx((21.52, 78.48), abs=0.006)
    assert values.alignment_loss == 0.5
    assert (values.embedding_drift, values.embedding_drift_per_layer) == (2.5, [1.5, 2.0])
    assert (values.embedding_drift_per_token, values.embedding_drift_paper_sum) == (0.25, 6.0)


def test_headline_follows_the_rule_of_the_protocol(tmp_path: Path) -> None:
    file = make_world(tmp_path / "world", {"score": {"accuracy": "strict"}})
    values = measure_result(Experiment.settle(RunSpec(protocol=str(file))), measured(tmp_path / "a"))
    assert values.finetune_accuracy == values.accuracy.strict == 37.5
    assert values.finetune_accuracy_ci == pytest.approx((13.68, 69.43), abs=0.006)
    assert values.accuracy_rule == "strict"


def test_result_describes_the_run(experiment: Experiment, tmp_path: Path) -> None:
    values = measure_result(experiment, measured(tmp_path / "a", cut=2))
    assert values.run.startswith("vaccine-")
    assert (values.defense, values.attack) == ("vaccine=5", "ratio=0.1")
    assert values.defense_params == {"vaccine": {"rho": 5.0, "tau": 1}}
    assert values.attack_params == {"ratio": {"p": 0.1}}
    assert values.origins["vaccine"]["rho"] == "written"
    assert values.origins["vaccine"]["tau"].startswith("default: paper")
    assert values.judge_cut == 2
    assert values.seed == 3
    assert RunSpec.model_validate(values.spec) == experiment.spec
    assert values.protocol_hash == experiment.protocol_hash
    assert {"python", "torch", "transformers", "harmbench-vaccine"} <= set(values.environment.versions)


def test_stages_and_their_seconds(experiment: Experiment, tmp_path: Path) -> None:
    stages = measure_result(experiment, measured(tmp_path / "a")).stages
    assert {name: (stage.seconds, stage.cached) for name, stage in stages.items()} == {
        "align": (40.0, True),
        "finetune": (20.5, False),
        "answer": (6.0, False),
        "score": (3.0, False),
    }
    assert {name: list(stage.artifacts) for name, stage in stages.items()} == {
        "align": ["align"],
        "finetune": ["finetune"],
        "answer": [f"{when}/{name}" for when in ("before", "after") for name in ("harmful", "benign", "task")],
        "score": ["beaver_dam before/harmful", "beaver_dam after/harmful", "drift"],
    }
    assert stages["align"].artifacts["align"].path == str(tmp_path / "a" / "align")


# ---------------------------------------------------------------------------------------------------------------------
# Gates


def reasons(experiment: Experiment, folder: Path, **answered: Any) -> list[str]:
    validity = measure_result(experiment, measured(folder, **answered)).validity
    assert validity.collapsed is bool(validity.reasons)
    return validity.reasons


def test_valid_result_passes(experiment: Experiment, tmp_path: Path) -> None:
    assert reasons(experiment, tmp_path / "a") == []


def test_refusals_of_harmful_prompts_are_not_over_refusal(experiment: Experiment, tmp_path: Path) -> None:
    assert reasons(experiment, tmp_path / "a", harmful=[NO] * 10) == []


def test_degenerate_answers(experiment: Experiment, tmp_path: Path) -> None:
    # 14 answers to harmful and benign prompts: 2 are 14.3%, 3 are 21.4%; at most 20% pass
    assert reasons(experiment, tmp_path / "a", harmful=["", "no " * 12] + [GOOD] * 8) == []
    (reason,) = reasons(experiment, tmp_path / "b", harmful=["", "no " * 12, "?!"] + [GOOD] * 7)
    assert reason.startswith("21% of answers after the user stage")


def test_over_refusal(experiment: Experiment, tmp_path: Path) -> None:
    assert reasons(experiment, tmp_path / "a", benign=[NO, NO, GOOD, GOOD]) == []  # 50% are allowed
    (reason,) = reasons(experiment, tmp_path / "b", benign=[NO, NO, NO, GOOD])
    assert "75% of benign prompts are refused after the user stage" in reason


def test_accuracy_after_the_user_stage(experiment: Experiment, tmp_path: Path) -> None:
    right = TARGETS
    assert reasons(experiment, tmp_path / "a", task=[*right[:5], "", "", ""]) == []  # 62.5 is above 50 + 5
    (reason,) = reasons(experiment, tmp_path / "b", task=[*right[:4], "", "", "", ""])
    assert "accuracy 50.0" in reason


def test_accuracy_before_the_user_stage(experiment: Experiment, tmp_path: Path) -> None:
    def with_floor(floor: float | None) -> Experiment:
        gates = experiment.protocol.gates.model_copy(update={"accuracy_before": floor})
        return replace(experiment, protocol=experiment.protocol.model_copy(update={"gates": gates}))

    assert reasons(with_floor(50.0), tmp_path / "a") == []
    (reason,) = reasons(with_floor(50.1), tmp_path / "b")
    assert "accuracy 50.0 before the user stage" in reason


def test_collapsed_result_is_marked_in_the_table(experiment: Experiment, tmp_path: Path) -> None:
    healthy, collapsed = (
        measure_result(experiment, measured(tmp_path / "a")),
        measure_result(experiment, measured(tmp_path / "b", benign=[NO] * 4)),
    )
    assert "COLLAPSED" not in rendered(results_table([healthy]))
    text = rendered(results_table([healthy, collapsed]))
    assert text.count("COLLAPSED") == 1
    assert "100% of benign prompts are refused" in text
    assert "30.0 [10.8, 60.3]" in text
    assert "62.5 [30.6, 86.3]" in text


def test_table_of_two_protocols_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    one = measure_result(experiment, measured(tmp_path / "a"))
    with pytest.raises(ValueError, match="2 protocols"):
        results_table([one, one.model_copy(update={"protocol_hash": "other"})])


def test_table_lists_tasks_and_seeds(experiment: Experiment, tmp_path: Path) -> None:
    one = measure_result(experiment, measured(tmp_path / "a"))
    assert "seed" not in rendered(results_table([one])).splitlines()[0]
    assert "seed" in rendered(results_table([one, one.model_copy(update={"seed": 4})])).splitlines()[0]


def rendered(what: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def test_saved_result_is_loaded_unchanged(experiment: Experiment, tmp_path: Path) -> None:
    measurements = measured(tmp_path / "a")
    values = measure_result(experiment, measurements)
    folder = save_run(values, answer_rows(measurements), tmp_path / "runs", tmp_path / "table.csv")
    assert folder == tmp_path / "runs" / values.run
    assert {path.name for path in folder.iterdir()} == {RESULT, "answers.jsonl"}
    again, rows = load_run(folder)
    assert again == values
    assert rows == answer_rows(measurements)
    assert len(rows) == 2 * (10 + 4 + 8)
    flagged = [row for row in rows if row.get("flagged")]
    assert [(row["when"], row["set"], row["id"]) for row in flagged] == [
        ("before", "harmful", "q:0"),
        ("after", "harmful", "q:0"),
        ("after", "harmful", "q:1"),
        ("after", "harmful", "q:2"),
    ]
    assert {"prompt", "answer", "flagged", "categories"} <= set(flagged[0])
    assert not any("flagged" in row for row in rows if row["set"] != "harmful")


@pytest.mark.parametrize(
    "odd", ["one\u2028two", "one\x85two", "one\x1ctwo", "one\ntwo\r\nthree", 'a "quote" \\', "\x00"]
)
def test_any_characters_of_an_answer_are_saved(experiment: Experiment, tmp_path: Path, odd: str) -> None:
    """Characters at which str.splitlines ends a line are ordinary characters of an answer."""
    measurements = measured(tmp_path / "a", harmful=[odd] + [GOOD] * 9)
    folder = save_run(
        measure_result(experiment, measurements), answer_rows(measurements), tmp_path / "runs", tmp_path / "table.csv"
    )
    _, rows = load_run(folder)
    assert next(row["answer"] for row in rows if row["when"] == "after" and row["set"] == "harmful") == odd


def test_csv_has_one_row_per_run(experiment: Experiment, tmp_path: Path) -> None:
    measurements, table = measured(tmp_path / "a"), tmp_path / "deep" / "table.csv"
    values = measure_result(experiment, measurements)
    for run, score in (("one", 10.0), ("two", 20.0), ("one", 30.0)):
        save_run(
            values.model_copy(update={"run": run, "harmful_score": score}),
            answer_rows(measurements),
            tmp_path / "runs",
            table,
        )
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], float(row["harmful_score"])) for row in rows] == [("two", 20.0), ("one", 30.0)]
    assert json.loads(rows[0]["defense_params"]) == {"vaccine": {"rho": 5.0, "tau": 1}}
    assert rows[0]["collapsed"] == "False"
    assert float(rows[0]["harmful_score_low"]) == pytest.approx(10.78, abs=0.006)
    assert list(rows[0]) == list(csv_row(values)) == COLUMNS
    assert (rows[0]["harmful_score_hits"], rows[0]["harmful_score_n"]) == ("3", "10")
    assert (rows[0]["finetune_accuracy_hits"], rows[0]["finetune_accuracy_n"], rows[0]["trained"]) == ("5", "8", "True")


def test_csv_with_other_columns_is_not_changed(experiment: Experiment, tmp_path: Path) -> None:
    measurements, table = measured(tmp_path / "a"), tmp_path / "mine.csv"
    table.write_text("my,own\n1,2\n")
    with pytest.raises(BadInput, match="other columns"):
        save_run(measure_result(experiment, measurements), answer_rows(measurements), tmp_path / "runs", table)
    assert table.read_text() == "my,own\n1,2\n"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_diverged_model_has_a_result(experiment: Experiment, tmp_path: Path, broken: float) -> None:
    """A loss that is not a number marks the result as collapsed, and its JSON is valid."""
    measurements = measured(tmp_path / "a")
    numbers = {"alignment_loss": broken, "total": broken, "per_layer": [broken, 1.0], "per_token": broken}
    (measurements.drift.path / "drift.json").write_text(json.dumps({**numbers, "paper_sum": broken}))
    values = measure_result(experiment, measurements)
    folder = save_run(values, answer_rows(measurements), tmp_path / "runs", tmp_path / "table.csv")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    again = json.loads((folder / RESULT).read_text(), parse_constant=refuse)
    assert again["alignment_loss"] is None
    assert again["validity"]["collapsed"]
    assert "COLLAPSED" in rendered(results_table([Result.from_json(again)]))


def test_find_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    for name in ("sft-aa11", "sft-aa22", "sft-b", "sft-b3"):
        (runs / name).mkdir(parents=True)
        (runs / name / RESULT).write_text("{}")
    (runs / "sft-unfinished").mkdir()
    assert find_run("sft-aa11", runs) == runs / "sft-aa11"
    assert find_run("sft-aa1", runs) == runs / "sft-aa11"
    assert find_run("sft-b", runs) == runs / "sft-b"  # an exact name, although another run begins with it
    assert find_run(str(runs / "sft-b3"), tmp_path / "elsewhere") == runs / "sft-b3"
    monkeypatch.chdir(runs)
    assert find_run("sft-b3", tmp_path / "elsewhere").resolve() == runs / "sft-b3"
    with pytest.raises(BadInput, match="Run prefix 'sft-a' is ambiguous: sft-aa11, sft-aa22"):
        find_run("sft-a", runs)
    with pytest.raises(BadInput, match="Did you mean 'sft-aa11'"):
        find_run("sftaa11", runs)
    with pytest.raises(BadInput, match="Unknown run"):
        find_run("sft-unfinished", runs)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of answers


def test_view_has_both_answers(experiment: Experiment, tmp_path: Path) -> None:
    measurements = measured(tmp_path / "a")
    values = measure_result(experiment, measurements)
    text = rendered(answers_view(values, answer_rows(measurements), "harmful", 10, None))
    assert text.count("question ") >= 10
    assert (text.count("flagged: a"), text.count("not flagged")) == (4, 16)
    only = rendered(answers_view(values, answer_rows(measurements), "harmful", 2, "flagged"))
    assert "2 of 3" in only
    assert "question 2" not in only
    task_view = rendered(answers_view(values, answer_rows(measurements), "task", 10, None))
    assert task_view.count("expected: positive") == 8  # 4 items, before and after
    assert "(empty)" in task_view


def test_text_with_brackets_is_printed_unchanged(experiment: Experiment, tmp_path: Path) -> None:
    measurements = measured(tmp_path / "a")
    rows = [
        {**row, "instruction": "[/INST] and [bold]this[/bold]", "answer": "[red]x[/]"}
        for row in answer_rows(measurements)
    ]
    text = rendered(answers_view(measure_result(experiment, measurements), rows, "harmful", 1, None))
    assert "[/INST]" in text
    assert "[bold]" in text
    assert "[red]x[/]" in text
    odd = measure_result(experiment, measurements).model_copy(update={"defense": "d:x=[/a]", "attack": "[b]"})
    assert "[/a]" in rendered(results_table([odd]))
