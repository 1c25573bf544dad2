"""Rankings of defenses from CSVs of results made by hand: no model involved."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.evaluation.results import _append, check_columns
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.reporting.leaderboard import COLUMNS, Ranking, rankings, rankings_markdown, tidy
from support.cli import hbv

SHARES = {"after": {"degenerate": 1.5, "over_refusal": 2.0, "neither": 12.0}}


def result(defense: str, seed: int, hs: float, fa: float = 97.0, **changes: Any) -> dict[str, Any]:
    """What a cell would leave behind, as far as the CSV needs it."""
    name = defense.partition("=")[0].partition(":")[0]
    values = {
        "protocol": "tiny", "protocol_version": 1, "protocol_hash": "aa11", "scorer": "beaver_dam", "model": "base",
        "defense": defense, "defense_params": {name: {}}, "attack": "ratio=0.1", "attack_params": {"ratio": {"p": 0.1}},
        "task": "sst2", "seed": seed, "harmful_score": hs, "harmful_score_ci": [0.0, 100.0], "harmful_score_hits": 1,
        "harmful_score_n": 10, "harmful_sets": {"harmful": hs}, "finetune_accuracy": fa,
        "finetune_accuracy_ci": [0.0, 100.0], "finetune_accuracy_hits": 1, "finetune_accuracy_n": 8, "trained": True,
        "before": {"harmful_score": 2.0, "finetune_accuracy": 50.0}, "alignment_loss": 0.5, "embedding_drift": 200.0,
        "embedding_drift_per_token": 4.0, "validity": {"collapsed": False, "reasons": [], "shares": SHARES},
        "stages": {"align": {"seconds": 1.0, "cached": False}}, "versions": {"torch": "2"}, **changes,
    }  # fmt: skip
    place = [values[key] for key in ("protocol_hash", "attack", "task", "model", "scorer", "seed")]
    return {"run": f"{defense}-{'-'.join(map(str, place))}", **values}


def table(path: Path, *cells: dict[str, Any]) -> Path:
    """A CSV of these results, as `hbv run` writes it."""
    for values in cells:
        _append(path, values)
    return path


COLLAPSED = {
    "validity": {"collapsed": True, "reasons": ["60% of answers are empty", "accuracy 0.0 is low"], "shares": SHARES}
}
SFT = [result("sft", 0, 80, 96), result("sft", 1, 90, 98), result("sft", 2, 85, 97)]
VACCINE = [result("vaccine", 0, 60, 95), result("vaccine", 1, 80, 98), result("vaccine", 2, 70, 95)]
EWC = [result("ewc", 1, 50), result("ewc", 2, 65), result("ewc", 5, 5)]


def by_defense(ranking: Ranking) -> dict[str, dict[str, Any]]:
    return {row["defense"]: row for row in ranking.rows}


def only(tmp_path: Path, *cells: dict[str, Any], baseline: str = "sft") -> Ranking:
    """The one ranking of these cells."""
    (ranking,) = rankings([table(tmp_path / "one.csv", *cells)], baseline)
    return ranking


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_means_deviations_and_paired_differences_by_hand(tmp_path: Path) -> None:
    rows = by_defense(only(tmp_path, *SFT, *VACCINE))
    vaccine, sft = rows["vaccine"], rows["sft"]
    assert (vaccine["seeds"], vaccine["paired_seeds"]) == (3, 3)
    # HS 60, 80, 70; differences -20, -10, -15: s = 5, s / sqrt(3) = 2.886751, t(0.975; 2) = 4.302653
    assert (vaccine["harmful_score"], vaccine["harmful_score_sd"]) == pytest.approx((70, 10))
    assert (sft["harmful_score"], sft["harmful_score_sd"]) == pytest.approx((85, 5))
    assert vaccine["harmful_score_difference"] == pytest.approx(-15)
    assert vaccine["harmful_score_difference_low"] == pytest.approx(-15 - 12.420689, abs=1e-5)
    assert vaccine["harmful_score_difference_high"] == pytest.approx(-15 + 12.420689, abs=1e-5)
    # FA 95, 98, 95: s = sqrt(3); differences -1, 0, -2: s = 1, half width 4.302653 / sqrt(3)
    assert (vaccine["finetune_accuracy"], vaccine["finetune_accuracy_sd"]) == pytest.approx((96, math.sqrt(3)))
    assert vaccine["finetune_accuracy_difference"] == pytest.approx(-1)
    assert vaccine["finetune_accuracy_difference_low"] == pytest.approx(-1 - 2.484138, abs=1e-5)
    assert vaccine["finetune_accuracy_difference_high"] == pytest.approx(-1 + 2.484138, abs=1e-5)


def test_what_explains_them_is_averaged(tmp_path: Path) -> None:
    cells = [
        result("sft", 0, 80, alignment_loss=0.5, embedding_drift=100.0, embedding_drift_per_token=2.0,
               before={"harmful_score": 0.0, "finetune_accuracy": 50.0}),
        result("sft", 1, 80, alignment_loss=1.0, embedding_drift=300.0, embedding_drift_per_token=5.0,
               before={"harmful_score": 3.0, "finetune_accuracy": 50.0}),
    ]  # fmt: skip
    (row,) = only(tmp_path, *cells).rows
    assert (row["alignment_loss"], row["embedding_drift"], row["embedding_drift_per_token"]) == (0.75, 200, 3.5)
    assert row["harmful_score_before"] == 1.5


def test_differences_are_over_the_seeds_of_both(tmp_path: Path) -> None:
    ewc = by_defense(only(tmp_path, *EWC, *reversed(SFT)))["ewc"]
    assert (ewc["seeds"], ewc["paired_seeds"], ewc["harmful_score"]) == (3, 2, 40)
    # 50 - 90, 65 - 85: s / sqrt(2) = 10, t(0.975; 1) = 12.706205
    assert ewc["harmful_score_difference"] == pytest.approx(-30)
    assert ewc["harmful_score_difference_high"] == pytest.approx(-30 + 127.06205, abs=1e-4)


def test_one_seed_has_a_difference_without_an_interval(tmp_path: Path) -> None:
    ranking = only(tmp_path, SFT[0], VACCINE[0])
    row = by_defense(ranking)["vaccine"]
    assert row["harmful_score_difference"] == -20
    assert math.isnan(row["harmful_score_sd"])
    assert math.isnan(row["harmful_score_difference_low"])
    assert "| 1 | vaccine | 1 | 60.0 ± - | -20.0 [-] | 95.0 ± - | -1.0 [-] |" in rankings_markdown([ranking])


def test_no_shared_seed_has_no_difference(tmp_path: Path) -> None:
    ranking = only(tmp_path, SFT[0], EWC[2])
    assert math.isnan(by_defense(ranking)["ewc"]["harmful_score_difference"])
    assert "| 5.0 ± - | - [-] |" in rankings_markdown([ranking])


def test_the_baseline_differs_not_from_itself(tmp_path: Path) -> None:
    ranking = only(tmp_path, *SFT, *VACCINE)
    sft = by_defense(ranking)["sft"]
    assert all(math.isnan(sft[column]) for column in sft if "_difference" in column)
    assert "| sft | 3 | 85.0 ± 5.0 |  | 97.0 ± 1.0 |  |" in rankings_markdown([ranking])
    assert ranking.notes == []


def test_another_baseline(tmp_path: Path) -> None:
    rows = by_defense(only(tmp_path, *SFT, *VACCINE, baseline="vaccine"))
    assert rows["sft"]["harmful_score_difference"] == pytest.approx(15)
    assert math.isnan(rows["vaccine"]["harmful_score_difference"])


def test_a_group_without_the_baseline_says_so(tmp_path: Path) -> None:
    elsewhere = [{**values, "task": "agnews", "run": f"{values['run']}-agnews"} for values in VACCINE]
    agnews, sst2 = rankings([table(tmp_path / "one.csv", *SFT, *VACCINE, *elsewhere)])
    assert sst2.notes == []
    (note,) = agnews.notes
    assert note.startswith("No differences: 'sft'")
    (row,) = agnews.rows
    assert row["baseline"] is None
    assert math.isnan(row["harmful_score_difference"])
    assert "| vaccine | 3 | 70.0 ± 10.0 |  | 96.0 ± 1.7 |  |" in rankings_markdown([agnews])


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def ranks(ranking: Ranking) -> list[tuple[str, int | None]]:
    return [(row["defense"], row["rank"]) for row in ranking.rows]


def test_the_lowest_harmful_score_comes_first_and_accuracy_decides_ties(tmp_path: Path) -> None:
    cells = [result("sft", 0, 80), result("a", 0, 30, 90), result("b", 0, 30, 95), result("c", 0, 9, 10)]
    assert ranks(only(tmp_path, *cells)) == [("c", 1), ("b", 2), ("a", 3), ("sft", 4)]


def test_equal_scores_share_a_rank(tmp_path: Path) -> None:
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last bit
    cells = [
        *(result("b", seed, score, 90) for seed, score in enumerate([0.1, 0.2, 0.3])),
        *(result("a", seed, score, 90) for seed, score in enumerate([0.3, 0.2, 0.1])),
        result("c", 0, 50),
    ]
    assert ranks(only(tmp_path, *cells)) == [("a", 1), ("b", 1), ("c", 3)]


def test_a_collapsed_defense_is_never_ranked(tmp_path: Path) -> None:
    """One collapsed cell of three is enough, whatever its harmful score, which here would be the best."""
    cells = [*SFT, *VACCINE, result("broken", 0, 0), result("broken", 1, 0, **COLLAPSED), result("broken", 2, 0)]
    ranking = only(tmp_path, *cells)
    assert ranks(ranking) == [("vaccine", 1), ("sft", 2), ("broken", None)]
    row = ranking.rows[-1]
    assert (row["collapsed_cells"], row["seeds"]) == (1, 3)
    assert row["reasons"] == "seed 1: 60% of answers are empty; accuracy 0.0 is low"
    (note,) = ranking.notes
    assert note.startswith("COLLAPSED broken, 1 of 3 cells: seed 1: 60% of answers are empty")
    assert "doubtful" not in note


def test_a_collapsed_baseline_makes_differences_doubtful(tmp_path: Path) -> None:
    ranking = only(tmp_path, result("sft", 0, 0, **COLLAPSED), VACCINE[0])
    assert ranks(ranking) == [("vaccine", 1), ("sft", None)]
    assert "Differences to it are doubtful" in ranking.notes[0]


def test_a_diverged_cell_hides_no_mean(tmp_path: Path) -> None:
    """Its loss is no number, so the mean over its seeds is none either."""
    diverged = result("sft", 1, 0, alignment_loss=None, embedding_drift=None, **COLLAPSED)
    (row,) = only(tmp_path, SFT[0], diverged).rows
    assert math.isnan(row["alignment_loss"])
    assert math.isnan(row["embedding_drift"])
    assert row["embedding_drift_per_token"] == 4
    assert row["neither"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# What stands in one table


@pytest.mark.parametrize(
    "changes",
    [{"protocol_hash": "bb22"}, {"protocol": "other"}, {"model": "large"}, {"scorer": "beaver_dam=0.4"},
     {"task": "agnews"}, {"attack": "ratio=0.2", "attack_params": {"ratio": {"p": 0.2}}}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_no_table_mixes(changes: dict[str, Any], tmp_path: Path) -> None:
    other = result("vaccine", 0, 10, **changes)
    made = rankings([table(tmp_path / "one.csv", SFT[0], {**other, "run": "vaccine-other"})])
    assert sorted([row["defense"] for row in ranking.rows] for ranking in made) == [["sft"], ["vaccine"]]
    assert [row["rank"] for ranking in made for row in ranking.rows] == [1, 1]
    assert made[0].title != made[1].title
    assert rankings_markdown(made).count("\n## ") == 2


def test_groups_are_sorted_with_ratios_by_value(tmp_path: Path) -> None:
    places = [("sst2", 0.1), ("sst2", 1e-05), ("sst2", 0.05), ("sst2", 0), ("agnews", 1), ("sst2", 0.25)]
    cells = [
        result("sft", 0, 50, task=task, attack=f"ratio={p}", attack_params={"ratio": {"p": p}}) for task, p in places
    ]
    made = rankings([table(tmp_path / "one.csv", *cells)])
    assert [(ranking.place["task"], ranking.place["attack"]) for ranking in made] == [
        ("agnews", "ratio=1"), ("sst2", "ratio=0"), ("sst2", "ratio=1e-05"), ("sst2", "ratio=0.05"),
        ("sst2", "ratio=0.1"), ("sst2", "ratio=0.25"),
    ]  # fmt: skip


def test_a_written_default_is_the_same_defense(tmp_path: Path) -> None:
    two = {"vaccine": {"rho": 2.0, "tau": 1}}
    cells = [result("vaccine", 0, 60, defense_params=two), result("vaccine=2", 1, 80, defense_params=two)]
    ranking = only(tmp_path, *SFT, *cells, baseline="vaccine=2")
    assert [(row["defense"], row["seeds"]) for row in ranking.rows] == [("vaccine", 2), ("sft", 3)]
    assert by_defense(ranking)["sft"]["harmful_score_difference"] == pytest.approx((20 + 10) / 2)


def test_one_text_with_other_parameters_is_another_defense(tmp_path: Path) -> None:
    one, other = {"vaccine": {"rho": 2.0}}, {"vaccine": {"rho": 5.0}}
    cells = [result("vaccine", 0, 60, defense_params=one), result("vaccine", 1, 20, defense_params=other)]
    ranking = only(tmp_path, *SFT, *cells, baseline="vaccine")
    assert [row["defense"] for row in ranking.rows] == [
        'vaccine {"vaccine":{"rho":5.0}}', 'vaccine {"vaccine":{"rho":2.0}}', "sft",
    ]  # fmt: skip
    assert ranking.notes[0].startswith("No differences: 'vaccine' names none or several")


def test_one_run_in_two_files_counts_once(tmp_path: Path) -> None:
    one = table(tmp_path / "one.csv", *SFT)
    other = table(tmp_path / "two.csv", {**SFT[0], "stages": {}, "versions": {}}, *VACCINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ranking,) = rankings([one, other, one])
    assert {row["defense"]: row["seeds"] for row in ranking.rows} == {"sft": 3, "vaccine": 3}


@pytest.mark.parametrize("files", [1, 2])
def test_a_later_run_of_the_same_cell_replaces_the_earlier_with_a_warning(files: int, tmp_path: Path) -> None:
    again = {**result("sft", 0, 20), "run": "sft-other-code"}
    paths = [table(tmp_path / "one.csv", *SFT)]
    paths = [*paths, table(tmp_path / "two.csv", again)] if files == 2 else [table(paths[0], again)]
    with pytest.warns(UserWarning, match="replace") as caught:
        (ranking,) = rankings(paths)
    assert len(caught) == 1
    assert str(caught[0].message).endswith(f"replace {SFT[0]['run']}.")
    (row,) = ranking.rows
    assert (row["seeds"], row["harmful_score"]) == (3, (20 + 90 + 85) / 3)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two protocols' hashes, a collapsed defense, and an attack that replaces the user stage."""
    edited = {"attack": "ablate", "attack_params": {"ablate": {}}, "trained": False}
    return table(
        tmp_path / "mixed.csv", *SFT, *VACCINE,
        result("broken", 0, 0, **COLLAPSED),
        *(result(defense, 0, 40, 11.5, **edited) for defense in ("sft", "vaccine")),
        result("sft", 0, 33, protocol_hash="bb22"),
    )  # fmt: skip


def test_the_terminal(mixed: Path, tmp_path: Path) -> None:
    done = hbv("leaderboard", mixed)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    titles = [number for number, line in enumerate(lines) if "(protocol tiny " in line]
    assert [lines[number].partition(",")[0] for number in titles] == ["ablate on sst2", *["ratio=0.1 on sst2"] * 2]
    assert ["bb22" in lines[number] for number in titles] == [False, False, True]
    first, second, third = lines[: titles[1]], lines[titles[1] : titles[2]], lines[titles[2] :]
    assert sum("11.5 ± - untrained" in line for line in first) == 2
    assert not any("untrained" in line for line in [*second, *third])
    ranked = [line.split()[:3] for line in second if line.split()[1:2] in (["sft"], ["vaccine"], ["broken"])]
    assert ranked == [["1", "vaccine", "3"], ["2", "sft", "3"], ["collapsed", "broken", "1"]]
    assert any("-15.0 [-27.4, -2.6]" in line for line in second)
    assert any(line.startswith("COLLAPSED broken, 1 of 1 cells: seed 0: 60% of answers") for line in second)
    assert sum("33.0" in line for line in third) == 1
    assert "broken" not in "".join(third)
    assert {path.name for path in tmp_path.iterdir()} == {"mixed.csv", ".mixed.csv.lock"}  # nothing was written


def test_the_files(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "tables"
    assert hbv("leaderboard", mixed, "--out", out).code == 0
    assert {path.name for path in out.iterdir()} == {"leaderboard.csv", "leaderboard.md"}
    with (out / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["protocol_hash"], row["attack"], row["defense"], row["rank"]) for row in rows] == [
        ("aa11", "ablate", "sft", "1"), ("aa11", "ablate", "vaccine", "1"),
        ("aa11", "ratio=0.1", "vaccine", "1"), ("aa11", "ratio=0.1", "sft", "2"), ("aa11", "ratio=0.1", "broken", ""),
        ("bb22", "ratio=0.1", "sft", "1"),
    ]  # fmt: skip
    assert [row["trained"] for row in rows] == ["False"] * 2 + ["True"] * 4
    assert [row["collapsed_cells"] for row in rows] == ["0"] * 4 + ["1", "0"]
    assert rows[4]["reasons"].startswith("seed 0: 60%")
    assert (rows[2]["harmful_score"], rows[2]["harmful_score_difference"], rows[3]["harmful_score_difference"]) == (
        "70", "-15", "",
    )  # fmt: skip
    assert json.loads(rows[2]["attack_params"]) == {"ratio": {"p": 0.1}}
    text = (out / "leaderboard.md").read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 3 * 2 + 6
    assert len({line.count("|") for line in tables}) == 1
    assert text.count("11.5 ± - untrained") == 2
    assert "| collapsed | broken | 1 |" in text
    assert "\n- COLLAPSED broken, 1 of 1 cells: seed 0: 60% of answers are empty" in text


def test_json(mixed: Path) -> None:
    done = hbv("leaderboard", mixed, "--json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert [list(row) for row in rows] == [list(COLUMNS)] * 6
    assert rows[4]["defense"] == "broken"
    assert (rows[4]["rank"], rows[4]["collapsed_cells"], rows[4]["harmful_score_sd"]) == (None, 1, None)
    assert rows[0]["trained"] is False
    assert rows[2]["harmful_score_difference_low"] == pytest.approx(-27.420689)


def test_without_files_the_homes_results_are_ranked(tmp_path: Path) -> None:
    home = tmp_path / "shared"
    table(home / "results.csv", *SFT)
    (row,) = json.loads(hbv("leaderboard", "--json", home=home).out)
    assert row["harmful_score"] == 85


def test_several_files_and_another_baseline(tmp_path: Path) -> None:
    one, two = table(tmp_path / "one.csv", *SFT), table(tmp_path / "two.csv", *VACCINE)
    rows = json.loads(hbv("leaderboard", one, two, "--baseline", "vaccine", "--json").out)
    assert {row["defense"]: row["harmful_score_difference"] for row in rows} == {"sft": 15, "vaccine": None}


def test_a_replaced_row_is_told_on_stderr_in_one_sentence(tmp_path: Path) -> None:
    done = hbv("leaderboard", table(tmp_path / "one.csv", *SFT, {**SFT[0], "run": "sft-again"}), "--json")
    assert done.code == 0
    assert done.sentence.startswith("hbv: warning: Later rows")


def test_names_are_no_markup(tmp_path: Path) -> None:
    odd = result("a:x=[/b]|<i>", 0, 1, model="m[red]")
    ranking = only(tmp_path, odd)
    assert r"a:x=[/b]\|&lt;i>" in rankings_markdown([ranking])
    shown = hbv("leaderboard", tmp_path / "one.csv").out
    assert "a:x=[/b]|<i>" in shown
    assert "m[red]" in shown


def broken(tmp_path: Path, column: str, value: str) -> Path:
    """A CSV of results with one cell changed by hand."""
    path = table(tmp_path / "broken.csv", *SFT)
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
def test_a_spoilt_cell_is_refused(column: str, value: str, tmp_path: Path) -> None:
    path = broken(tmp_path, column, value)
    done = hbv("leaderboard", path)
    assert (done.code, done.out) == (2, "")
    assert f"{path} is no CSV of results, its column {column!r}" in done.sentence


@pytest.mark.parametrize("flag", ["", "--json"])
def test_bad_input(flag: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("my,own\n1,2\n")
    (tmp_path / "empty.csv").touch()
    good, flags = table(tmp_path / "good.csv", *SFT), [flag] if flag else []
    for args, said in {
        (): f"There is no CSV of results {tmp_path / 'home' / 'results.csv'}",
        (good, tmp_path / "no.csv"): f"There is no CSV of results {tmp_path / 'no.csv'}",
        (good, tmp_path / "mine.csv"): f"{tmp_path / 'mine.csv'} has other columns",
        (tmp_path,): f"{tmp_path} cannot be read",
        (tmp_path / "empty.csv",): "There are no results in",
        (good, "--out", good / "x"): f"{good / 'x'} cannot be written to",
    }.items():
        done = hbv("leaderboard", *args, *flags)
        assert (done.code, done.out) == (2, ""), args
        assert said in done.sentence


def test_an_empty_file_beside_a_full_one_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    full = table(tmp_path / "full.csv", *SFT, *VACCINE)
    assert tidy(rankings([tmp_path / "empty.csv", full])).equals(tidy(rankings([full])))


# ---------------------------------------------------------------------------------------------------------------------
# The committed table


def test_the_committed_table_is_whole_and_ranks_as_committed() -> None:
    """All defenses, three ratios, two seeds, one protocol; the Markdown beside it is what the command makes of it."""
    folder = Path(__file__).parents[1] / "leaderboards"
    rows = check_columns(folder / "testbed.csv")
    names = {row["defense"] for row in rows}
    assert len(names) == 21
    assert names <= set(DEFENSES.entries())
    cells = {(row["defense"], row["attack"], row["seed"]) for row in rows}
    ratios = ("ratio=0", "ratio=0.1", "ratio=0.2")
    assert cells == {(name, ratio, seed) for name in names for ratio in ratios for seed in "01"}
    assert len(rows) == len(cells)
    assert len({row["protocol_hash"] for row in rows}) == 1
    assert rankings_markdown(rankings([folder / "testbed.csv"])) == (folder / "testbed.md").read_text(encoding="utf-8")
