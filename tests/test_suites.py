"""Suites and lists of values, and the runs that they name."""

from __future__ import annotations

import json
import runpy
from collections import defaultdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmbench_vaccine import api
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.experiment.spec_lists import combine_specs, parse_seeds
from harmbench_vaccine.plugins.composition import expand_values, parse_plugins
from harmbench_vaccine.reporting.published.figures import is_average, load_figures
from harmbench_vaccine.reporting.published.matching import matched_figures
from harmbench_vaccine.sweeps.suite import load_suite, suite_file, suite_names
from support.cli import hbv

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# Lists of values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft", ["sft"]),
        ("ratio=0.1", ["ratio=0.1"]),
        ("ratio=0,0.05,0.1", ["ratio=0", "ratio=0.05", "ratio=0.1"]),
        ("ratio=0, 0.05", ["ratio=0", "ratio=0.05"]),
        ("ratio=0,0.1,samples=500", ["ratio=0,samples=500", "ratio=0.1,samples=500"]),
        ("vaccine:rho=1,5", ["vaccine:rho=1", "vaccine:rho=5"]),
        ("lisa:k1=1..3", ["lisa:k1=1", "lisa:k1=2", "lisa:k1=3"]),
        ("lisa:k1=1,3..4,k2=9", ["lisa:k1=1,k2=9", "lisa:k1=3,k2=9", "lisa:k1=4,k2=9"]),
        (
            "vaccine=1,2+ewc=1e+09,2",
            ["vaccine=1+ewc=1e+09", "vaccine=1+ewc=2", "vaccine=2+ewc=1e+09", "vaccine=2+ewc=2"],
        ),
        ("backdoor,ratio=0.1", ["backdoor,ratio=0.1"]),
        ("./mine.py:file=a.txt", ["./mine.py:file=a.txt"]),
    ],
)
def test_expand_values(text: str, expected: list[str]) -> None:
    assert expand_values(text) == expected


@given(
    st.lists(st.floats(0, 1).map(lambda number: f"{number:g}"), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 99).map(str), min_size=1, max_size=4, unique=True),
)
def test_expanded_values_are_those_of_every_combination(ratios: list[str], samples: list[str]) -> None:
    texts = expand_values(f"ratio={','.join(ratios)},samples={','.join(samples)}")
    params = [parse_plugins(text) for text in texts]
    assert len(texts) == len(ratios) * len(samples)
    assert {(p[0].params[""], p[1].params[""]) for p in params} == {(r, s) for r in ratios for s in samples}


def test_a_value_is_listed_once() -> None:
    assert expand_values("ratio=0,0,0..1") == ["ratio=0", "ratio=1"]


@pytest.mark.parametrize(
    "text", ["ratio=5..1", "ratio=0..99999999", "ratio=0..0.3", "ratio=0,..4", "ratio=0,1..", f"ratio=0..{'9' * 5000}"]
)
def test_bad_range(text: str) -> None:
    with pytest.raises(
        BadInput, match=r"^Range '.*' of 'ratio=.* is not allowed: write FIRST\.\.LAST with whole numbers"
    ):
        expand_values(text)


def test_too_many_combinations() -> None:
    with pytest.raises(BadInput, match="lists 1000000 combinations; allowed: at most 10000"):
        expand_values("ratio=1..1000,samples=1..1000")
    with pytest.raises(BadInput, match="give 20000000 runs; allowed: at most 100000"):
        combine_specs(["sft"], ["ratio=1..2000"], ["sst2"], ["1..10000"])


def test_texts_inside_a_tuple_are_expanded() -> None:
    specs = combine_specs([("vaccine:rho=1,5", "ewc=1,2")], ["ratio=0"], ["sst2"], [0])
    params = [tuple(component.params.values()) for spec in specs for component in spec.defense]
    assert params == [("1",), ("1",), ("1",), ("2",), ("5",), ("1",), ("5",), ("2",)]


@pytest.mark.parametrize(("text", "seeds"), [("3", [3]), ("0..2", [0, 1, 2]), ("0, 5..6,9", [0, 5, 6, 9])])
def test_seeds_of_a_text(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text, "--seed") == seeds


@pytest.mark.parametrize("text", ["-1", "x", "0..x", "1.5", "", "0,", str(2**63), "9" * 5000])
def test_bad_seed(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--seed is '.*'; allowed: whole numbers from 0 to 2\*\*63 - 1, and ranges"):
        parse_seeds(text, "--seed")


def test_command_line_lists_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    specs: list[RunSpec] = []

    def run_all(listed: list[RunSpec], **options: Any) -> list[None]:
        specs.extend(listed)
        return []

    monkeypatch.setattr("harmbench_vaccine.runner.run_all", run_all)
    done = hbv(
        *("run", "--json", "--defense", "vaccine:rho=1,5", "--defense", "sft"),
        *("--attack", "ratio=0,0.1", "--seed", "0..1", "--seed", "7"),
        home=tmp_path,
    )
    assert done.code == 0, done.err
    runs = [(spec.seed, spec.attack, spec.defense) for spec in specs]
    attacks, defenses = ("ratio=0", "ratio=0.1"), ("vaccine:rho=1", "vaccine:rho=5", "sft")
    assert runs == list(product((0, 1, 7), map(parse_plugins, attacks), map(parse_plugins, defenses)))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--attack", "ratio=0..0.3"), "Range '0..0.3' of 'ratio=0..0.3' is not allowed"),
        (("--seed", "4..0"), "Range '4..0' of '--seed' is not allowed"),
        (("--seed", "0..x"), "--seed is '0..x'; allowed"),
        (("--seed", "1..10000", "--attack", "ratio=1..20"), "give 200000 runs"),
    ],
)
def test_bad_lists_on_the_command_line(args: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    done = hbv("run", *args, home=tmp_path / "home")
    assert (done.code, done.out) == (2, "")
    assert sentence in done.sentence
    assert not (tmp_path / "home").exists()


def test_python_lists_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that lists values gives a list, like a list; a single value gives one result."""
    monkeypatch.setattr("harmbench_vaccine.runner.run_all", lambda specs, **options: list(specs))
    specs: Any = api.run("vaccine:rho=1,5", "ratio=0,0.1", seed="0..4", progress=False)
    assert len(specs) == 2 * 2 * 5
    assert [spec.seed for spec in api.run(seed=[0, "2..3"], progress=False)] == [0, 2, 3]
    assert [spec.seed for spec in api.run(seed="3", progress=False)] == [3]
    assert isinstance(api.run("vaccine:rho=1", "ratio=0.1", seed=3, progress=False), RunSpec)


# ---------------------------------------------------------------------------------------------------------------------
# Suites

SUITE = """
name: small
title: A small suite
defenses: [sft, "vaccine:rho=2,5"]
attacks: ["ratio=0,0.1"]
seeds: 0..1
include:
  - {defense: lisa, attack: ratio=0.1}
  - {defense: sft, seed: 0}
exclude:
  - {defense: "vaccine:rho=5", attack: ratio=0}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "suite.yaml"
    path.write_text(text)
    return str(path)


def cell(spec: RunSpec) -> tuple[str, str, int]:
    return (
        "+".join(f"{c.name}{'=' + str(c.params['rho']) if c.params else ''}" for c in spec.defense),
        str(spec.attack[0].params[""]),
        spec.seed,
    )


def test_runs_of_a_suite(tmp_path: Path) -> None:
    cells = [cell(spec) for spec in load_suite(write(tmp_path, SUITE)).specs()]
    expected = {
        (defense, attack, seed)
        for defense in ("sft", "vaccine=2", "vaccine=5")
        for attack in ("0", "0.1")
        for seed in (0, 1)
    }
    expected |= {("lisa", "0.1", seed) for seed in (0, 1)}
    expected -= {("vaccine=5", "0", seed) for seed in (0, 1)}
    assert set(cells) == expected
    assert len(cells) == len(expected)


def test_single_values_are_axes_of_one(tmp_path: Path) -> None:
    text = "{name: one, title: One, defenses: sft, attacks: ratio=0.1, model: some/model, set: {rows: paper}}"
    (spec,) = load_suite(write(tmp_path, text)).specs()
    assert (spec.model, spec.values, spec.seed, spec.protocol) == ("some/model", {"rows": "paper"}, 0, "testbed")


GRID = """
name: grid
title: A grid of settings
defenses: sft
attacks: ratio=0.1
set: {align.rows: 100}
include:
  - set: {finetune.settings.batch: 5}
    grid: {finetune.settings.lr: [4e-4, 1e-3], finetune.settings.epochs: [2, 4], answer.cut_at: x}
"""


def test_grid_is_every_combination_of_protocol_values(tmp_path: Path) -> None:
    fixed, *points = load_suite(write(tmp_path, GRID)).specs()
    assert fixed.values == {"align.rows": "100"}
    common = {"align.rows": "100", "finetune.settings.batch": "5", "answer.cut_at": "x"}
    assert [spec.values for spec in points] == [
        {**common, "finetune.settings.lr": str(lr), "finetune.settings.epochs": str(epochs)}
        for lr, epochs in product((0.0004, 0.001), (2, 4))
    ]


def test_rows_of_a_grid_are_never_mixed_with_fixed_rows(tmp_path: Path) -> None:
    """A leaderboard ranks protocol hashes separately, and each point of a grid has another one."""
    experiments = load_suite(write(tmp_path, GRID)).settle()
    assert len({experiment.protocol.hash for experiment in experiments}) == len(experiments) == 5


def test_point_of_a_grid_that_is_the_protocol_is_one_run(tmp_path: Path) -> None:
    lr = load_protocol("testbed").finetune.settings.lr
    text = GRID.partition("include")[0] + f"include: [{{grid: {{finetune.settings.lr: [{lr}, 1e-3]}}}}]"
    suite = load_suite(write(tmp_path, text))
    assert (len(suite.specs()), len(suite.settle())) == (3, 2)


def test_exclusion_of_points_of_a_grid(tmp_path: Path) -> None:
    text = GRID + "exclude: [{set: {finetune.settings.epochs: 4}, grid: {finetune.settings.lr: [4e-4, 7]}}]"
    points = [spec.values for spec in load_suite(write(tmp_path, text)).specs()[1:]]
    assert [(p["finetune.settings.lr"], p["finetune.settings.epochs"]) for p in points] == [
        ("0.0004", "2"),
        ("0.001", "2"),
        ("0.001", "4"),
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("defenses:", "defences:"), "Unknown value 'defences' of suite .* Did you mean 'defenses'"),
        (("seeds: 0..1", "seeds: [-1]"), "seeds.0 is -1"),
        (("seeds: 0..1", "seeds: 0..x"), "A seed of the suite is '0..x'; allowed"),
        (("seeds: 0..1", "seeds: []"), r"seeds is \[\]"),
        (("name: small", "name: ../small"), "name is '../small'"),
        (("{defense: sft, seed: 0}", "{defence: sft}"), "Unknown value 'defence' of suite .* Did you mean 'defense'"),
        (("title: A small suite", ""), "title is missing"),
        (("attack: ratio=0}", "attack: ratio=0.3}"), "excludes .* but it has no such run"),
        (("{defense: sft, seed: 0}", "{grid: {rows: []}}"), r"include.1.grid.rows is \[\]"),
        (("{defense: sft, seed: 0}", "{set: {rows: 1}, grid: {rows: 2}}"), "`set` and `grid` both have 'rows'"),
        (("{defense: sft, seed: 0}", "{set: {row: 1}}"), "Unknown protocol value 'row'. Did you mean 'rows'"),
        (("name: small", "- name"), "cannot be read as YAML"),
    ],
)
def test_bad_suite(change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        load_suite(write(tmp_path, SUITE.replace(*change))).settle()


def test_unknown_suite() -> None:
    with pytest.raises(BadInput, match=r"Suite file 'x\.yaml' does not exist"):
        load_suite("x.yaml")
    with pytest.raises(BadInput, match="Unknown suite 'nothing'"):
        load_suite("nothing")


# ---------------------------------------------------------------------------------------------------------------------
# Suites that ship with the package

PAPER_SUITES = [name for name in suite_names() if load_suite(name).protocols[0].endswith("-paper")]
Cell = tuple[str, str, str, float, int]
"""Model, task, defense with every parameter as JSON, harmful ratio, number of rows."""


@cache
def settled(name: str) -> list[Experiment]:
    return load_suite(name).settle()


def as_json(params: dict[str, dict[str, Any]]) -> str:
    return json.dumps(
        {
            plugin: {key: float(value) if type(value) is int else value for key, value in values.items()}
            for plugin, values in params.items()
        },
        sort_keys=True,
    )


def cells_of_suite(name: str) -> set[Cell]:
    """Return the cells of a suite that have the values of its protocol."""
    cells = set()
    for experiment in settled(name):
        if experiment.protocol.hash == load_protocol(experiment.protocol.name).hash:
            attack = {key: value for attack in experiment.attacks for key, value in attack.params.items()}
            samples = attack.get("n", experiment.finetune.samples)
            defense = as_json({resolved.plugin.name: resolved.params for resolved in experiment.defenses})
            cells.add((experiment.model, experiment.task.name, defense, attack["p"], samples))
    return cells


def cells_of_table(protocol: str, table: str) -> set[Cell]:
    """Return the cells of a published table that have a counterpart in this harness."""
    return {
        (match.model, match.task, as_json(match.defense), match.ratio, match.samples[0])
        for match in matched_figures(protocol)
        if match.figure["table"] == table
    }


@pytest.mark.parametrize("name", suite_names())
def test_every_run_of_a_shipped_suite_is_possible(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite_file(name).read_text(encoding="utf-8").startswith(f"#   hbv sweep {name}\n")
    assert suite.source
    assert len(settled(name)) == len(suite.specs())


@pytest.mark.parametrize("name", [name for name in PAPER_SUITES if load_suite(name).source[-1].isdigit()])
def test_suite_has_the_cells_of_its_table(name: str) -> None:
    suite = load_suite(name)
    paper, table = suite.source.split(", ")
    assert name == f"{paper}-{table}".lower().replace(" ", "")
    runs, figures = cells_of_suite(name), cells_of_table(suite.protocols[0], table)
    assert figures
    assert figures - runs == set()
    if name != "booster-table3":  # of which most figures are not recorded
        assert runs - figures == set()


def test_single_topology_of_vaccine_table8() -> None:
    """The rows of the published file whose defense ends in SingleLoRA, which names.yaml excludes."""
    rows = {
        (row["task"].lower(), row["defense"].partition("-")[0].lower())
        for row in load_figures()
        if row["protocol"] == "vaccine_paper" and row["defense"].endswith("SingleLoRA")
    }
    single = [experiment for experiment in settled("vaccine-table8") if experiment.protocol.topology == "single"]
    assert {(experiment.task.name, experiment.defense) for experiment in single} == rows


@pytest.mark.parametrize(
    ("name", "table", "parameter"),
    [("antidote-learning-rates", "learning-rate table", "lr"), ("antidote-epochs", "epoch table", "epochs")],
)
def test_suite_has_the_cells_of_an_antidote_table(name: str, table: str, parameter: str) -> None:
    rows = [row for row in load_figures() if row["protocol"] == "antidote" and row["table"] == table]
    figures = {
        (row["task"].lower(), row["defense"].lower(), float(row["sweep_value"])) for row in rows if not is_average(row)
    }
    runs = set()
    for experiment in settled(name):
        optimizer, ratio = experiment.attacks
        assert ratio.params["p"] == 0.2
        runs.add((experiment.task.name, experiment.defenses[0].plugin.name, optimizer.params[parameter]))
    assert runs == figures


def test_reviewer_pack_has_a_grid_and_a_benign_user() -> None:
    for name in ("reviewer-pack", "testbed-reviewer-pack"):
        attacks: dict[str, set[str]] = defaultdict(set)
        for experiment in settled(name):
            attacks[experiment.attack].add(experiment.defense)
        defenses = {"sft", "vaccine", "lisa", "booster", "repnoise", "antidote", "safe_lora"}
        assert all(run_with == defenses for run_with in attacks.values())
        assert len([attack for attack in attacks if attack.startswith("optimizer")]) == 8
        assert "ratio=0" in attacks


@pytest.mark.parametrize("name", PAPER_SUITES)
def test_twin_on_the_testbed(name: str) -> None:
    """A twin has the plug-ins of its origin, the tasks that the testbed has, and not more seeds."""
    origin, twin = load_suite(name), load_suite(f"testbed-{name}")
    assert twin.protocols[0] == "testbed"
    assert twin.source == origin.source
    assert list(twin.tasks) == [task for task in origin.tasks if not task.startswith("alpaca_eval")]
    assert len(twin.seeds) <= len(origin.seeds)

    def plugin_names(texts: tuple[str, ...]) -> list[list[str]]:
        return [[component.name for component in parse_plugins(each)] for text in texts for each in expand_values(text)]

    assert plugin_names(twin.defenses) == plugin_names(origin.defenses)
    assert plugin_names(twin.attacks) == plugin_names(origin.attacks)
    assert len(twin.include) == len(origin.include)


def test_page_lists_every_suite_and_field() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "render_suites.py"))
    text = script["PAGE"].read_text(encoding="utf-8")
    assert text == script["page"](text), "run: python docs/render_suites.py"
    assert all(f"`{name}`" in text for name in suite_names())
