"""Rankings of defenses from CSVs of results written by hand: no model is involved."""

from __future__ import annotations

import csv
import json
import math
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import read_csv
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.reporting.leaderboard.files import write_tables
from harmbench_vaccine.reporting.leaderboard.ranking import COLUMNS, Ranking, rank_results
from harmbench_vaccine.reporting.leaderboard.views import rankings_frame, rankings_markdown
from support.cli import hbv
from support.results import DEFAULTS, SHARES, change, collapsed, make_result, write_csv


def result(defense: str, seed: int, hs: float, fa: float = 97.0, **changes: Any) -> Result:
    """Return the result of a defense with its name as its only plug-in, over 1,000 questions."""
    name = defense.partition("=")[0].partition(":")[0]
    scores = {"harmful_score": hs, "finetune_accuracy": fa, "harmful_score_n": 1000, "finetune_accuracy_n": 1000}
    return make_result(**{"defense": defense, "defense_params": {name: {}}, "seed": seed, **scores, **changes})


def before(harmful_score: float) -> dict[str, Any]:
    """Return the field `before` of an aligned model with this harmful score."""
    return {**DEFAULTS["before"], "harmful_score": harmful_score}


COLLAPSED = collapsed("60% of answers are empty", "accuracy 0.0 is low")
SFT = [result("sft", 0, 80, 96), result("sft", 1, 90, 98), result("sft", 2, 85, 97)]
VACCINE = [result("vaccine", 0, 60, 95), result("vaccine", 1, 80, 98), result("vaccine", 2, 70, 95)]
EWC = [result("ewc", 1, 50), result("ewc", 2, 65), result("ewc", 5, 5)]


def by_defense(ranking: Ranking) -> dict[str, dict[str, Any]]:
    return {row["defense"]: row for row in ranking.rows}


def only(tmp_path: Path, *results: Result, baseline: str = "sft") -> Ranking:
    """Return the single ranking of these results."""
    (ranking,) = rank_results([write_csv(tmp_path / "one.csv", *results)], baseline)
    return ranking


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_means_deviations_and_pooled_differences(tmp_path: Path) -> None:
    """The numbers are calculated by hand from the formulas of docs/statistics.md, with 3 seeds and 1,000 questions."""
    rows = by_defense(only(tmp_path, *SFT, *VACCINE))
    vaccine, sft = rows["vaccine"], rows["sft"]
    assert (vaccine["harmful_score"], vaccine["harmful_score_sd"]) == pytest.approx((70, 10))
    assert (sft["harmful_score"], sft["harmful_score_sd"]) == pytest.approx((85, 5))
    # phi = (.005 / (.85 * .15) + .02 / (.7 * .3)) / 4 = .0336134; v = .127826 and .210107; t(.975; 4) = 2.776445
    assert vaccine["harmful_score_dispersion"] == pytest.approx(33.6134, abs=1e-3)
    assert vaccine["harmful_score_difference"] == pytest.approx(-15)
    assert vaccine["harmful_score_difference_low"] == pytest.approx(-15 - 17.0844, abs=1e-3)
    assert vaccine["harmful_score_difference_high"] == pytest.approx(-15 + 17.0844, abs=1e-3)
    assert sft["harmful_score_low"] == pytest.approx(85 - 10.5073, abs=1e-3)
    assert sft["harmful_score_high"] == pytest.approx(85 + 10.5073, abs=1e-3)
    # FA: phi = (.0002 / (.97 * .03) + .0006 / (.96 * .04)) / 4 = .00562446; v = .029688 and .038963
    assert (vaccine["finetune_accuracy"], vaccine["finetune_accuracy_sd"]) == pytest.approx((96, math.sqrt(3)))
    assert vaccine["finetune_accuracy_difference"] == pytest.approx(-1)
    assert vaccine["finetune_accuracy_difference_low"] == pytest.approx(-1 - 3.1498, abs=1e-3)
    assert vaccine["finetune_accuracy_difference_high"] == pytest.approx(-1 + 3.1498, abs=1e-3)
    assert vaccine["safety_tax"] == pytest.approx(1)


def test_loss_and_drift_are_averaged(tmp_path: Path) -> None:
    runs = [
        result(
            "sft", 0, 80, alignment_loss=0.5, embedding_drift=100.0, embedding_drift_per_token=2.0, before=before(0.0)
        ),
        result(
            "sft", 1, 80, alignment_loss=1.0, embedding_drift=300.0, embedding_drift_per_token=5.0, before=before(3.0)
        ),
    ]
    (row,) = only(tmp_path, *runs).rows
    assert (row["alignment_loss"], row["embedding_drift"], row["embedding_drift_per_token"]) == (0.75, 200, 3.5)
    assert row["harmful_score_before"] == 1.5


def judge_score(hs: float) -> dict[str, Any]:
    """Return the stored score of a judge."""
    share = {"harmful_score": hs, "ci": [0.0, 100.0], "hits": 1, "n": 10}
    return {**share, "before": share, "sets": {}, "cut": 0, "categories": {}}


def judged(*keywords: tuple[float, float | None]) -> list[Result]:
    """Return runs of two judges; each pair is HS by the keywords, and kappa."""
    return [
        result(
            *("sft", seed, 20),
            scores={"beaver_dam": judge_score(20), "refusal_keywords": judge_score(hs)},
            agreement=[
                {
                    "scorers": ["beaver_dam", "refusal_keywords"],
                    "kappa": kappa,
                    "n": 10,
                    "both": 1,
                    "only": {},
                    "neither": 9,
                }
            ],
        )
        for seed, (hs, kappa) in enumerate(keywords)
    ]


def test_scores_of_other_judges_are_averaged(tmp_path: Path) -> None:
    ranking = only(tmp_path, *judged((60, 0.2), (70, 0.4)), result("vaccine", 0, 10))
    rows = by_defense(ranking)
    assert json.loads(rows["sft"]["other_judges"]) == {
        "refusal_keywords": {"harmful_score": 65, "kappa": pytest.approx(0.3)}
    }
    assert rows["vaccine"]["other_judges"] == ""
    text = rankings_markdown([ranking])
    assert "| HS % by refusal_keywords |" in text
    assert "| 65.0, kappa 0.30 |" in text
    assert "by refusal_keywords" not in rankings_markdown([only(tmp_path / "one", result("vaccine", 0, 10))])


@pytest.mark.parametrize("others", [[(60, None)], [(60, 0.2), (70, None)]])
def test_undefined_kappa_of_another_judge_is_named(others: list[tuple[float, float | None]], tmp_path: Path) -> None:
    assert ", kappa undefined |" in rankings_markdown([only(tmp_path, *judged(*others))])


def test_judge_that_a_run_lacks_has_no_mean(tmp_path: Path) -> None:
    (row,) = only(tmp_path, *judged((60, 0.2)), result("sft", 1, 20)).rows
    assert row["other_judges"] == ""


def test_refused_benign_prompts_are_averaged(tmp_path: Path) -> None:
    refused = {"before": SHARES, "after": {**SHARES, "over_refusal": 30.0}}
    validity = {**DEFAULTS["validity"], "shares": refused}
    (row,) = only(tmp_path, result("sft", 0, 20), result("sft", 1, 20, validity=validity)).rows
    assert row["over_refusal"] == 16


def test_difference_of_defenses_with_different_seeds(tmp_path: Path) -> None:
    """The seeds are not paired: each defense contributes the mean over its own."""
    ewc = by_defense(only(tmp_path, *EWC, *reversed(SFT)))["ewc"]
    assert (ewc["seeds"], ewc["harmful_score"], ewc["harmful_score_difference"]) == (3, 40, -45)


def test_one_seed_has_an_interval_over_questions(tmp_path: Path) -> None:
    ranking = only(tmp_path, SFT[0], VACCINE[0])
    row = by_defense(ranking)["vaccine"]
    assert math.isnan(row["harmful_score_sd"])
    assert row["harmful_score_difference"] == pytest.approx(-20)
    # 1.959964 sqrt(.160716 / 1000 + .240079 / 1000), with m = 802 / 1004 and 602 / 1004
    assert row["harmful_score_difference_high"] == pytest.approx(-20 + 3.9238, abs=1e-3)
    assert [note for note in ranking.notes if "over questions only" in note] == [
        f"{score}: one seed, so the intervals are over questions only, not over trainings." for score in ("HS", "FA")
    ]


def test_score_that_does_not_vary_is_not_called_one_seed(tmp_path: Path) -> None:
    """The accuracy of both seeds is 100 for both defenses, which does not determine a spread."""
    runs = [result(name, seed, 40 + 9 * seed, 100) for name in ("sft", "vaccine") for seed in (0, 1)]
    ranking = only(tmp_path, *runs)
    assert "FA: no score varies between seeds, so the intervals are over questions only, not over trainings." in (
        ranking.notes
    )
    assert not any("one seed" in note for note in ranking.notes)
    assert all(row["finetune_accuracy_low"] < 100 for row in ranking.rows)


def test_hollow_defense_is_shown_and_not_ranked(tmp_path: Path) -> None:
    shares = {"before": SHARES, "after": {**SHARES, "neither": 93.0}}
    hollow = {"validity": {**DEFAULTS["validity"], "hollow": True, "shares": shares}}
    ranking = only(tmp_path, *SFT, result("vaccine", 0, 7, **hollow), result("vaccine", 1, 5, **hollow))
    assert ranks(ranking) == [("sft", 1), ("vaccine", None)]
    assert ranking.notes[0].startswith("HOLLOW vaccine, 2 of 2 runs: 93% of harmful prompts")
    assert "| hollow | vaccine | 2 |" in rankings_markdown([ranking])
    assert not ranking.rows[-1]["pareto"]


def test_runs_without_the_gate_for_hollow_cells_have_a_note(tmp_path: Path) -> None:
    rows = list(csv.DictReader(write_csv(tmp_path / "new.csv", *SFT).read_text().splitlines()))
    with (tmp_path / "old.csv").open("w", newline="") as file:  # without the column
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "hollow"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[:2])
    new = write_csv(tmp_path / "one.csv", SFT[2])
    (ranking,) = rank_results([tmp_path / "old.csv", new])
    assert "Not checked for hollow cells: 2 of 3 runs are from an earlier version." in " ".join(ranking.notes)
    assert "hollow" not in " ".join(only(tmp_path, *SFT).notes)


def test_baseline_has_no_difference_to_itself(tmp_path: Path) -> None:
    ranking = only(tmp_path, *SFT, *VACCINE)
    sft = by_defense(ranking)["sft"]
    assert all(math.isnan(sft[column]) for column in sft if "_difference" in column)
    assert "| sft | 3 | 85.0 [74.5, 95.5] |  | 97.0 |" in rankings_markdown([ranking])


def test_different_baseline(tmp_path: Path) -> None:
    rows = by_defense(only(tmp_path, *SFT, *VACCINE, baseline="vaccine"))
    assert rows["sft"]["harmful_score_difference"] == pytest.approx(15)
    assert math.isnan(rows["vaccine"]["harmful_score_difference"])


def test_ranking_without_the_baseline_has_a_note(tmp_path: Path) -> None:
    elsewhere = [change(run, task="agnews", run=f"{run.run}-agnews") for run in VACCINE]
    agnews, sst2 = rank_results([write_csv(tmp_path / "one.csv", *SFT, *VACCINE, *elsewhere)])
    assert not any(note.startswith("No differences") for note in sst2.notes)
    assert agnews.notes[0].startswith("No differences: the baseline 'sft'")
    (row,) = agnews.rows
    assert row["baseline"] is None
    assert math.isnan(row["harmful_score_difference"])
    assert any(line.startswith("| 1 | vaccine | 3 | 70.0 [") for line in rankings_markdown([agnews]).splitlines())


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def ranks(ranking: Ranking) -> list[tuple[str, int | None]]:
    return [(row["defense"], row["rank"]) for row in ranking.rows]


def test_lowest_harmful_score_comes_first_and_accuracy_breaks_ties(tmp_path: Path) -> None:
    runs = [result("sft", 0, 80), result("a", 0, 30, 90), result("b", 0, 30, 95), result("c", 0, 9, 10)]
    assert ranks(only(tmp_path, *runs)) == [("c", 1), ("b", 2), ("a", 3), ("sft", 4)]


def test_equal_scores_share_a_rank(tmp_path: Path) -> None:
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last bit
    runs = [
        *(result("b", seed, score, 90) for seed, score in enumerate([0.1, 0.2, 0.3])),
        *(result("a", seed, score, 90) for seed, score in enumerate([0.3, 0.2, 0.1])),
        result("c", 0, 50),
    ]
    assert ranks(only(tmp_path, *runs)) == [("a", 1), ("b", 1), ("c", 3)]


def test_collapsed_defense_has_no_rank(tmp_path: Path) -> None:
    """One collapsed run of three is enough, although its harmful score would be the best."""
    runs = [*SFT, *VACCINE, result("broken", 0, 0), result("broken", 1, 0, **COLLAPSED), result("broken", 2, 0)]
    ranking = only(tmp_path, *runs)
    assert ranks(ranking) == [("vaccine", 1), ("sft", 2), ("broken", None)]
    row = ranking.rows[-1]
    assert (row["collapsed_cells"], row["seeds"]) == (1, 3)
    assert row["reasons"] == "seed 1: 60% of answers are empty; accuracy 0.0 is low"
    note = ranking.notes[0]
    assert note.startswith("COLLAPSED broken, 1 of 3 runs: seed 1: 60% of answers are empty")
    assert "doubtful" not in note


def test_collapsed_baseline_makes_differences_doubtful(tmp_path: Path) -> None:
    ranking = only(tmp_path, result("sft", 0, 0, **COLLAPSED), VACCINE[0])
    assert ranks(ranking) == [("vaccine", 1), ("sft", None)]
    assert "Differences to it are doubtful" in ranking.notes[0]


def test_diverged_run_makes_the_mean_undefined(tmp_path: Path) -> None:
    """Its loss is not a number, so the mean over seeds is not a number either."""
    diverged = result("sft", 1, 0, alignment_loss=None, embedding_drift=None, **COLLAPSED)
    (row,) = only(tmp_path, SFT[0], diverged).rows
    assert math.isnan(row["alignment_loss"])
    assert math.isnan(row["embedding_drift"])
    assert row["embedding_drift_per_token"] == 4
    assert row["neither"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# Grouping into tables


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol_hash": "bb22"},
        {"protocol": "other"},
        {"model": "large"},
        {"scorer": "beaver_dam=0.4"},
        {"task": "agnews"},
        {"attack": "ratio=0.2", "attack_params": {"ratio": {"p": 0.2}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_tables_are_not_mixed(changes: dict[str, Any], tmp_path: Path) -> None:
    second = result("vaccine", 0, 10, **changes)
    rankings = rank_results([write_csv(tmp_path / "one.csv", SFT[0], change(second, run="vaccine-other"))])
    assert sorted([row["defense"] for row in ranking.rows] for ranking in rankings) == [["sft"], ["vaccine"]]
    assert [row["rank"] for ranking in rankings for row in ranking.rows] == [1, 1]
    assert rankings[0].title != rankings[1].title
    assert rankings_markdown(rankings).count("\n## ") == 2


def test_rankings_are_sorted_with_ratios_by_value(tmp_path: Path) -> None:
    settings = [("sst2", 0.1), ("sst2", 1e-05), ("sst2", 0.05), ("sst2", 0), ("agnews", 1), ("sst2", 0.25)]
    runs = [
        result("sft", 0, 50, task=task, attack=f"ratio={p}", attack_params={"ratio": {"p": p}}) for task, p in settings
    ]
    rankings = rank_results([write_csv(tmp_path / "one.csv", *runs)])
    assert [(ranking.setting["task"], ranking.setting["attack"]) for ranking in rankings] == [
        ("agnews", "ratio=1"),
        ("sst2", "ratio=0"),
        ("sst2", "ratio=1e-05"),
        ("sst2", "ratio=0.05"),
        ("sst2", "ratio=0.1"),
        ("sst2", "ratio=0.25"),
    ]


def test_explicit_default_is_the_same_defense(tmp_path: Path) -> None:
    two = {"vaccine": {"rho": 2.0, "tau": 1}}
    runs = [result("vaccine", 0, 60, defense_params=two), result("vaccine=2", 1, 80, defense_params=two)]
    ranking = only(tmp_path, *SFT, *runs, baseline="vaccine=2")
    assert [(row["defense"], row["seeds"]) for row in ranking.rows] == [("vaccine", 2), ("sft", 3)]
    assert by_defense(ranking)["sft"]["harmful_score_difference"] == pytest.approx((20 + 10) / 2)


def test_one_name_with_different_parameters_is_two_defenses(tmp_path: Path) -> None:
    small, large = {"vaccine": {"rho": 2.0}}, {"vaccine": {"rho": 5.0}}
    runs = [result("vaccine", 0, 60, defense_params=small), result("vaccine", 1, 20, defense_params=large)]
    ranking = only(tmp_path, *SFT, *runs, baseline="vaccine")
    assert [row["defense"] for row in ranking.rows] == [
        'vaccine {"vaccine":{"rho":5.0}}',
        'vaccine {"vaccine":{"rho":2.0}}',
        "sft",
    ]
    assert ranking.notes[0].startswith("No differences: the baseline 'vaccine' matches none or several")


def test_run_in_two_files_counts_once(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "one.csv", *SFT)
    second = write_csv(tmp_path / "two.csv", change(SFT[0], stages={}, environment={}), *VACCINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ranking,) = rank_results([first, second, first])
    assert {row["defense"]: row["seeds"] for row in ranking.rows} == {"sft": 3, "vaccine": 3}


@pytest.mark.parametrize("files", [1, 2])
def test_later_run_replaces_the_earlier_with_a_warning(files: int, tmp_path: Path) -> None:
    repeated = result("sft", 0, 20, run="sft-other-code")
    paths = [write_csv(tmp_path / "one.csv", *SFT)]
    paths = [*paths, write_csv(tmp_path / "two.csv", repeated)] if files == 2 else [write_csv(paths[0], repeated)]
    with pytest.warns(UserWarning, match="replace") as caught:
        (ranking,) = rank_results(paths)
    assert len(caught) == 1
    assert str(caught[0].message).endswith(f"replace {SFT[0].run}.")
    (row,) = ranking.rows
    assert (row["seeds"], row["harmful_score"]) == (3, (20 + 90 + 85) / 3)


# ---------------------------------------------------------------------------------------------------------------------
# Command


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two protocol hashes, a collapsed defense, and an attack that replaces the user stage."""
    edited = {"attack": "ablate", "attack_params": {"ablate": {}}, "trained": False}
    return write_csv(
        tmp_path / "mixed.csv",
        *SFT,
        *VACCINE,
        result("broken", 0, 0, **COLLAPSED),
        *(result(defense, 0, 40, 11.5, **edited) for defense in ("sft", "vaccine")),
        result("sft", 0, 33, protocol_hash="bb22"),
    )


def test_terminal(mixed: Path, tmp_path: Path) -> None:
    done = hbv("leaderboard", mixed)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    titles = [number for number, line in enumerate(lines) if "(protocol tiny " in line]
    assert [lines[number].partition(",")[0] for number in titles] == ["ablate on sst2", *["ratio=0.1 on sst2"] * 2]
    assert ["bb22" in lines[number] for number in titles] == [False, False, True]
    first, second, third = lines[: titles[1]], lines[titles[1] : titles[2]], lines[titles[2] :]
    assert sum("11.5 untrained" in line for line in first) == 2
    assert not any("untrained" in line for line in [*second, *third])
    ranked = [line.split()[:3] for line in second if line.split()[1:2] in (["sft"], ["vaccine"], ["broken"])]
    assert ranked == [["1-2", "vaccine", "3"], ["1-2", "sft", "3"], ["collapsed", "broken", "1"]]
    assert any("-15.0 [-32.1, +2.1]" in line for line in second)
    assert any(line.startswith("COLLAPSED broken, 1 of 1 runs: seed 0: 60% of answers") for line in second)
    assert sum("33.0 [" in line for line in third) == 1
    assert "broken" not in "".join(third)
    assert {path.name for path in tmp_path.iterdir()} == {"mixed.csv", ".mixed.csv.lock"}  # nothing was written


def test_files(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "tables"
    assert hbv("leaderboard", mixed, "--out", out).code == 0
    tables = {"index.html", "leaderboard.csv", "leaderboard.md", "leaderboard.tex"}
    assert {path.name for path in out.iterdir()} == {*tables, "figures"}
    with (out / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["protocol_hash"], row["attack"], row["defense"], row["rank"]) for row in rows] == [
        ("aa11", "ablate", "sft", "1"),
        ("aa11", "ablate", "vaccine", "1"),
        ("aa11", "ratio=0.1", "vaccine", "1"),
        ("aa11", "ratio=0.1", "sft", "2"),
        ("aa11", "ratio=0.1", "broken", ""),
        ("bb22", "ratio=0.1", "sft", "1"),
    ]
    assert [row["trained"] for row in rows] == ["False"] * 2 + ["True"] * 4
    assert [row["collapsed_cells"] for row in rows] == ["0"] * 4 + ["1", "0"]
    assert rows[4]["reasons"].startswith("seed 0: 60%")
    assert (rows[2]["harmful_score"], rows[2]["harmful_score_difference"], rows[3]["harmful_score_difference"]) == (
        "70",
        "-15",
        "",
    )
    assert json.loads(rows[2]["attack_params"]) == {"ratio": {"p": 0.1}}
    text = (out / "leaderboard.md").read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 3 * 2 + 6
    assert len({line.count("|") for line in tables}) == 1
    assert text.count("11.5 untrained") == 2
    assert "| collapsed | broken | 1 |" in text
    assert "\n- COLLAPSED broken, 1 of 1 runs: seed 0: 60% of answers are empty" in text


def test_json(mixed: Path) -> None:
    done = hbv("leaderboard", mixed, "--json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert [list(row) for row in rows] == [[*COLUMNS, "evidence"]] * 6
    assert rows[4]["defense"] == "broken"
    assert (rows[4]["rank"], rows[4]["collapsed_cells"], rows[4]["harmful_score_sd"]) == (None, 1, None)
    assert rows[0]["trained"] is False
    assert rows[2]["harmful_score_difference_low"] == pytest.approx(-32.0844, abs=1e-3)


def test_default_file_is_the_csv_of_the_home(tmp_path: Path) -> None:
    home = tmp_path / "shared"
    write_csv(home / "results.csv", *SFT)
    (row,) = json.loads(hbv("leaderboard", "--json", home=home).out)
    assert row["harmful_score"] == 85


def test_several_files_and_a_different_baseline(tmp_path: Path) -> None:
    first, second = write_csv(tmp_path / "one.csv", *SFT), write_csv(tmp_path / "two.csv", *VACCINE)
    rows = json.loads(hbv("leaderboard", first, second, "--baseline", "vaccine", "--json").out)
    assert {row["defense"]: row["harmful_score_difference"] for row in rows} == {
        "sft": pytest.approx(15),
        "vaccine": None,
    }


def test_replaced_row_is_reported_on_stderr_in_one_line(tmp_path: Path) -> None:
    done = hbv("leaderboard", write_csv(tmp_path / "one.csv", *SFT, change(SFT[0], run="sft-again")), "--json")
    assert done.code == 0
    assert done.sentence.startswith("hbv: warning: Later rows")


def test_names_are_not_markup(tmp_path: Path) -> None:
    odd = result("a:x=[/b]|<i>", 0, 1, model="m[red]")
    ranking = only(tmp_path, odd)
    assert r"a:x=[/b]\|&lt;i>" in rankings_markdown([ranking])
    shown = hbv("leaderboard", tmp_path / "one.csv").out
    assert "a:x=[/b]|<i>" in shown
    assert "m[red]" in shown


def broken(tmp_path: Path, column: str, value: str) -> Path:
    """Write a CSV of results with one invalid value."""
    path = write_csv(tmp_path / "broken.csv", *SFT)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[1][column] = value
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("column", "value"),
    [("harmful_score", "high"), ("harmful_score", ""), ("seed", ""), ("collapsed", "maybe"), ("trained", "")],
)
def test_invalid_value_is_refused(column: str, value: str, tmp_path: Path) -> None:
    path = broken(tmp_path, column, value)
    done = hbv("leaderboard", path)
    assert (done.code, done.out) == (2, "")
    assert f"{path}, line 3, column {column} is " in done.sentence


@pytest.mark.parametrize("flag", ["", "--json"])
def test_bad_input(flag: str, tmp_path: Path) -> None:
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").touch()
    good, flags = write_csv(tmp_path / "good.csv", *SFT), [flag] if flag else []
    for args, message in {
        (): f"The CSV of results {tmp_path / 'home' / 'results.csv'} does not exist",
        (good, tmp_path / "no.csv"): f"The CSV of results {tmp_path / 'no.csv'} does not exist",
        (good, tmp_path / "foreign.csv"): f"{tmp_path / 'foreign.csv'} has other columns",
        (tmp_path,): f"{tmp_path} has no entries",
        (tmp_path / "empty.csv",): "No results in",
        (good, "--out", good / "x"): f"{good / 'x'} cannot be written to",
    }.items():
        done = hbv("leaderboard", *args, *flags)
        assert (done.code, done.out) == (2, ""), args
        assert message in done.sentence


def test_empty_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    full = write_csv(tmp_path / "full.csv", *SFT, *VACCINE)
    assert rankings_frame(rank_results([tmp_path / "empty.csv", full])).equals(rankings_frame(rank_results([full])))


# ---------------------------------------------------------------------------------------------------------------------
# The committed table


def test_committed_results_are_complete() -> None:
    """They have all defenses, four ratios and three seeds, with default and with tuned parameters."""
    folder = Path(__file__).parents[1] / "leaderboards"
    rows = read_csv(folder / "testbed.csv")
    names = {row.defense for row in rows}
    assert len(names) == 21
    assert names <= set(DEFENSES.entries())
    runs = {(row.protocol, row.defense, row.attack, row.seed) for row in rows}
    ratios = ("ratio=0", "ratio=0.05", "ratio=0.1", "ratio=0.2")
    assert runs == set(product(("testbed", "testbed-tuned"), names, ratios, range(3)))
    assert len(rows) == len(runs)
    assert len({row.protocol_hash for row in rows}) == 2


@pytest.mark.parametrize("name", ["testbed", "testbed-token-share", "smollm2"])
def test_committed_tables_are_those_of_the_committed_results(name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "leaderboards"
    write_tables(rank_results([folder / f"{name}.csv"]), tmp_path)
    for table in ("leaderboard.md", "leaderboard.csv", "leaderboard.tex"):
        assert (tmp_path / table).read_bytes() == (folder / name / table).read_bytes()


@pytest.mark.parametrize("baseline", ["foo", "", "vacine", "x" * 300])
def test_baseline_that_no_run_has_is_refused(baseline: str, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "one.csv", *SFT, *VACCINE)
    done = hbv("leaderboard", table, "--baseline", baseline)
    assert (done.code, done.out) == (2, "")
    assert "Unknown baseline" in done.sentence
    assert "Allowed: sft, vaccine" in done.sentence
