"""The worst case over the settings of the user, from results written by hand."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import read_csv, result_rows
from harmbench_vaccine.reporting.leaderboard.files import write_tables
from harmbench_vaccine.reporting.leaderboard.ranking import rank_rows
from harmbench_vaccine.reporting.leaderboard.worst_case import settings_grids, settings_grids_view
from support.cli import hbv
from support.results import collapsed, make_result, write_csv


def run(defense: str, lr: float | None, score: float, seed: int = 0, **changes: Any) -> Result:
    """Return the result of a defense under `ratio=0.1`, at a learning rate of the user."""
    settings = {"optimizer": {"lr": lr, "epochs": None, "full": False}} if lr else {}
    return make_result(
        **{
            "defense": defense,
            "defense_params": {defense: {}},
            "attack": f"optimizer={lr:g}+ratio=0.1" if lr else "ratio=0.1",
            "attack_params": {**settings, "ratio": {"p": 0.1}},
            "seed": seed,
            "harmful_score": score,
            **changes,
        }
    )


def test_worst_point_of_each_defense() -> None:
    """Means over seeds, largest over learning rates: sft 15 and 30, vaccine 20 and 10; the fixed runs do not count."""
    rankings = rank_rows(
        result_rows(
            [
                run("sft", None, 99),
                run("vaccine", None, 99),
                *(run("sft", 1e-5, score, seed) for seed, score in enumerate((10, 20))),
                *(run("sft", 1e-4, score, seed) for seed, score in enumerate((20, 40))),
                run("vaccine", 1e-5, 20),
                run("vaccine", 1e-4, 10),
            ]
        )
    )
    (grid,) = settings_grids(rankings)
    assert [(case.row["defense"], round(case.row["harmful_score"], 6), case.points) for case in grid.worst] == [
        ("vaccine", 20, 2),
        ("sft", 30, 2),
    ]
    console = Console(file=StringIO(), width=100)
    console.print(settings_grids_view([grid]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Worst of 2 settings of the user: ratio:p=0.1 on sst2" in text
    assert "lr=1e-05" in text
    assert "99" not in text


def test_points_that_do_not_count() -> None:
    rankings = rank_rows(
        result_rows(
            [
                run("sft", 1e-5, 10),
                run("sft", 1e-4, 20),
                run("sft", 1e-3, 90, **collapsed("80% of answers are empty")),
                run("ewc", 1e-3, 0, **collapsed("80% of answers are empty")),
                run("vaccine", 1e-4, 5),
            ]
        )
    )
    (grid,) = settings_grids(rankings)
    assert {case.row["defense"]: case.row["harmful_score"] for case in grid.worst} == {"sft": 20, "vaccine": 5}
    assert grid.without == ("ewc",)
    assert grid.notes[1:] == [
        "vaccine: 1 of 3 settings count; 0 have a collapsed or hollow run, 2 have no result.",
        "sft: 2 of 3 settings count; 1 have a collapsed or hollow run, 0 have no result.",
        "ewc: every setting has a collapsed or hollow run.",
    ]


def test_grids_are_separate_for_each_place_and_attack() -> None:
    results = [
        run("sft", lr, 10, protocol_hash=protocol, attack_params={"optimizer": {"lr": lr}, "ratio": {"p": ratio}})
        for lr in (1e-5, 1e-4)
        for protocol in ("aa11", "bb22")
        for ratio in (0.1, 0.2)
    ]
    assert len(settings_grids(rank_rows(result_rows(results)))) == 4


def test_one_point_is_not_a_grid() -> None:
    assert settings_grids(rank_rows(result_rows([run("sft", 1e-5, 10), run("sft", None, 10)]))) == []


def test_leaderboard_ends_with_the_worst_case(tmp_path: Path) -> None:
    runs = [run("sft", lr, score) for lr, score in ((None, 5), (1e-5, 10), (1e-4, 70))]
    table = write_csv(tmp_path / "runs.csv", *runs)
    done = hbv("leaderboard", table, COLUMNS="80")
    assert done.code == 0, done.err
    _, _, end = done.out.partition("Worst of 2 settings of the user")
    assert re.search(r"sft .* 70\.0 \[.*lr=0\.0001", end)
    assert max(map(len, done.out.splitlines())) <= 80
    write_tables(rank_rows(read_csv(table)), tmp_path)
    assert "| sft | 70.0 " in (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
