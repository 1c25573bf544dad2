"""The measured costs of defenses: medians and ratios worked out by hand, extra rows counted in the files, formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import result_rows
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.defense import ROW_KINDS
from harmbench_vaccine.reporting.leaderboard import stage_costs as stage_costs_module
from harmbench_vaccine.reporting.leaderboard.costs import CostTable, cost_rows, cost_table_text, cost_tables
from harmbench_vaccine.reporting.leaderboard.files import write_tables
from harmbench_vaccine.reporting.leaderboard.ranking import rank_rows
from harmbench_vaccine.reporting.leaderboard.stage_costs import COLUMNS, StageCost, costs_text, read_costs, stage_costs
from harmbench_vaccine.sweeps.suite import load_suite
from harmbench_vaccine.sweeps.sweep import Sweep
from support.cli import hbv
from support.results import make_result, write_csv

MB = 10**6


def cost(run: Result, stage: str, seconds: float, *, acts: bool = False, **fields: Any) -> StageCost:
    """Return the cost of a stage with 10 steps and 100 MB, on a CPU."""
    values = {"steps": 10, "passes": "1F 1B", "peak_memory": 100 * MB, "harmful_rows": 0, "guide_rows": 0}
    values |= {"device": "cpu", "seconds_per_step": seconds / 10, **fields}
    names = {name: getattr(run, name) for name in ("run", "defense", "attack", "task", "seed")}
    return StageCost(stage=stage, seconds=seconds, acts=acts, **names, **values)


def run_of(defense: str, seed: int = 0, **fields: Any) -> Result:
    return make_result(defense=defense, defense_params={defense: {}}, seed=seed, **fields)


def tables_of(*costs: StageCost, runs: Sequence[Result]) -> list[CostTable]:
    return cost_tables(rank_rows(result_rows(runs)), costs)


RUNS = [run_of(defense, seed) for defense in ("sft", "vaccine", "antidote", "none") for seed in range(3)]
COSTS: list[StageCost] = []
for number, each in enumerate(RUNS):
    seed = number % 3
    if each.defense in ("sft", "antidote"):
        COSTS.append(cost(each, "align", (10, 20, 60)[seed], acts=each.defense == "sft"))
    if each.defense == "vaccine":
        memory = (120, 150, 400)[seed] * MB
        COSTS.append(cost(each, "align", (90, 30, 50)[seed], acts=True, passes="2F 2B", peak_memory=memory))
    COSTS.append(cost(each, "finetune", (8, 4, 6)[seed]))
    COSTS.append(cost(each, "answer", 1000, steps=None, seconds_per_step=None))
    if each.defense == "antidote":
        repair = {"steps": 0, "passes": "", "seconds_per_step": None, "harmful_rows": 24}
        COSTS.append(cost(each, "repair", (3, 1, 2)[seed], acts=True, **repair))


# ---------------------------------------------------------------------------------------------------------------------
# Medians


def test_medians_and_ratios() -> None:
    """align: sft 10, 20, 60 s and vaccine 90, 30, 50 s; user stage 8, 4, 6 s; totals 18, 24, 66 and 98, 34, 56 s."""
    (table,) = tables_of(*COSTS, runs=RUNS)
    rows = {(row["defense"], row["stage"]): row for row in table.rows}
    assert list(rows) == [
        ("sft", "align"),
        ("sft", "finetune"),
        ("vaccine", "align"),
        ("antidote", "repair"),
        ("none", "finetune"),
    ]
    assert {row["runs"] for row in table.rows} == {3}
    assert rows["sft", "align"]["seconds"] == 20
    assert rows["sft", "align"]["training_seconds"] == 24
    vaccine = rows["vaccine", "align"]
    assert (vaccine["seconds"], vaccine["seconds_per_step"], vaccine["training_seconds"]) == (50, 5, 56)
    assert vaccine["seconds_per_step_ratio"] == pytest.approx(2.5)
    assert vaccine["training_seconds_ratio"] == pytest.approx(56 / 24)
    assert (vaccine["peak_memory"], vaccine["peak_memory_ratio"]) == (150 * MB, 1.5)
    assert (vaccine["passes"], vaccine["steps"]) == ("2F 2B", 10)
    antidote = rows["antidote", "repair"]  # sft has no such stage
    assert (antidote["seconds"], antidote["seconds_ratio"], antidote["seconds_per_step"]) == (2, None, None)
    assert antidote["training_seconds_ratio"] == pytest.approx(25 / 24)  # 21, 25, 68 s
    assert rows["none", "finetune"]["training_seconds_ratio"] == pytest.approx(6 / 24)
    assert [antidote["harmful_rows"], vaccine["harmful_rows"]] == [24, 0]


def test_value_that_a_run_lacks_has_no_median() -> None:
    runs = [run_of("sft", seed) for seed in range(2)]
    (table,) = tables_of(cost(runs[0], "align", 1), cost(runs[1], "align", 2, peak_memory=None), runs=runs)
    (row,) = table.rows
    assert (row["seconds"], row["peak_memory"], row["peak_memory_ratio"]) == (1.5, None, None)


def test_devices_and_models_are_not_mixed() -> None:
    runs = [run_of("sft"), run_of("vaccine"), run_of("vaccine", 1), run_of("sft", model="other")]
    devices = ("cpu", "cpu", "H100", "cpu")
    costs = [cost(run, "align", 1, acts=True, device=device) for run, device in zip(runs, devices, strict=True)]
    tables = tables_of(*costs, runs=runs)
    assert [(table.setting["model"], table.setting["device"], table.baseline) for table in tables] == [
        ("base", "cpu", "sft"),
        ("base", "H100", None),
        ("other", "cpu", "sft"),
    ]
    assert tables[1].rows[0]["seconds_ratio"] is None
    assert "without the baseline" in tables[1].notes[0]


def test_costs_of_other_runs_are_left_out() -> None:
    assert tables_of(*COSTS, runs=[run_of("lisa", 7)]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Extra rows and passes


@pytest.mark.parametrize(
    ("defense", "stage", "passes", "harmful", "guides"),
    [
        ("sft", "align", "1F 1B", 0, 0),
        ("vaccine", "align", "2F 2B", 0, 0),
        ("booster", "align", "3F 3B", "pairs", 0),
        ("repnoise", "align", None, "pairs", "pairs"),
        ("lisa", "finetune", "1F 1B", 0, "alignment"),
        ("vlguard=7", "finetune", "1F 1B", 0, 7),
        ("vlguard:rows=7,mix=joint", "finetune", "2F 2B", 0, 7),
        ("vlguard=0", "finetune", "1F 1B", 0, 0),
        ("backdoor_align=5", "finetune", "1F 1B", 0, 5),
        ("vlguard=7+backdoor_align=5", "finetune", "1F 1B", 0, 12),
        ("antidote", "repair", "", "pairs", 0),
        ("realign", "repair", "", 0, "alignment"),
    ],
)
def test_extra_rows_and_passes(
    defense: str, stage: str, passes: str | None, harmful: Any, guides: Any, world: Path
) -> None:
    """The pairs are the lines of the file of refusals; the alignment rows are a number of the protocol."""
    pairs = len((world.parent / "data/beavertails_refusals/train.jsonl").read_text().splitlines())
    sizes = {"pairs": pairs, "alignment": 40}
    experiment = Experiment.settle(RunSpec(protocol=str(world), defense=parse_plugins(defense)))
    record = {"seconds": 2.0, "cached": False, "steps": 0 if stage == "repair" else 4}
    run = make_result(stages={stage: record, "answer": {"seconds": 1.0, "cached": False}})
    measured, answers = stage_costs(experiment, run)
    assert measured.acts
    assert measured.passes == passes or passes is None
    assert (measured.harmful_rows, measured.guide_rows) == (sizes.get(harmful, harmful), sizes.get(guides, guides))
    assert measured.seconds_per_step == (None if stage == "repair" else 0.5)
    assert (answers.acts, answers.passes, answers.harmful_rows, answers.guide_rows) == (False, "", 0, 0)


def test_every_kind_of_rows_is_counted() -> None:
    assert stage_costs_module._USES.keys() == ROW_KINDS.keys()


def test_rows_without_data_are_unknown(world: Path) -> None:
    absent = {"beavertails": str(world.parent / "absent")}
    experiment = Experiment.settle(RunSpec(protocol=str(world), defense=parse_plugins("booster"), data=absent))
    (measured,) = stage_costs(experiment, make_result())
    assert (measured.harmful_rows, measured.guide_rows) == (None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_costs_are_read_back(tmp_path: Path) -> None:
    costs = [*COSTS, cost(run_of("=1+1"), "align", 0.125, steps=None, peak_memory=None, harmful_rows=None)]
    (tmp_path / "costs.csv").write_text(costs_text(costs), encoding="utf-8")
    assert read_costs(tmp_path / "costs.csv") == costs
    assert read_costs(tmp_path / "absent.csv") == []
    assert costs_text(costs).splitlines()[0].split(",") == list(COLUMNS) == list(StageCost.model_fields)


def test_columns_that_an_older_version_did_not_write(tmp_path: Path) -> None:
    older = "run,defense,attack,task,seed,stage,seconds,steps,passes,seconds_per_step,peak_memory,device"
    (tmp_path / "costs.csv").write_text(f"{older}\na,sft,ratio=0,sst2,0,align,3.5,7,1F 1B,0.5,99,cpu\n")
    (measured,) = read_costs(tmp_path / "costs.csv")
    assert (measured.seconds, measured.steps, measured.acts, measured.harmful_rows) == (3.5, 7, None, None)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("seconds,", "minutes,"), "unknown column 'minutes'"),
        (("3.5", "-3.5"), "line 2, column seconds"),
        (("a,sft", "sft"), "line 2 has 7 fields"),
        (("run,", "name,"), "unknown column 'name'"),
    ],
)
def test_damaged_costs_are_refused_and_nothing_is_written(change: tuple[str, str], part: str, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "results.csv", *RUNS)
    text = "run,defense,attack,task,seed,stage,seconds,steps\na,sft,ratio=0,sst2,0,align,3.5,7\n"
    (tmp_path / "costs.csv").write_text(text.replace(*change, 1), encoding="utf-8")
    with pytest.raises(BadInput):
        read_costs(tmp_path / "costs.csv")
    done = hbv("leaderboard", table, "--out", tmp_path / "out")
    assert done.code == 2
    assert part in done.sentence
    assert not (tmp_path / "out").exists()


def written(folder: Path) -> Path:
    """Write results, with their costs next to them."""
    table = write_csv(folder / "results.csv", *RUNS)
    (folder / "costs.csv").write_text(costs_text(COSTS), encoding="utf-8")
    return table


def test_files_of_costs(tmp_path: Path) -> None:
    """They are written also into the folder of the results, whose costs stay."""
    table = written(tmp_path)
    done = hbv("leaderboard", table, "--out", tmp_path)
    assert done.code == 0, done.err
    assert "costs.csv, cost-table.csv, costs.tex" in " ".join(done.out.split())
    assert read_costs(tmp_path / "costs.csv") == COSTS
    rows = list(csv.DictReader(io.StringIO((tmp_path / "cost-table.csv").read_text())))
    assert [row["training_seconds"] for row in rows] == ["24", "24", "56", "25", "6"]
    assert [row["seconds_ratio"] for row in rows] == ["1", "1", "2.5", "", "1"]
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    assert "## Cost of training, base on cpu (protocol tiny aa11)" in text
    assert (
        "| vaccine | align | 10 | 2F 2B | 5 (2.50x) | 50 s (2.50x) | 56 s (2.33x) | 143.1 MiB (1.50x) | 0 | 0 |" in text
    )
    assert (tmp_path / "costs.tex").read_text(encoding="utf-8").count(r"\begin{tabular}") == 1


def test_tables_of_scores_do_not_depend_on_costs(tmp_path: Path) -> None:
    """Times differ between executions, while the scores must have the same bytes."""
    rankings = rank_rows(result_rows(RUNS))
    write_tables(rankings, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_tables(rankings, tmp_path, costs=tables_of(*COSTS, runs=RUNS))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"leaderboard.md"}


# ---------------------------------------------------------------------------------------------------------------------
# Command


def test_terminal_of_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = hbv("leaderboard", written(tmp_path), "--costs")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if line.startswith("vaccine")]
    assert line.split() == ["vaccine", "align", "5", "(2.50x)", "56", "s", "(2.33x)", "143.1", "MiB", "0", "0"]
    assert lines[lines.index(line) + 1].strip() == "(1.50x)"  # of the memory, below it
    assert "Medians over 3 runs of a defense. Relative to sft in brackets." in " ".join(done.out.split())
    assert "HS" not in done.out  # instead of the ranking


def test_json_is_the_cost_table(tmp_path: Path) -> None:
    done = hbv("leaderboard", written(tmp_path), "--costs", "--json")
    assert json.loads(done.out) == cost_rows(tables_of(*COSTS, runs=RUNS))
    assert cost_table_text(tables_of(*COSTS, runs=RUNS)).count("\n") == 1 + 5


def test_results_without_costs_are_refused(tmp_path: Path) -> None:
    done = hbv("leaderboard", write_csv(tmp_path / "results.csv", *RUNS), "--costs", "--out", tmp_path / "out")
    assert done.code == 2
    assert "no costs.csv is next to the results" in done.sentence
    assert not (tmp_path / "out").exists()


def test_costs_of_stored_runs(world: Path, tmp_path: Path, own_home: Path) -> None:
    """Without a CSV of costs, they come from the run folders; a run whose protocol is gone has none."""
    stages = {"align": {"seconds": 6.0, "cached": True, "steps": 4, "peak_memory": 5 * MB}}
    results = [
        make_result(
            run=f"{name}-1",
            defense=name,
            defense_params={name: {}},
            stages=stages,
            spec=RunSpec(protocol=protocol, defense=parse_plugins(name)).model_dump(mode="json"),
        )
        for name, protocol in (("vaccine", str(world)), ("booster", str(tmp_path / "absent.yaml")))
    ]
    for result in results:
        (own_home / "runs" / result.run).mkdir(parents=True)
        write_run(own_home / "runs" / result.run, result, [])
    done = hbv("leaderboard", write_csv(tmp_path / "results.csv", *results), "--costs", "--json", home=own_home)
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)
    assert (row["defense"], row["passes"], row["seconds_per_step"], row["peak_memory"]) == (
        "vaccine",
        "2F 2B",
        1.5,
        5 * MB,
    )


def test_costs_of_a_suite(world: Path, tmp_path: Path, own_home: Path) -> None:
    suite = tmp_path / "two.yaml"
    suite.write_text(
        f'{{name: two, title: "Two", protocol: "{world}", defenses: [sft, booster], attacks: [ratio=0.1]}}\n'
    )
    sweep = Sweep.open(load_suite(str(suite)), own_home)
    for experiment, seconds in zip(sweep.experiments, (2.0, 7.0), strict=True):
        stages = {"align": {"seconds": seconds, "cached": False, "steps": 4}}
        result = run_of(experiment.defense, run=keys.run_id(experiment), stages=stages)
        (sweep.runs / result.run).mkdir(parents=True)
        write_run(sweep.runs / result.run, result, [])
    done = hbv("leaderboard", suite, "--costs", "--json", home=own_home)
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [(row["defense"], row["passes"], row["seconds_ratio"]) for row in rows] == [
        ("sft", "1F 1B", 1.0),
        ("booster", "3F 3B", 3.5),
    ]
    sweep.write_outputs()
    assert read_costs(sweep.folder / "costs.csv") == sweep.costs()
