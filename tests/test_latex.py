"""LaTeX tables of rankings: their syntax by a small reader, and their content against numbers worked out by hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import result_rows
from harmbench_vaccine.reporting.leaderboard.costs import COST_COLUMNS, cost_tables
from harmbench_vaccine.reporting.leaderboard.latex import costs_latex, latex_text, rankings_latex
from harmbench_vaccine.reporting.leaderboard.ranking import Ranking, rank_results, rank_rows
from harmbench_vaccine.reporting.leaderboard.stage_costs import StageCost
from support.results import DEFAULTS, collapsed, make_result, write_csv

COMMANDS = {
    *("begin", "end", "centering", "small", "scriptsize", "setlength", "tabcolsep", "caption", "label", "multicolumn"),
    *("toprule", "midrule", "bottomrule", "cmidrule", "textbf", "textsuperscript", "dagger", "ddagger"),
    *("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"),
}
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|%.*|[{}&$#_^~]|[^\\%{}&$#_^~]+", re.DOTALL)


def tokens(text: str) -> list[str]:
    """Return the tokens of LaTeX: commands, escaped characters, characters with a meaning, and the text between them.

    Every token is checked: only known commands, balanced braces and `$`, and no `#`, `_`, `^` or `~` outside formulas.
    """
    parts = [part for line in text.splitlines() if not line.startswith("%") for part in TOKEN.findall(f"{line}\n")]
    depth, formula = 0, False
    for part in parts:
        depth += (part == "{") - (part == "}")
        formula ^= part == "$"
        assert depth >= 0
        assert part not in ("#", "_", "^", "~"), part
        assert not part.startswith("%"), part
        if re.fullmatch(r"\\[A-Za-z]+", part):
            assert part[1:] in COMMANDS, part
    assert depth == 0
    assert not formula
    return parts


def tables(text: str) -> list[list[list[str]]]:
    """Return the rows of each tabular as cells, and check that environments are nested and rows have every column."""
    tokens(text)
    environments: list[str] = []
    for command, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", text):
        if command == "begin":
            environments.append(name)
        else:
            assert environments.pop() == name
    assert not environments
    tabulars = re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    result = []
    for columns, body in tabulars:
        lines = re.findall(r"^(.*)\\\\(?:\[2pt\])?$", body, re.MULTILINE)
        rules = 3 + (r"\cmidrule" in body)  # the partial rules are one line
        assert len(lines) + rules == len(body.splitlines())
        rows = [re.split(r"(?<!\\)&", line) for line in lines]
        for row in rows:
            spans = (int(match[1]) if (match := re.search(r"\\multicolumn\{(\d+)\}", cell)) else 1 for cell in row)
            assert sum(spans) == len(columns)
        result.append([[cell.strip() for cell in row] for row in rows])
    return result


def result(defense: str, seed: int, hs: float, fa: float = 97.0, p: float = 0.1, **fields: Any) -> Result:
    scores = {"harmful_score": hs, "finetune_accuracy": fa, "harmful_score_n": 250, "finetune_accuracy_n": 250}
    attack = {"attack": f"ratio={p:g}", "attack_params": {"ratio": {"p": p}}}
    return make_result(defense=defense, defense_params={defense: {}}, seed=seed, **{**scores, **attack, **fields})


def rank(folder: Path, *results: Result) -> list[Ranking]:
    return rank_results([write_csv(folder / "results.csv", *results)])


HOLLOW = {"validity": {**DEFAULTS["validity"], "hollow": True}}
GRID = [
    *(result("sft", seed, hs, 98) for seed, hs in enumerate((80, 84))),
    *(result("vaccine", seed, hs, 97) for seed, hs in enumerate((78, 83))),
    *(result("lisa", seed, hs, 96) for seed, hs in enumerate((4, 8))),
    *(result("empty", seed, 0, 99, **HOLLOW) for seed in range(2)),
    *(result("dead", seed, 0, 10, **collapsed("accuracy is low")) for seed in range(2)),
    *(result(name, seed, 2, 98, 0.0) for seed in range(2) for name in ("sft", "vaccine", "lisa", "empty", "dead")),
]


def test_layout_of_the_papers(tmp_path: Path) -> None:
    """Rows are defenses in the order of the runs; pairs of columns are attacks; the last pair is the average."""
    text = rankings_latex(rank(tmp_path, *GRID))
    (table,) = tables(text)
    heads = [re.sub(r"\\multicolumn\{2\}\{c\}\{(.*)\}", r"\1", cell) for cell in table[0]]
    assert heads == ["", "$p = 0$", "$p = 0.1$", "average"]
    assert table[1] == ["Defense", *["HS", "FA"] * 3]
    assert [row[0] for row in table[2::2]] == ["sft", "vaccine", "lisa", "empty", "dead"]
    assert r"\begin{table}[t]" in text
    assert text.startswith("% ")


def test_best_scores_tie_groups_and_marks(tmp_path: Path) -> None:
    """sft and vaccine differ by 1.5 points, lisa by 76; `empty` and `dead` have no rank and cannot be the best."""
    (table,) = tables(rankings_latex(rank(tmp_path, *GRID)))
    rows = {row[0]: row for row in table[2::2]}
    assert rows["lisa"][3:5] == [r"\textbf{6.0}\textsuperscript{a}", "96.0"]
    assert rows["vaccine"][3:5] == [r"80.5\textsuperscript{b}", "97.0"]
    assert rows["sft"][3:5] == [r"82.0\textsuperscript{b}", r"\textbf{98.0}"]
    assert rows["empty"][3:5] == [r"0.0\textsuperscript{$\ddagger$}", "99.0"]
    assert rows["dead"][3:5] == [r"0.0\textsuperscript{$\dagger$}", "10.0"]
    assert rows["lisa"][5:] == [r"\textbf{4.0}", "97.0"]
    assert rows["sft"][5:] == ["42.0", r"\textbf{98.0}"]
    assert rows["empty"][5] == r"1.0\textsuperscript{$\ddagger$}"


def test_intervals_are_rounded_outward(tmp_path: Path) -> None:
    """A printed interval contains the computed one, and is never a point."""
    rankings = rank(tmp_path, *GRID)
    (table,) = tables(rankings_latex(rankings))
    intervals = dict(zip((row[0] for row in table[2::2]), table[3::2], strict=True))
    for row in rankings[1].rows:
        for column, score in ((3, "harmful_score"), (4, "finetune_accuracy")):
            match = re.fullmatch(r"\{\\scriptsize \[(\d+), (\d+)\]\}", intervals[row["defense"]][column])
            assert match
            low, high = map(int, match.groups())
            assert low <= row[f"{score}_low"] < low + 1
            assert high - 1 < row[f"{score}_high"] <= high
            assert low < high
    assert all(row[0] == "" for row in table[3::2])


def test_an_absent_cell_has_no_average(tmp_path: Path) -> None:
    (table,) = tables(rankings_latex(rank(tmp_path, *GRID, result("new", 0, 1, 99, 0.0))))
    row = next(row for row in table if row[0] == "new")
    assert row[3:] == ["--"] * 4


def test_tasks_are_columns_under_one_attack(tmp_path: Path) -> None:
    runs = [result(name, 0, 50, task=task) for task in ("sst2", "agnews", "gsm8k") for name in ("sft", "vaccine")]
    (table,) = tables(rankings_latex(rank(tmp_path, *runs)))
    assert [cell.split("{")[-1].rstrip("}") for cell in table[0][1:]] == ["agnews", "gsm8k", "sst2", "average"]


def test_one_table_per_task_and_place(tmp_path: Path) -> None:
    """Two tasks with two attacks each give two tables; scores of another protocol are in a table of their own."""
    runs = [result("sft", 0, 50, p=p, task=task) for p in (0.0, 0.1) for task in ("sst2", "agnews")]
    text = rankings_latex(rank(tmp_path, *runs, result("sft", 0, 50, protocol_hash="bb22")))
    assert len(tables(text)) == 3
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == 3


def test_many_columns_are_divided(tmp_path: Path) -> None:
    runs = [result("sft", 0, 50, p=number / 10) for number in range(8)]
    text = rankings_latex(rank(tmp_path, *runs))
    first, second = tables(text)
    assert (len(first[1]), len(second[1])) == (1 + 12, 1 + 4 + 2)
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == 2
    assert text.count(r"\begin{table*}") == 1


def test_missing_runs_are_in_the_caption(tmp_path: Path) -> None:
    assert "; 10 of 12 runs." in rankings_latex(rank(tmp_path, *GRID), "10 of 12 runs")


NAME = r"\input{x} & 50% #1 $a_b^c$ ~[y] <z> -- \\"


def test_hostile_names(tmp_path: Path) -> None:
    runs = [result("sft", 0, 50), make_result(defense=NAME, attack="ratio=0.1", task="a_b", model="{", seed=0)]
    for table in tables(rankings_latex(rank(tmp_path, *runs))):
        assert len(table) == 4


def costs_of(name: str) -> str:
    """Return the LaTeX of a defense that takes 3 s instead of the 2 s of sft for 10 steps."""
    runs = [make_result(defense=defense, seed=0) for defense in ("sft", name)]
    costs = [
        StageCost(
            run=run.run,
            defense=run.defense,
            attack=run.attack,
            task=run.task,
            seed=0,
            stage="align",
            acts=True,
            seconds=seconds,
            steps=10,
            passes="2F 2B",
            seconds_per_step=seconds / 10,
            harmful_rows=24,
            device="cpu",
        )
        for run, seconds in zip(runs, (2.0, 3.0), strict=True)
    ]
    return costs_latex(cost_tables(rank_rows(result_rows(runs)), costs))


def test_costs() -> None:
    text = costs_of("vaccine")
    (table,) = tables(text)
    assert table[0] == [latex_text(column.title) for column in COST_COLUMNS]
    assert table[2] == ["vaccine", "align", "10", "2F 2B", "0.3 (1.50x)", "3 s (1.50x)", "3 s (1.50x)", "-", "24", "-"]
    assert r"\caption{Cost of training, base on cpu (protocol tiny aa11). Medians over 1 run of a defense." in text


def test_costs_of_hostile_names() -> None:
    (table,) = tables(costs_of(NAME))
    assert len(table) == 3


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_tables_compile(tmp_path: Path) -> None:
    runs = [*GRID, *(result(NAME, 0, 50, p=number / 10) for number in range(8))]
    (tmp_path / "leaderboard.tex").write_text(rankings_latex(rank(tmp_path, *runs)), encoding="utf-8")
    (tmp_path / "costs.tex").write_text(costs_of(NAME), encoding="utf-8")
    inputs = r"\input{leaderboard}\input{costs}"
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", document]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@given(st.text(max_size=40))
def test_any_text_can_be_printed(text: str) -> None:
    written = latex_text(text)
    tokens(written)
    assert not re.search(r"(?<!\\)[&%]", written)
    assert "\n" not in written


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("tau_1 & 5%", r"tau\_1 \& 5\%"),
        ("a--b", "a-{}-b"),
        ("[x]", "{[}x{]}"),
        ("\\a{b}", r"\textbackslash{}a\{b\}"),
        ("a \n b", "a b"),
    ],
)
def test_escapes(text: str, written: str) -> None:
    assert latex_text(text) == written
