"""Published figures: completeness of the copies, recomputed averages, and the `hbv published` command."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harmbench_vaccine.reporting.published import figures
from harmbench_vaccine.reporting.published.figures import Average, Figure, check_averages, find_averages, load_figures
from support.cli import HBV, hbv

FOLDER = Path(__file__).parents[1] / "leaderboards" / "published"
COLUMNS = [
    *("protocol", "paper", "arxiv", "venue", "table", "model", "task", "sweep", "sweep_value", "harmful_ratio"),
    *("samples", "defense", "metric", "value", "unit", "evidence", "note"),
]
FILTERS = ["paper", "protocol", "model", "task", "defense", "metric"]
ROWS = load_figures()


def rows_in_file(name: str) -> list[dict[str, str]]:
    """Read a CSV of the checkout without the package."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def test_all_figures_are_loaded() -> None:
    assert rows_in_file("results.csv") == ROWS
    assert len(ROWS) == 2729
    assert list(ROWS[0]) == COLUMNS
    assert Counter(row["protocol"] for row in ROWS) == {
        "lisa": 469,
        "asft": 378,
        "sldr": 316,
        "vaccine_paper": 288,
        "nlsr": 196,
        "antidote": 192,
        "patcher_adaptive_attacks": 176,
        "virus": 170,
        "third_party_transcribed": 160,
        "repnoise": 123,
        "booster": 115,
        "antidote_bilevel_2509.08000": 94,
        "qi": 52,
    }
    assert figures.load_table("overhead.csv") == rows_in_file("overhead.csv")
    assert Counter(row["paper"] for row in rows_in_file("overhead.csv")) == {"Vaccine": 36, "Lisa": 8, "Panacea": 8}


def test_figures_are_unique() -> None:
    """Key columns: all but value, unit, evidence and note; of overhead.csv all but value, unit and note."""
    described = ("value", "unit", "evidence", "note")
    for name in ("results.csv", "overhead.csv"):
        keys = [tuple(text for column, text in row.items() if column not in described) for row in rows_in_file(name)]
        assert [key for key, count in Counter(keys).items() if count > 1] == []


def test_every_value_is_a_number_within_its_unit() -> None:
    highest = {"%": 100, "mean classifier probability 0-1": 1, "0-1": 1, "cos": 1, "1-5": 5, "nats": 1, "s": 3600}
    assert {row["unit"] for row in ROWS} == set(highest)
    for row in [*ROWS, *rows_in_file("overhead.csv")]:
        assert re.fullmatch(r"\d+(\.\d+)?", row["value"]), row
    for row in ROWS:
        assert (1 if row["unit"] == "1-5" else 0) <= float(row["value"]) <= highest[row["unit"]], row


def test_known_cells_of_papers() -> None:
    """Single cells show that the columns are not shifted."""
    at = {(row["protocol"], row["table"], row["defense"], row["metric"], row["sweep_value"]): row for row in ROWS}
    for key, value in {
        ("vaccine_paper", "Table 1", "SFT", "HS", "clean"): "48.60",
        ("vaccine_paper", "Table 1", "Vaccine", "HS", "0.1"): "48.20",
        ("vaccine_paper", "Table 7", "Vaccine-random-perturbation", "HS", "1"): "16.60",
        ("vaccine_paper", "Table 7", "Vaccine-random-perturbation", "FA", "1"): "46.60",
        ("lisa", "Table 3", "SFT", "HS", "clean"): "34.60",
        ("booster", "Table 1", "SFT", "HS", "clean"): "1.30",
    }.items():
        assert at[key]["value"] == value
    steps = {
        (row["defense"], row["quantity"]): row["value"]
        for row in rows_in_file("overhead.csv")
        if row["table"] == "Table 5" and row["model"] == "Llama2-7B"
    }
    assert steps == {
        ("SFT", "step_time"): "0.37",
        ("Vaccine", "step_time"): "0.73",
        ("SFT", "gpu_memory"): "38.45",
        ("Vaccine", "gpu_memory"): "38.57",
    }


def test_readme_counts_match_the_files() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = {
        grade: int(count.replace(",", ""))
        for grade, count in re.findall(r"^\| `([^`]+)`[^|]* \| ([\d,]+) \|$", text, re.MULTILINE)
    }
    assert listed == Counter(row["evidence"] for row in ROWS)
    assert list(listed) == list(figures.EVIDENCE)
    assert f"`results.csv` has {len(ROWS):,} figures of {len({row['paper'] for row in ROWS})} papers" in text
    assert f"`overhead.csv` {len(rows_in_file('overhead.csv'))} of time" in text
    outcome = check_averages(find_averages(ROWS))
    counts = f"Of {outcome['averages']} averages, {outcome['follow']} follow within rounding, and "
    assert f"{counts}{len(outcome['not_checkable'])} cannot be checked" in " ".join(text.split())
    described = {name for line in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for name in line.split("`")[1::2]}
    assert set(COLUMNS) <= described


def test_files_have_no_machine_paths() -> None:
    for file in FOLDER.iterdir():
        if file.is_file():
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|mnt|data|Users)\b", file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Averages in papers

WRONG = {
    ("Vaccine", "Table 1", "VLGuard", "HS"): ("60.20", 52.28, "49.40 50.00 54.00 54.40 53.60"),
    ("Vaccine", "Table 1", "KL", "FA"): ("59.08", 85.32, "85.80 85.80 85.00 85.40 84.60"),
    ("AsFT", "Table 2", "BEA", "HS"): ("14.80", 15.0, "4.80 15.80 16.40 21.60 16.40"),
    ("AsFT", "Table 3", "BEA", "HS"): ("12.68", 12.88, "13.60 16.40 9.20 11.20 14.00"),
    ("AsFT", "Table 3", "BEA", "FA"): ("81.64", 81.74, "76.50 84.40 83.70 81.00 83.10"),
    ("AsFT", "Table 4", "AsFT", "HS"): ("6.70", 5.6, "4.00 1.60 14.40 2.40"),
    ("AsFT", "Table 5", "BEA", "HS"): ("17.05", 17.3, "7.20 16.40 38.80 6.80"),
    ("AntiDote (bi-level)", "Table 1", "Booster", "FA"): ("65.8", 65.675, "75.0 34.3 85.4 68.0"),
    ("AntiDote (bi-level)", "Table 1", "Vaccine", "HS"): ("8.4", 8.25, "8.5 7.9 8.5 8.1"),
}
"""Paper, table, defense, metric -> the printed average, the mean of the cells, the cells; recomputed by hand.

Only the first two are compared with the paper."""


def wrong_averages(*args: str) -> dict[tuple[str, ...], tuple[str, float, str]]:
    """Run `hbv published --check --json` and return its list in the form of WRONG."""
    done = hbv("published", "--check", "--json", *args)
    assert (done.code, done.err) == (0, "")
    return {
        tuple(entry[key] for key in ("paper", "table", "defense", "metric")): (
            entry["printed"],
            entry["recomputed"],
            " ".join(cell["printed"] for cell in entry["cells"]),
        )
        for entry in json.loads(done.out)["do_not_follow"]
    }


def test_two_averages_of_table_1_of_vaccine_do_not_follow() -> None:
    """The table has twelve averages of five cells."""
    assert wrong_averages("--paper", "Vaccine") == {key: values for key, values in WRONG.items() if key[0] == "Vaccine"}
    first = [
        average
        for average in find_averages(ROWS)
        if (average.figure["paper"], average.figure["table"]) == ("Vaccine", "Table 1")
    ]
    assert len(first) == 12
    for average in first:
        assert [cell["sweep_value"] for cell in average.parts] == ["clean", "0.01", "0.05", "0.1", "0.2"]


def test_nine_averages_of_all_papers_do_not_follow() -> None:
    assert wrong_averages() == WRONG


def test_recomputed_means_are_the_means_of_the_listed_cells() -> None:
    """Check the pinned numbers without the package."""
    for printed, recomputed, cells in WRONG.values():
        values = [float(cell) for cell in cells.split()]
        assert sum(values) / len(values) == pytest.approx(recomputed, abs=1e-9)
        assert abs(recomputed - float(printed)) > 0.09


def test_plain_recomputation_agrees() -> None:
    """Recompute in floats over all figures of the same paper, table, defense and metric, without the package."""

    def half(text: str) -> float:
        return 0.5 * 10 ** -len(text.partition(".")[2])

    wrong = set()
    keys = ("protocol", "paper", "table", "sweep", "defense", "metric")
    for row in ROWS:
        if row["sweep_value"] == "average" and row["protocol"] + row["table"] != "antidote_bilevel_2509.08000Table 6":
            same = [cell for cell in ROWS if all(cell[key] == row[key] for key in keys)]
            texts = [cell["value"] for cell in same if cell["sweep_value"] != "average"]
            assert len(same) == len(texts) + 1 >= 4
            slack = half(row["value"]) + sum(map(half, texts)) / len(texts) + 1e-9
            if abs(sum(map(float, texts)) / len(texts) - float(row["value"])) > slack:
                wrong.add((row["paper"], row["table"], row["defense"], row["metric"]))
    assert wrong == set(WRONG)


def test_averages_that_cannot_be_checked() -> None:
    missing = [average for average in find_averages(ROWS) if average.missing]
    assert Counter((average.figure["paper"], average.figure["table"], average.missing) for average in missing) == {
        ("AntiDote (bi-level)", "Table 6", "a column is omitted according to its note"): 4,
        ("AntiDote (bi-level)", "Table 6", "none of its cells is recorded"): 4,
        ("Antibody", "cross-dataset average", "none of its cells is recorded"): 5,
        ("CTRAP", "Table 1", "none of its cells is recorded"): 6,
    }


def test_complete_averages_have_one_part_per_swept_value() -> None:
    complete = [average for average in find_averages(ROWS) if not average.missing]
    assert len(complete) == 280
    for average in complete:
        swept = [cell["sweep_value"] for cell in average.parts]
        assert len(swept) == len(set(swept)) >= 3
        assert "average" not in swept


# ---------------------------------------------------------------------------------------------------------------------
# Averages by hand


def figure(sweep_value: str, value: str, **changes: str) -> Figure:
    """Return a figure of a table that sweeps p."""
    ratio = "" if sweep_value == "average" else sweep_value
    row = dict.fromkeys(COLUMNS, "") | {
        "protocol": "example",
        "paper": "Example",
        "table": "Table 1",
        "model": "M",
        "task": "SST2",
        "sweep": "p",
        "sweep_value": sweep_value,
        "harmful_ratio": ratio,
        "samples": "100",
        "defense": "SFT",
        "metric": "HS",
        "value": value,
        "unit": "%",
        "evidence": "paper text",
    }
    return row | changes


def table_row(cells: str, average: str, **changes: str) -> list[Figure]:
    """Return a row of a paper's table: p = 0.1, 0.2, ... and the average."""
    values = cells.split()
    return [
        *[figure(f"0.{place}", value, **changes) for place, value in enumerate(values, 1)],
        figure("average", average, **changes),
    ]


def only(*rows: Figure) -> Average:
    (average,) = find_averages(rows)
    return average


def test_right_and_wrong_average_in_a_file(tmp_path: Path) -> None:
    rows = [*table_row("10.00 20.00 60.00", "30.00"), *table_row("10.00 20.00 60.00", "31.00", metric="FA")]
    path = tmp_path / "results.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    read = figures.load_csv(path)
    assert read == rows
    outcome = check_averages(find_averages(read))
    assert (outcome["averages"], outcome["follow"], outcome["not_checkable"]) == (2, 1, [])
    (wrong,) = outcome["do_not_follow"]
    assert (wrong["metric"], wrong["printed"], wrong["recomputed"], wrong["holds"]) == ("FA", "31.00", 30.0, False)
    assert wrong["cells"] == [
        {"sweep_value": "0.1", "printed": "10.00"},
        {"sweep_value": "0.2", "printed": "20.00"},
        {"sweep_value": "0.3", "printed": "60.00"},
    ]


@pytest.mark.parametrize(
    ("cells", "average", "follows"),
    [
        ("1.00 1.00 1.01", "1.00", True),
        ("1.00 1.00 1.01", "1.01", True),  # 0.0067 away; half a unit of both is 0.01
        ("1.00 1.00 1.00", "1.01", True),  # just at the limit
        ("1.00 1.00 1.00", "1.011", False),  # 0.011 away, 0.0055 allowed
        ("1.00 1.00 1.00", "1.02", False),
        ("1.00 1.00 1.00", "0.98", False),
        ("1.0 1.0 1.0", "1.05", True),  # 0.05 of the cells
        ("1.0 1.0 1.0", "1.06", False),
        ("1.00 1.00 1.00", "1.0", True),
        ("1.00 1.00 1.00", "1.1", False),  # 0.1 away, 0.055 allowed
        ("1.05 1.05 1.06", "1.1", True),  # 0.0467 away
        ("1 2 2", "1.67", True),
        ("1 2 2", "2", True),
        ("1 2 2", "3", False),
        ("0.1 0.1 0.1 0.1 0.1 0.1 0.1", "0.1", True),
    ],
)
def test_rounding_explains_half_a_unit_of_the_average_and_of_the_parts(cells: str, average: str, follows: bool) -> None:
    recomputed = only(*table_row(cells, average))
    assert recomputed.missing == ""
    assert recomputed.follows is follows


def test_parts_share_protocol_paper_table_defense_metric_and_setting() -> None:
    row = table_row("10.00 20.00", "15.00")
    decoys = [
        figure("0.9", "99.00", **{column: "other"})
        for column in ("protocol", "paper", "table", "sweep", "defense", "metric", "model", "task", "samples")
    ]
    average = only(*row, *decoys[:4], *decoys[6:])
    assert (average.mean, average.missing) == (Decimal(15), "")
    # a different defense or metric has a cell that this row lacks
    assert {only(*row, decoy).missing for decoy in decoys[4:6]} == {"not recorded: 0.9"}


@pytest.mark.parametrize("swept", ["model", "task", "samples"])
def test_average_over_a_different_column(swept: str) -> None:
    """The swept column of the average is empty or has the word average."""
    cells = [figure(name, value, sweep=swept, **{swept: name}) for name, value in {"A": "10.0", "B": "30.0"}.items()]
    for text in ("", "average of A and B"):
        average = figure("average", "20.0", sweep=swept, **{swept: text})
        assert [cell["value"] for cell in only(average, *cells).parts] == ["10.0", "30.0"]


def test_average_named_only_by_its_task_has_no_parts_in_further_tables() -> None:
    rows = table_row("10.00 20.00", "15.00")
    rows.append(figure("", "18.00", table="cross-dataset", sweep="", task="average of datasets"))
    first, second = find_averages(rows)
    assert (first.missing, second.missing) == ("", "none of its cells is recorded")


def test_averages_with_missing_parts_are_not_checked() -> None:
    short = table_row("10.00 20.00", "31.00", defense="Vaccine")
    full = table_row("10.00 20.00 60.00", "30.00")
    noted = table_row("10.00 20.00", "15.00", table="Table 2", note="p=0.3 column omitted")
    bare = figure("average", "3.00", table="Table 3")
    outcome = check_averages(find_averages([*short, *full, *noted, bare]))
    assert (outcome["averages"], outcome["follow"], outcome["do_not_follow"]) == (4, 1, [])
    assert [(entry["table"], entry["missing"]) for entry in outcome["not_checkable"]] == [
        ("Table 1", "not recorded: 0.3"),
        ("Table 2", "a column is omitted according to its note"),
        ("Table 3", "none of its cells is recorded"),
    ]
    assert not any("recomputed" in entry or "holds" in entry for entry in outcome["not_checkable"])


def test_metric_that_is_a_mean_is_not_an_average() -> None:
    assert find_averages([figure("0.1", "0.5", metric="mean_harmfulness_score", table="average table")]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Command


def listed(*args: object) -> list[dict[str, Any]]:
    done = hbv("published", *args, "--json")
    assert (done.code, done.err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(done.out)
    return rows


def of(**columns: str) -> list[str]:
    """Return the values of the figures in the file that have these column values."""
    return [row["value"] for row in ROWS if all(row[column] == value for column, value in columns.items())]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("paper", "AntiDote (bi-level)"),
        ("protocol", "booster"),
        ("model", "Gemma2-9B"),
        ("task", "AGNEWS"),
        ("defense", "SFT"),
        ("metric", "leakage_ratio"),
    ],
)
def test_filter_lists_exactly_the_matching_figures(column: str, value: str) -> None:
    rows = listed(f"--{column}", value)
    assert {row[column] for row in rows} == {value}
    assert [row["printed"] for row in rows] == of(**{column: value}) != []


def test_filters_narrow_and_repeated_filters_add() -> None:
    rows = listed("--paper", "Vaccine", "--metric", "HS", "--defense", "SFT", "--defense", "Vaccine")
    both = [of(paper="Vaccine", metric="HS", defense=name) for name in ("SFT", "Vaccine")]
    assert len(rows) == sum(map(len, both)) > 20
    assert {(row["paper"], row["metric"]) for row in rows} == {("Vaccine", "HS")}
    assert Counter(row["defense"] for row in rows) == {"SFT": len(both[0]), "Vaccine": len(both[1])}
    assert listed("--paper", "Vaccine", "--model", "Mistral-7B") == []
    assert "No figure matches all filters." in hbv("published", "--paper", "Vaccine", "--model", "Mistral-7B").out


def test_case_matters_only_between_names() -> None:
    assert listed("--task", "sst2") == listed("--task", "SST2")
    both = [listed("--defense", name) for name in ("Antidote", "AntiDote")]
    assert [{row["defense"] for row in rows} for rows in both] == [{"Antidote"}, {"AntiDote"}]
    done = hbv("published", "--defense", "ANTIDOTE")
    assert (done.code, done.out) == (2, "")
    assert "Unknown defense 'ANTIDOTE'. Did you mean 'AntiDote' or 'Antidote'?" in done.sentence


@pytest.mark.parametrize("flag", ["", "--json", "--check"])
@pytest.mark.parametrize(
    ("column", "wrong", "near"),
    [
        ("paper", "Vacine", "Vaccine"),
        ("protocol", "vaccine-paper", "vaccine_paper"),
        ("model", "Lama2-7B", "Llama2-7B"),
        ("task", "sst-2", "SST2"),
        ("defense", "boster", "Booster"),
        ("metric", "leakage", "leakage_ratio"),
    ],
)
def test_unknown_name_suggests_the_nearest(column: str, wrong: str, near: str, flag: str) -> None:
    done = hbv("published", f"--{column}", wrong, *([flag] if flag else []))
    assert (done.code, done.out) == (2, "")
    assert f"Unknown {column} {wrong!r}. Did you mean {near!r}? Allowed: " in done.sentence
    allowed = done.sentence.partition("Allowed: ")[2]
    values = {row[column] for row in ROWS} - {""}
    if len(values) <= 60:
        assert all(value in allowed for value in values)
    else:
        assert near in allowed
        assert allowed.endswith(f"and {len(values) - 12} more.")


def test_json_has_numbers_and_printed_texts() -> None:
    (row,) = listed("--paper", "T-Vaccine", "--metric", "HS")
    (same,) = [row for row in ROWS if (row["paper"], row["metric"]) == ("T-Vaccine", "HS")]
    assert row == {**same, "value": float(same["value"]), "printed": same["value"]}
    assert [row["printed"] for row in listed("--limit", 3)] == [row["value"] for row in ROWS[:3]]
    assert len(listed("--paper", "Lisa")) == 469


def test_terminal_lists_one_table_per_protocol_and_paper() -> None:
    done = hbv("published", "--metric", "HS", "--defense", "KL", "--defense", "BSO", "--limit", 500)
    assert (done.code, done.err) == (0, "")
    lisa, vaccine = done.out.split("Protocol ")[1:]
    assert lisa.startswith("lisa: Lisa (2405.18641, NeurIPS 2024)\n")
    assert vaccine.startswith("vaccine_paper: Vaccine (2402.01109, NeurIPS 2024)\n")
    for part, paper, defense in ((lisa, "Lisa", "BSO"), (vaccine, "Vaccine", "KL")):
        shown = [line.split() for line in part.splitlines() if f" {defense} " in line]
        assert [words[words.index("HS") + 1] for words in shown] == of(paper=paper, defense=defense, metric="HS")
    assert "p=average" in vaccine
    assert "never compare across protocols" in vaccine
    # papers of the collection third_party_transcribed have separate tables too
    done = hbv("published", "--protocol", "third_party_transcribed", "--metric", "HS", "--limit", 500)
    assert done.out.count("Protocol third_party_transcribed: ") == 6


def test_notes_are_printed_below_with_their_marks() -> None:
    done = hbv("published", "--paper", "Vaccine", "--defense", "KL", "--metric", "FA")
    marked = [line for line in done.out.splitlines() if line.rstrip().endswith("[1]")]
    assert len(marked) == 1
    assert "p=average" in marked[0]
    assert "59.08" in marked[0]
    assert any(line.startswith("[1] AS PRINTED; inconsistent") for line in done.out.splitlines())


def test_names_and_notes_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    row = figure("0.1", "1.0", defense="[red]D", paper="[red]P", note="[red]N")
    average = figure("average", "9.0", defense="[red]D", paper="[red]P", note="[red]N")
    Console(width=200).print(figures.figures_table([row], 1))
    Console(width=200).print(figures.check_view(check_averages(find_averages([row, average]))))
    Console(width=200).print(figures.summary_view(figures.summarize_figures([row], 0)))
    output = capsys.readouterr().out
    assert (output.count("[red]D"), output.count("[red]P"), output.count("[red]N")) == (2, 3, 1)


def test_default_limit_is_forty() -> None:
    def shown(*args: object) -> int:
        return sum(" paper text " in f"{line} " for line in hbv("published", "--paper", "Lisa", *args).out.splitlines())

    assert (shown(), shown("--limit", 7), shown("--limit", 500)) == (40, 7, 469)
    assert "40 of 469 figures; --limit shows more." in hbv("published", "--paper", "Lisa").out
    assert "469 of 469 figures. " in hbv("published", "--paper", "Lisa", "--limit", 500).out


def test_summary_without_a_filter() -> None:
    done = hbv("published")
    assert (done.code, done.err) == (0, "")
    assert len(done.out.splitlines()) < 80
    assert "2729 figures of 24 papers under 13 protocols; 52 more" in done.out
    assert "paper text (OCR) 512" in done.out
    summary = json.loads(hbv("published", "--json").out)
    assert (summary["figures"], summary["overhead_figures"]) == (2729, 52)
    assert summary["protocols"] == Counter(row["protocol"] for row in ROWS)
    assert list(summary["evidence"].items()) == [(grade, len(of(evidence=grade))) for grade in figures.EVIDENCE]
    assert {(entry["protocol"], entry["paper"]): entry["figures"] for entry in summary["papers"]} == Counter(
        (row["protocol"], row["paper"]) for row in ROWS
    )
    for entry in summary["papers"]:
        assert entry["paper"] in done.out
        assert sum(entry["evidence"].values()) == entry["figures"]


def test_check_in_the_terminal() -> None:
    done = hbv("published", "--check")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert sum(" Table " in line for line in lines) == len(WRONG)
    for expected in (
        "Vaccine Table 1 VLGuard HS 60.20 52.28 +7.92 clean: 49.40, 0.01: 50.00, 0.05: 54.00, 0.1: 54.40, 0.2: 53.60",
        "Vaccine Table 1 KL FA 59.08 85.32 -26.24 clean: 85.80,",
        "AntiDote (bi-level) Table 1 Booster FA 65.8 65.675 +0.125 MMLU: 75.0,",
        "AsFT Table 2 BEA HS 14.80 15.00 -0.20 clean: 4.80,",
    ):
        assert sum(line.startswith(expected) for line in lines) == 1, expected
    text = " ".join(done.out.split())
    assert "299 printed averages: 271 follow from their cells within rounding, 9 do not, 19 cannot be checked" in text
    assert "15: none of its cells is recorded" in text


def test_check_of_a_paper_without_averages_or_errors() -> None:
    assert "0 printed averages: 0 follow" in hbv("published", "--check", "--paper", "RepNoise").out
    virus = hbv("published", "--check", "--paper", "Virus").out
    assert virus.startswith("24 printed averages: 24 follow from their cells within rounding, 0 do not, 0 cannot")


def test_check_refuses_a_limit() -> None:
    done = hbv("published", "--check", "--limit", 3)
    assert (done.code, done.out) == (2, "")
    assert "--limit" in done.sentence


def test_help_has_an_example_and_every_filter() -> None:
    done = hbv("published", "--help")
    assert "Example: hbv published" in done.out
    assert all(f"--{column} NAME" in done.out for column in FILTERS)


def test_light_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *HBV[1:], "published", "--paper", "Vaccine"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "rich" in imported or "rich.table" in imported
    assert not imported & {"torch", "transformers", "peft", "pandas", "scipy", "numpy"}
