"""Tuning: grids of defenses, validation prompts, the rule of the choice, tuned protocols and their leaderboards."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.pools import question_keys, validation_rows
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import result_rows
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import load_protocol, protocol_names
from harmbench_vaccine.experiment.rows import eval_sets
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import TuningGrid
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.reporting.leaderboard.ranking import rank_rows
from harmbench_vaccine.reporting.leaderboard.tuned import tuned_pairs
from harmbench_vaccine.sweeps.suite import Suite
from harmbench_vaccine.sweeps.tuning import DefenseGrid, choose_values, defense_grids, plan_tuning
from support.cli import hbv
from support.results import DEFAULTS, SHARES, make_result
from support.world import make_world

COUNT = 5

# ---------------------------------------------------------------------------------------------------------------------
# Grids


@pytest.mark.parametrize("protocol", protocol_names())
@pytest.mark.parametrize("name", sorted(DEFENSES.entries()))
def test_every_defense_with_a_number_has_a_grid_around_its_default(name: str, protocol: str) -> None:
    cls, loaded = DEFENSES.get(name), load_protocol(protocol)
    numbers = [key for key, field in cls.model_fields.items() if field.annotation in (int, float)]
    if cls.grid is None:
        assert not numbers, f"{name} has {numbers}, but no grid"
        return
    assert cls.grid.parameter in numbers
    (grid,), _ = defense_grids([name], loaded, COUNT)
    default = loaded.defenses.get(name, {}).get(cls.grid.parameter, cls.model_fields[cls.grid.parameter].default)
    assert len(grid.values) == COUNT
    assert grid.values[COUNT // 2] == default
    for value in grid.values:
        assert getattr(cls(**{cls.grid.parameter: value}), cls.grid.parameter) == value  # it is inside the range


@given(
    default=st.floats(1e-6, 1e10),
    step=st.sampled_from([2.0, math.sqrt(10), 10.0]),
    half=st.integers(1, 3),
)
def test_the_values_of_a_grid_are_a_geometric_series(default: float, step: float, half: int) -> None:
    values = TuningGrid("rho", step).values(default, 2 * half + 1)
    assert values[half] == default
    for number, value in enumerate(values):
        assert value == pytest.approx(default * step ** (number - half), rel=0.05)  # two significant digits


@given(default=st.floats(0.02, 0.98), half=st.integers(1, 2))
def test_the_odds_of_a_share_are_a_geometric_series(default: float, half: int) -> None:
    values = TuningGrid("alpha", 2, share=True).values(default, 2 * half + 1)
    assert values == sorted(values)
    for number, value in enumerate(values):
        odds = default / (1 - default) * 2 ** (number - half)
        assert 0 < value < 1
        assert value / (1 - value) == pytest.approx(odds, rel=0.12)  # two significant digits of the smaller part


def test_the_values_of_a_whole_number_are_whole_numbers() -> None:
    assert TuningGrid("rows").values(50, 5) == [5, 16, 50, 158, 500]
    assert all(isinstance(value, int) for value in TuningGrid("k", 2).values(3, 5))


@pytest.mark.parametrize(
    ("grid", "default", "message"),
    [
        (TuningGrid("rho"), 0.0, "rho=0: the default must be above 0"),
        (TuningGrid("alpha", share=True), 1.0, "alpha=1: the default must be between 0 and 1"),
        (TuningGrid("k", 2), 2, "k has fewer than 5 whole numbers around 2"),
    ],
)
def test_a_grid_that_is_not_possible_is_refused(grid: TuningGrid, default: float, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        grid.values(default, 5)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ('TuningGrid("rhoo")', "Unknown parameter 'rhoo' of the grid of defense 'mine'. Did you mean 'rho'"),
        ("(1, 2, 3)", r"Defense 'mine': grid is \(1, 2, 3\), but must be a TuningGrid"),
    ],
)
def test_a_wrong_grid_is_refused_when_the_file_is_loaded(tmp_path: Path, grid: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from harmbench_vaccine.plugins import Defense, TuningGrid, param\n\n\nclass Mine(Defense):\n"
        f'    """A defense."""\n\n    grid = {grid}\n    rho: float = param(1.0, "radius", source="ours", ge=0)\n'
    )
    with pytest.raises(BadInput, match=message):
        DEFENSES.get(str(file))


def test_a_grid_is_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Another grid must not discard the results of the values that both grids have."""

    def fingerprint(grid: str, body: str) -> str:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "mine.py"
        file.parent.mkdir()
        file.write_text(
            "from harmbench_vaccine.plugins import Defense, TuningGrid, param\n\n\n"
            f'class Mine(Defense):\n    """A defense."""\n\n    {grid}\n    {body}\n'
        )
        return DEFENSES.get(str(file)).fingerprint()

    rho = 'rho: float = param(1.0, "radius", source="ours", main=True, ge=0)'
    plain = fingerprint("", rho)
    assert fingerprint('grid = TuningGrid("rho")', rho) == plain
    assert fingerprint('grid = TuningGrid("rho", step=10)', rho) == plain
    assert fingerprint('grid = TuningGrid("rho")', rho.replace("1.0", "2.0")) != plain


# ---------------------------------------------------------------------------------------------------------------------
# Validation prompts


@given(questions=st.lists(st.integers(0, 30), min_size=1, max_size=60), reported=st.integers(1, 60))
def test_validation_rows_share_no_question_with_results(questions: list[int], reported: int) -> None:
    rows = [
        Example(str(number), ("What  is " if number % 2 else "what is ") + str(question))
        for number, question in enumerate(questions)
    ]
    validation = validation_rows(rows, reported)
    used = set(questions[:reported])
    others = [question for question in dict.fromkeys(questions) if question not in used]
    assert [int(row.instruction.split()[-1]) for row in validation] == others[-reported:]
    assert all(row in rows[reported:] for row in validation)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = {"align": {"rows": 12}, "finetune": {"samples": 20}}  # training is not the subject
    return make_world(tmp_path_factory.mktemp("world"), few)


@pytest.mark.parametrize("rows", ["unique", "paper"])
def test_a_tuning_uses_no_prompt_of_a_result(world: Path, rows: str) -> None:
    def questions(part: str) -> dict[str, set[str]]:
        values = {"rows": rows, "answer.part": part}
        experiment = Experiment.settle(RunSpec(protocol=str(world), values=values))
        return {each.name: question_keys(each.examples) for each in eval_sets(experiment)}

    reported, validation = questions("report"), questions("validation")
    assert reported.keys() == validation.keys() == {"harmful", "benign", "task"}
    for name in reported:
        assert validation[name]
        assert not reported[name] & validation[name]


def test_reported_prompts_do_not_change(world: Path) -> None:
    assert load_protocol(str(world)).replaced({"answer.part": "report"}).hash == load_protocol(str(world)).hash


def test_a_protocol_that_reports_all_prompts_has_none_for_validation(world: Path) -> None:
    values = {"answer.part": "validation", "answer.harmful.prompts": "20"}
    experiment = Experiment.settle(RunSpec(protocol=str(world), values=values))
    with pytest.raises(BadInput, match="No held-out harmful prompts are left for the validation: results use all 20"):
        eval_sets(experiment)


# ---------------------------------------------------------------------------------------------------------------------
# The rule

GRID = DefenseGrid("vaccine", "vaccine", "rho", (1.0, 2.0, 4.0))


def scored(rho: float | None, refused: float, hs: float = 50.0, fa: float = 100.0, **fields: Any) -> Result:
    """Return a result of SFT, or of Vaccine at a radius."""
    name = "sft" if rho is None else "vaccine"
    hollow = fields.pop("hollow", False)
    shares = {"before": SHARES, "after": {**SHARES, "refusal_rate": refused}}
    return make_result(
        defense=name if rho is None else f"vaccine={rho:g}",
        defense_params={name: {} if rho is None else {"rho": rho}},
        harmful_score=hs,
        finetune_accuracy=fa,
        **{"validity": {**DEFAULTS["validity"], "shares": shares, "hollow": hollow}, **fields},
    )


SFT = scored(None, 0)


@pytest.mark.parametrize(
    ("results", "expected", "obstacle"),
    [
        pytest.param([scored(1, 10), scored(2, 20), scored(4, 30)], 4, "", id="the highest refusal rate"),
        pytest.param([scored(1, 30), scored(2, 20), scored(4, 30, hs=40)], 4, "", id="then the lowest HS"),
        pytest.param([scored(1, 30), scored(2, 30), scored(4, 30)], 2, "", id="then the default"),
        pytest.param([scored(1, 10), scored(2, 20), scored(4, 30, fa=98)], 4, "", id="2 points of FA may be lost"),
        pytest.param([scored(1, 10), scored(2, 20), scored(4, 30, fa=97.9)], 2, "", id="more may not"),
        pytest.param([scored(1, 10), scored(2, 20), scored(4, 90, hs=0, hollow=True)], 2, "", id="hollow"),
        pytest.param(
            [scored(1, 10), scored(2, 0, fa=90), scored(4, 90, hs=0, fa=50)], 1, "", id="the only one that qualifies"
        ),
        pytest.param(
            [scored(1, 10, fa=0), scored(2, 20, hollow=True), scored(4, 30, fa=0)],
            2,
            "hollow at seed 0",
            id="none qualifies, so the default",
        ),
    ],
)
def test_the_rule(results: list[Result], expected: float, obstacle: str) -> None:
    (choice,) = choose_values([GRID], [SFT, *results])
    assert (choice.chosen.value, choice.chosen.obstacle) == (expected, obstacle)
    assert choice.is_fallback == bool(obstacle)


def test_scores_are_means_over_seeds_and_a_mark_at_one_seed_counts() -> None:
    results = [
        scored(rho, refused, seed=seed, hollow=(rho, seed) == (4, 101))
        for rho, rates in {1.0: (0, 40), 2.0: (10, 20), 4.0: (80, 90)}.items()
        for seed, refused in zip((100, 101), rates, strict=True)
    ]
    (choice,) = choose_values([GRID], [SFT, *results])
    assert [candidate.refusal_rate for candidate in choice.candidates] == [20, 15, 85]
    assert [candidate.obstacle for candidate in choice.candidates] == ["", "", "hollow at seed 101"]
    assert choice.chosen.value == 1
    assert choice.cost.runs == 6


def test_a_stage_of_several_runs_costs_once() -> None:
    def stages(name: str) -> dict[str, Any]:
        artifacts = {
            key: {"key": key, "path": key, "seconds": seconds, "cached": False}
            for key, seconds in (("shared", 100.0), (name, 10.0))
        }
        return {"align": {"seconds": 110.0, "cached": False, "artifacts": artifacts}}

    results = [scored(rho, 0, stages=stages(f"rho={rho}")) for rho in GRID.values]
    (choice,) = choose_values([GRID], [SFT, *results])
    assert (choice.cost.runs, choice.cost.seconds) == (3, 130)


# ---------------------------------------------------------------------------------------------------------------------
# The runs of a tuning


def plan(suite: Suite | None = None, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "defenses": ["vaccine"],
        "protocol": None,
        "model": None,
        "task": None,
        "attack": "ratio=0.1",
        "seeds": [100],
        "count": 3,
        "name": "tuned",
    }
    return plan_tuning(suite, **{**values, **changes})


def suite(**fields: Any) -> Suite:
    return Suite.model_validate({"name": "a", "title": "A", "defenses": ["sft"], "attacks": ["ratio=0"], **fields})


def test_every_defense_has_the_same_number_of_runs() -> None:
    names = ["vaccine", "ewc", "antidote", "safe_lora"]
    specs = plan(defenses=names, seeds=[100, 101], count=5).suite.specs()
    runs = Counter(spec.defense[0].name for spec in specs)
    assert runs == {"sft": 2, **dict.fromkeys(names, 10)}
    assert {(spec.seed, spec.values["answer.part"]) for spec in specs} == {(100, "validation"), (101, "validation")}


def test_a_suite_gives_what_is_left_open() -> None:
    comparison = suite(
        defenses=["sft", "ptst", "vaccine:rho=1,5", "lisa+ewc"],
        tasks=["agnews"],
        protocol=["testbed", "tuned"],
        set={"align.rows": 500},
    )
    tuning = plan(comparison, defenses=[])
    assert [grid.defense for grid in tuning.grids] == ["vaccine", "lisa", "ewc"]
    assert tuning.untuned == ("sft", "ptst")
    assert {spec.task for spec in tuning.suite.specs()} == {"agnews"}
    assert {spec.protocol for spec in tuning.suite.specs()} == {"testbed"}
    assert tuning.suite.values == {"align.rows": 500, "answer.part": "validation"}


@pytest.mark.parametrize(
    ("comparison", "changes", "message"),
    [
        (None, {"defenses": []}, "Nothing to tune: name a suite, or defenses by --defense"),
        (None, {"defenses": ["vacine"]}, "Unknown defense 'vacine'. Did you mean 'vaccine'"),
        (None, {"defenses": ["vaccine=5"]}, "'vaccine=5' cannot be tuned: name one defense without parameters"),
        (None, {"defenses": ["vaccine+ewc"]}, "'vaccine.ewc' cannot be tuned: name one defense without parameters"),
        (None, {"defenses": ["ptst", "sft"]}, "No parameter to tune: ptst, sft has none"),
        (None, {"attack": "ratio=0.1,0.2"}, "lists several attacks; parameters are tuned at one"),
        (suite(seeds="0..100"), {}, "Seed 100 is a seed of suite 'a': tune with other seeds"),
        (suite(tasks=["sst2", "gsm8k"]), {}, "The suite has 2 tasks .sst2, gsm8k.: choose one by --task"),
    ],
)
def test_a_tuning_that_is_not_possible_is_refused(
    comparison: Suite | None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        plan(comparison, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defense", "vaccine", "--values", "4"], "--values is 4; allowed: odd numbers"),
        (["--defense", "vaccine", "--out", "tuned.txt"], "--out 'tuned.txt' is not a protocol file"),
        (["--defense", "vaccine", "--seed", "x"], "--seed is 'x'; allowed: whole numbers"),
        (["--defense", "vacine", "--out", "new/tuned.yaml"], "Unknown defense 'vacine'. Did you mean 'vaccine'?"),
        (["--defense", "vaccine", "--protocol", "testbet"], "Unknown protocol 'testbet'. Did you mean 'testbed'?"),
        (["--defense", "vaccine", "--out", "other.yaml"], "exists and was not written by `hbv tune`"),
        (["nothing"], "Unknown suite 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("name: other\n")
    done = hbv("tune", *arguments, home=tmp_path / "home")
    assert (done.code, done.out) == (2, "")
    assert message in done.sentence
    assert [path.name for path in tmp_path.iterdir()] == ["other.yaml"]


# ---------------------------------------------------------------------------------------------------------------------
# Tuned protocols


def write_overlay(path: Path, **changes: Any) -> Path:
    values = {
        "base": "testbed",
        "name": path.stem,
        "version": 1,
        "defenses": {"lisa": {"rho": 3.2}},
        "tuning": {"lisa": {"runs": 10, "seconds": 60}},
        "sources": {"defenses.lisa.rho": "hbv tune"},
    }
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def test_an_overlay_changes_only_its_values(tmp_path: Path) -> None:
    overlay, base = load_protocol(str(write_overlay(tmp_path / "mine.yaml"))), load_protocol("testbed")
    changed = {"name": "mine", "version": 1, "defenses": {**base.defenses, "lisa": {"k1": 10, "k2": 90, "rho": 3.2}}}
    assert overlay.model_dump() == {**base.model_dump(), **changed}
    assert overlay.hash != base.hash
    assert overlay.untuned_hash_with({}) == base.hash
    assert base.untuned_hash_with({}) == ""
    assert overlay.source_of("defenses.lisa.rho") == "hbv tune"
    assert overlay.source_of("align.rows") == base.source_of("align.rows")


def test_a_replaced_value_changes_both_hashes_of_an_overlay(tmp_path: Path) -> None:
    values = {"align.rows": "500"}
    overlay = load_protocol(str(write_overlay(tmp_path / "mine.yaml"))).replaced(values)
    assert overlay.untuned_hash_with({}) == load_protocol("testbed").replaced(values).hash


def test_the_cost_of_a_tuning_is_not_part_of_the_hash(tmp_path: Path) -> None:
    file = write_overlay(tmp_path / "mine.yaml")
    before = load_protocol(str(file)).hash
    assert load_protocol(str(write_overlay(file, tuning={"lisa": {"runs": 9, "seconds": 1}}))).hash == before


def test_the_base_of_an_overlay_is_a_file_next_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_overlay(tmp_path / "first.yaml")
    second = write_overlay(tmp_path / "second.yaml", base="first.yaml", defenses={"vaccine": {"rho": 5.0}})
    monkeypatch.chdir("/")
    defenses = load_protocol(str(second)).defenses
    assert (defenses["vaccine"], defenses["lisa"]["rho"]) == ({"rho": 5.0}, 3.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "testbet"}, "Unknown protocol 'testbet'. Did you mean 'testbed'"),
        ({"base": "missing.yaml"}, "Protocol file '.*missing.yaml' does not exist"),
        ({"base": "mine.yaml"}, "mine.yaml is its own base"),
        ({"aline": {"rows": 5}}, "Unknown value 'aline' of protocol .*mine.yaml. Did you mean 'align"),
        ({"tuning": {"lisa": {"runs": -1, "seconds": 0}}}, "tuning.lisa.runs is -1"),
    ],
)
def test_an_overlay_that_is_not_allowed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_protocol(str(write_overlay(tmp_path / "mine.yaml", **changes)))


def test_the_page_of_a_tuned_protocol(tmp_path: Path) -> None:
    page = hbv("info", write_overlay(tmp_path / "mine.yaml")).out
    assert "hbv tune" in page
    assert "testbed" in page
    assert "10 runs" in page


# ---------------------------------------------------------------------------------------------------------------------
# Leaderboards


def ranked(tuned_hash: str = "aa11", **fields: Any) -> list[Any]:
    """Rank SFT and Vaccine with default and with tuned parameters, two seeds each."""
    results = []
    for protocol, hs, rho, further in (
        ("tiny", 60.0, 2.0, {}),
        ("tiny-tuned", 40.0, 6.3, {"protocol_hash": "bb22", **fields}),
    ):
        for seed in (0, 1):
            for name, score, params in (("sft", 80.0, {}), ("vaccine", hs + seed, {"rho": rho, "tau": 1})):
                runs = 10 if name == "vaccine" else 0
                tuning = {"untuned_hash": tuned_hash, "runs": runs, "seconds": 90.0 * runs}
                results.append(
                    make_result(
                        defense=name,
                        defense_params={name: params},
                        harmful_score=score,
                        protocol=protocol,
                        seed=seed,
                        **further,
                        **({"tuning": tuning} if further else {}),
                    )
                )
    return rank_rows(result_rows(results))


def test_default_and_tuned_parameters_are_side_by_side() -> None:
    (pair,) = tuned_pairs(ranked())
    vaccine, sft = pair.rows
    assert (vaccine["harmful_score"], vaccine["harmful_score_tuned"]) == (60.5, 40.5)
    assert vaccine["tuned_params"] == {"rho": 6.3}
    assert (vaccine["tuning_runs"], vaccine["tuning_seconds"]) == (10, 900.0)
    assert (sft["defense"], sft["tuned_params"], sft["tuning_runs"]) == ("sft", {}, 0)


@pytest.mark.parametrize("fields", [{"tuned_hash": "cc33"}, {"model": "other"}, {"task": "agnews"}])
def test_rankings_that_differ_in_more_than_parameters_are_not_paired(fields: dict[str, Any]) -> None:
    assert not tuned_pairs(ranked(**fields))


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_the_plan_of_a_tuning(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("tune", "--protocol", world, "--defense", "vaccine", "--values", 3, "--seed", 100)
    (values,) = hbv(*command, "--dry-run", "--json", home=tmp_path / "home").results
    assert values["grids"] == [{"defense": "vaccine", "parameter": "rho", "default": 2.0, "values": [0.63, 2.0, 6.3]}]
    assert len(values["experiments"]) == 4  # SFT and three values
    assert not (tmp_path / "tiny-tuned.yaml").exists()


@pytest.mark.slow
def test_a_tuned_protocol_from_beginning_to_end(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home, file = tmp_path / "home", tmp_path / "mine.yaml"
    command = ["tune", "--protocol", world, "--defense", "vaccine", "--values", 3, "--seed", 100, "--out", file]
    done = hbv(*command, home=home)
    assert done.code == 0, done.err
    with (tmp_path / "mine.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["value"] for row in rows] == ["0.63", "2", "6.3"]
    (chosen,) = [row for row in rows if row["chosen"] == "True"]
    protocol = load_protocol(str(file))
    assert f"{protocol.defenses['vaccine']['rho']:g}" == chosen["value"]
    assert protocol.tuning["vaccine"].runs == 3
    assert protocol.untuned_hash_with({}) == load_protocol(str(world)).hash

    text, stages = file.read_text(), sorted((home / "store").glob("*/*/artifact.json"))
    times = [path.stat().st_mtime_ns for path in stages]
    assert hbv(*command, home=home).code == 0  # repeated: it runs nothing, and writes the same
    assert [path.stat().st_mtime_ns for path in sorted((home / "store").glob("*/*/artifact.json"))] == times
    assert file.read_text() == text

    for name in (world, file):
        assert hbv("run", "--protocol", name, "--defense", "vaccine", home=home).code == 0
    shown = hbv("leaderboard", home=home, COLUMNS="80")
    assert "Default and tuned parameters" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
