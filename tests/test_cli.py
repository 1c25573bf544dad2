"""The command line on a tiny world: output, stored files, and error messages.

Most commands run in this process, through the real entry point; exit codes, signals and full disks are tested with a
separate process.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from harmbench_vaccine import runner
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.data.sources import local_path
from harmbench_vaccine.experiment.spec import RunSpec
from support.cli import HBV, CommandResult, finish, hbv, start_hbv
from support.world import make_world


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home that the commands of this module share."""
    return tmp_path_factory.mktemp("shared")


RUNS = ("--defense", "sft", "--defense", "random_vaccine:variance=0.02", "--attack", "ratio=0.1", "--seed", "3")


@pytest.fixture(scope="module")
def first(world: Path, home: Path) -> CommandResult:
    """Two runs from an empty home."""
    done = hbv("run", "--json", "--protocol", world, *RUNS, home=home)
    assert done.code == 0, done.err
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Light commands


@pytest.mark.parametrize(
    "args", [("--help",), ("list", "defenses"), ("list", "scorers"), ("run", "--help"), ("--version",)]
)
def test_light_commands_do_not_import_heavy_packages(args: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *HBV[1:], *args],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HBV_HOME": str(tmp_path)},
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in imported
    assert not imported & {"torch", "transformers", "peft", "accelerate", "datasets", "vllm", "ray", "scipy", "pandas"}
    assert done.stdout


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("defenses", {"none", "sft", "vaccine", "random_vaccine"}),
        ("attacks", {"ratio", "samples"}),
        ("tasks", {"sst2", "agnews", "gsm8k"}),
        ("scorers", {"beaver_dam"}),
        ("protocols", {"testbed"}),
        ("models", {"testbed:model"}),
    ],
)
def test_lists(kind: str, expected: set[str]) -> None:
    plain, as_json = hbv("list", kind), hbv("list", kind, "--json")
    assert (plain.code, plain.err) == (0, "")
    assert expected <= set(json.loads(as_json.out))
    names = json.loads(as_json.out)
    heading = "model" if kind == "models" else "name"
    assert [line.split()[0] for line in plain.out.splitlines()][: len(names) + 1] == [heading, *names]


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("run",),
        ("list",),
        ("show",),
        ("score",),
        ("leaderboard",),
        ("doctor",),
        ("testbed",),
        ("testbed", "build"),
        ("testbed", "path"),
        ("testbed", "report"),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help_with_an_example(command: tuple[str, ...], flag: str) -> None:
    done = hbv(*command, flag)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage:")
    if command != ("testbed",):
        assert "Example: " in done.out
        assert "hbv " in done.out.partition("Example: ")[2]


def test_group_without_a_command_shows_its_help() -> None:
    for args in ((), ("testbed",), ("list",), ("store",)):
        done = hbv(*args)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("Usage:")
        assert "Commands:\n" in done.err


def test_broken_package_is_listed_and_fails_only_when_used(tmp_path: Path) -> None:
    info = tmp_path / "site" / "foreign-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[harmbench_vaccine.defenses]\nforeign = no_such_module:Foreign\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HBV_HOME": str(tmp_path / "home")}
    listed = subprocess.run([*HBV, "list", "defenses"], capture_output=True, text=True, check=True, env=environment)
    rows = {line.split()[0]: line for line in listed.stdout.splitlines()}
    assert rows["foreign"].endswith("cannot be imported")
    assert "vaccine" in rows
    used = subprocess.run(
        [*HBV, "run", "--defense", "foreign"], capture_output=True, text=True, check=False, env=environment
    )
    assert (used.returncode, used.stdout) == (2, "")
    assert "'foreign' cannot be imported" in used.stderr
    assert len(used.stderr.splitlines()) == 1


def test_testbed_is_located_after_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBV_HOME", str(tmp_path))

    def get_or_create(store: Store, stage: str, inputs: Any, create: Any) -> Artifact:
        assert stage == "testbed"
        path = store.path_of(stage, inputs)
        path.mkdir(parents=True, exist_ok=True)
        return Artifact(stage, path.name, path, 1.0, cached=True)

    with mock.patch.object(Store, "get_or_create", get_or_create):
        for _ in range(2):
            done = hbv("testbed", "path")
            assert done.code == 0, done.err
            assert local_path("testbed:model") == Path(done.out.strip()) / "model"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

FILE = "<regular file>"  # a placeholder for the path of a file
BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: arguments, parts of the message
    "command": (
        ("rn",),
        (
            "Unknown command 'rn'",
            "Did you mean 'run'",
            "check, compare, doctor, edit, export, info, judge, leaderboard",
        ),
    ),
    "subcommand": (("testbed", "bild"), ("'bild'", "'build'", "build, path, report")),
    "option": (("run", "--defence", "sft"), ("--defence", "--defense")),
    "kind": (("list", "defence"), ("'defence'", "'defenses'", "attacks, ")),
    "no value": (("run", "--defense"), ("--defense",)),
    "defense": (("run", "--defense", "vacine"), ("Unknown defense 'vacine'", "'vaccine'", "antibody, antidote")),
    "second defense": (("run", "--defense", "sft", "--defense", "stf"), ("Unknown defense 'stf'", "'sft'")),
    "attack": (("run", "--attack", "rato=0.1"), ("Unknown attack 'rato'", "'ratio'", "backdoor, benign")),
    "parameter": (("run", "--defense", "vaccine:roh=5"), ("'roh'", "'vaccine'", "Did you mean 'rho'", "rho, tau")),
    "attack's parameter": (("run", "--attack", "ratio:q=0.1"), ("'q'", "'ratio'", "Allowed: p")),
    "task": (
        ("run", "--task", "sst"),
        ("Unknown task 'sst'", "Did you mean 'sst2'", "agnews, alpaca_eval, dialogsum, gsm8k, own, sst2"),
    ),
    "protocol": (("run", "--protocol", "tesbed"), ("Unknown protocol 'tesbed'", "Did you mean 'testbed'")),
    "protocol file": (("run", "--protocol", "./no.yaml"), ("Protocol file './no.yaml' does not exist",)),
    "scorer": (("run", "--scorer", "beaver"), ("Unknown scorer 'beaver'", "Did you mean 'beaver_dam'")),
    "ratio above": (("run", "--attack", "ratio=1.01"), ("p=1.01", "'ratio'", ">= 0 and <= 1")),
    "ratio below": (("run", "--attack", "ratio=-0.01"), ("p=-0.01", "'ratio'", ">= 0 and <= 1")),
    "ratio, no number": (("run", "--attack", "ratio=half"), ("p=half", "a number >= 0 and <= 1")),
    "samples": (("run", "--attack", "samples=0"), ("n=0", "a whole number >= 1")),
    "grammar": (("run", "--defense", "vaccine:rho"), ("'vaccine:rho'", "name:key=value")),
    "twice": (("run", "--defense", "sft+sft"), ("'sft' is named twice",)),
    "conflict": (("run", "--defense", "none+vaccine"), ("'none'", "'vaccine'", "cannot be combined")),
    "seed": (("run", "--seed", "-1"), ("--seed", "-1")),
    "plug-in file": (("run", "--defense", "./no.py"), ("The defense file './no.py' does not exist",)),
    "--data": (("run", "--data", "sst2"), ("'sst2'", "NAME=PATH")),
    "data set": (("run", "--data", "sst=/tmp"), ("'sst'", "'sst2'")),
    "data path": (("run", "--data", "sst2=./nothing"), ("'./nothing'",)),
    "model path": (("run", "--model", "./nothing"), ("'./nothing'", "Hub")),
    "model folder": (("run", "--model", "."), ("'.'", "config.json", "model")),
    "model": (("run", "--model", "testbed:modle"), ("'testbed:modle'", "'testbed:model'")),
    "model of the hub": (
        ("run", "--model", "org/missing"),
        ("Model 'org/missing' is not on this machine", "Allowed"),
    ),
    "run": (("show", "sft-0"), ("Unknown run 'sft-0'",)),
    "more samples": (("run", "--attack", "samples=401"), ("401", "400")),
    "more harmful samples": (("run", "--attack", "ratio=1,samples=81"), ("81", "80")),
    "--out": (("run", "--out", f"{FILE}/x"), ("cannot be written to", "file/x")),
    "--csv": (("run", "--csv", f"{FILE}/x.csv"), ("cannot be written to", "file")),
    "--csv a folder": (("run", "--csv", "."), (".",)),
    "share": (("run", "--save-every", "2"), ("--save-every",)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints one line on stderr and nothing on stdout, exits with 2, and stores nothing."""
    args, parts = BAD[what]
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace(FILE, str(tmp_path / "file")) for argument in args]
    if args[0] == "run" and not {"--protocol", "testbed:modle"} & set(args):
        arguments[1:1] = ["--protocol", str(world)]
    with mock.patch.object(runner, "ensure_testbed", side_effect=AssertionError("the testbed was built")):
        done = hbv(*arguments, home=tmp_path / "home")
    assert (done.code, done.out) == (2, ""), done.err
    assert done.sentence.startswith("hbv: ")
    for part in parts:
        assert part in done.sentence
    assert not (tmp_path / "home" / "store").exists()


@pytest.mark.parametrize("what", ["command", "defense", "ratio above", "conflict", "kind"])
def test_bad_input_in_a_separate_process(what: str, tmp_path: Path) -> None:
    args, parts = BAD[what]
    done = finish(start_hbv(*args, home=tmp_path / "home"))
    assert (done.code, done.out) == (2, "")
    assert all(part in done.sentence for part in parts)


@pytest.mark.parametrize("args", [("run",), ("testbed", "path"), ("testbed", "build")])
def test_home_below_a_regular_file(args: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = [*args, "--protocol", str(world)] if args == ("run",) else args
    for folder in (tmp_path / "file" / "deep" / "home", tmp_path / "file"):
        done = hbv(*arguments, home=folder)
        assert (done.code, done.out) == (2, "")
        assert f"The cache folder {folder} cannot be written to" in done.sentence
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "line", "parts"),
    [
        ("missing field", '{"sentnce": "x", "label": 1}', ("line 2", "'sentence' is missing", "sentence, label")),
        ("no JSON", '{"sentence": ', ("line 2", "not JSON")),
        ("no object", "[1, 2]", ("line 2", "JSON object")),
    ],
)
def test_bad_data(name: str, line: str, parts: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    good = '{"sentence": "x", "label": 1}\n'
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(good + (f"{line}\n" if split == "train" else ""))
    done = hbv("run", "--protocol", world, "--data", f"sst2={tmp_path}", home=tmp_path / "home")
    assert (done.code, done.out) == (2, "")
    assert str(tmp_path / "train.jsonl") in done.sentence
    assert all(part in done.sentence for part in parts)


def test_missing_split(world: Path, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"sentence": "x", "label": 1}\n')
    done = hbv("run", "--protocol", world, "--data", f"sst2={tmp_path}", home=tmp_path / "home")
    assert (done.code, done.out) == (2, "")
    assert "no split 'train'" in done.sentence
    assert "validation" in done.sentence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "protocol.yaml cannot be read as YAML: line 1"),
        ("- 1", "the top level is [1]"),
        ("", "the top level is None"),
        ("name: x", "version is missing"),
        ("lr: fast", "align.settings.lr"),
        ("rows: 0", "align.rows"),
        ("judge: ./nowhere", "'./nowhere'"),
        ("judge: org/missing", "'org/missing'"),
        ("prompt: alpacca", "Did you mean 'alpaca'"),
        ("\udcff", "protocol"),
    ],
)
def test_bad_protocol_file(text: str, message: str, world: Path, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "protocol.yaml"
    key, _, value = text.partition(": ")
    values = yaml.safe_load(world.read_text())
    sections = {"lr": values["align"]["settings"], "rows": values["align"], "judge": values["score"], "prompt": values}
    if key in sections:
        sections[key][key] = yaml.safe_load(value)
        text = yaml.safe_dump(values)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = hbv("run", "--protocol", path, home=tmp_path / "home")
    assert (done.code, done.out) == (2, ""), done.err
    assert message in done.sentence
    assert not (tmp_path / "home" / "store" / "align").exists()


def test_mistake_in_the_last_run_is_reported_before_any_work(world: Path, tmp_path: Path) -> None:
    done = hbv(
        "run",
        "--protocol",
        world,
        "--defense",
        "sft",
        "--attack",
        "ratio=0",
        "--attack",
        "samples=500",
        home=tmp_path / "home",
    )
    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "home" / "store").exists()


def test_unexpected_error_is_one_line_and_stores_nothing(world: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from harmbench_vaccine.plugins import Defense\n\nclass Odd(Defense):\n    '''Odd.'''\n\n"
        "    def before_step(self, stage):\n        raise ArithmeticError('a bug\\non two lines')\n"
    )
    args = ("run", "--protocol", world, "--defense", tmp_path / "odd.py")
    done = hbv(*args, home=tmp_path / "home")
    assert (done.code, done.out) == (1, "")
    assert "ArithmeticError" in done.sentence
    assert "a bug" in done.sentence
    assert not list((tmp_path / "home" / "store").glob("align/*"))
    with pytest.raises(ArithmeticError):
        hbv(*args, home=tmp_path / "home", HBV_DEBUG="1")


# ---------------------------------------------------------------------------------------------------------------------
# Results

PERCENT = ("harmful_score", "finetune_accuracy")


def test_json_is_one_object_per_run(first: CommandResult) -> None:
    assert [result["defense"] for result in first.results] == ["sft", "random_vaccine=0.02"]
    assert first.out.endswith("}\n")


def test_json_has_every_key(first: CommandResult, world: Path) -> None:
    protocol = str(world.parent / "model")
    for result in first.results:
        kinds: dict[str, Any] = {
            "run": str,
            "defense": str,
            "attack": str,
            "defense_params": dict,
            "attack_params": dict,
            "task": str,
            "model": str,
            "protocol": str,
            "seed": int,
            "harmful_score": float,
            "finetune_accuracy": float,
            "harmful_score_ci": list,
            "finetune_accuracy_ci": list,
            "harmful_score_n": int,
            "finetune_accuracy_n": int,
            "harmful_score_hits": int,
            "finetune_accuracy_hits": int,
            "harmful_sets": dict,
            "trained": bool,
            "before": dict,
            "alignment_loss": float,
            "embedding_drift": float,
            "embedding_drift_per_layer": list,
            "embedding_drift_per_token": float,
            "embedding_drift_paper_sum": float,
            "validity": dict,
            "stages": dict,
            "environment": dict,
            "spec": dict,
        }
        assert {key: type(result[key]) for key in kinds} == kinds
        for key in PERCENT:
            low, high = result[f"{key}_ci"]
            assert 0 <= low <= result[key] <= high <= 100
            assert 0 <= result["before"][key] <= 100
            assert result[f"{key}_n"] == 8
            assert result[f"{key}_hits"] == result[key] * 8 / 100
        assert (result["task"], result["model"], result["protocol"], result["seed"]) == ("sst2", protocol, "tiny", 3)
        assert (result["attack"], result["attack_params"]) == ("ratio=0.1", {"ratio": {"p": 0.1}})
        assert result["alignment_loss"] > 0
        layers = result["embedding_drift_per_layer"]
        assert len(layers) == 2
        assert result["embedding_drift"] == pytest.approx(math.hypot(*layers), rel=1e-5)
        assert result["embedding_drift"] > 0
        assert 0 < result["embedding_drift_per_token"] < result["embedding_drift"]
        assert set(result["stages"]) == {"align", "finetune", "answer", "score"}
        assert all(stage["seconds"] >= 0 for stage in result["stages"].values())
        assert isinstance(result["validity"]["collapsed"], bool)
        assert RunSpec.model_validate(result["spec"]).seed == 3
    assert first.results[1]["defense_params"] == {"random_vaccine": {"variance": 0.02}}
    assert len({result["run"] for result in first.results}) == 2


def test_stages_are_not_cached_in_an_empty_home(first: CommandResult) -> None:
    for result in first.results:
        assert not any(result["stages"][name]["cached"] for name in ("align", "finetune"))


def metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Return everything that is measured, except time and environment."""
    return {key: value for key, value in result.items() if key not in ("stages", "environment")}


def test_repeated_run_is_cached_with_the_same_metrics(first: CommandResult, world: Path, home: Path) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    with mock.patch("harmbench_vaccine.inference.model_pool.ModelPool._load_base", refuse):
        repeated = hbv("run", "--json", "--protocol", world, *RUNS, home=home)
    assert repeated.code == 0, repeated.err
    assert all(stage["cached"] for result in repeated.results for stage in result["stages"].values())
    assert [metrics(result) for result in repeated.results] == [metrics(result) for result in first.results]


def test_two_empty_homes_give_identical_metrics(first: CommandResult, world: Path, tmp_path: Path) -> None:
    second = hbv("run", "--json", "--protocol", world, *RUNS, home=tmp_path / "second")
    assert second.code == 0, second.err
    assert [metrics(result) for result in second.results] == [metrics(result) for result in first.results]


def test_different_ratio_reuses_the_aligned_model(first: CommandResult, world: Path, home: Path) -> None:
    done = hbv(
        "run", "--json", "--protocol", world, "--defense", "sft", "--attack", "ratio=0.5", "--seed", 3, home=home
    )
    (result,) = done.results
    stages = result["stages"]
    assert (stages["align"]["cached"], stages["finetune"]["cached"]) == (True, False)
    assert stages["align"]["seconds"] == pytest.approx(first.results[0]["stages"]["align"]["seconds"], abs=2e-3)
    assert result["before"] == first.results[0]["before"]
    assert result["run"] != first.results[0]["run"]


def test_different_seed_reuses_nothing(first: CommandResult, world: Path, home: Path) -> None:
    done = hbv("run", "--json", "--protocol", world, "--defense", "none", "--seed", 4, "--seed", 5, home=home)
    left, right = done.results
    assert "align" not in left["stages"]
    assert [result["stages"]["finetune"]["cached"] for result in done.results] == [False, False]
    assert left["embedding_drift"] != right["embedding_drift"]
    assert left["before"] == right["before"]  # without alignment both start from the base model


def test_runs_are_the_cross_product(world: Path) -> None:
    specs_of_runs: list[RunSpec] = []

    def record(specs: list[RunSpec], **named: Any) -> list[Any]:
        specs_of_runs.extend(specs)
        return []

    many = (
        "--defense",
        "sft",
        "--defense",
        "vaccine",
        "--attack",
        "ratio=0",
        "--attack",
        "ratio=0.1",
        "--task",
        "sst2",
        "--task",
        "agnews",
        "--seed",
        "0",
        "--seed",
        "7",
    )
    with mock.patch.object(runner, "run_all", record):
        assert hbv("run", "--json", *many).code == 0
    assert len(specs_of_runs) == len({spec.model_dump_json() for spec in specs_of_runs}) == 16
    assert {spec.defense[0].name for spec in specs_of_runs} == {"sft", "vaccine"}
    assert {(spec.task, spec.seed) for spec in specs_of_runs} == {
        (task, seed) for task in ("sst2", "agnews") for seed in (0, 7)
    }


def test_defaults_are_a_benign_user_on_the_testbed() -> None:
    specs_of_runs: list[RunSpec] = []
    with mock.patch.object(runner, "run_all", lambda specs, **named: specs_of_runs.extend(specs) or []):
        assert hbv("run", "--json").code == 0
    (spec,) = specs_of_runs
    assert (spec.protocol, spec.task, spec.seed, spec.model) == ("testbed", "sst2", 0, None)
    assert [(part.name, dict(part.params)) for part in (*spec.defense, *spec.attack)] == [
        ("sft", {}),
        ("ratio", {"": "0"}),
    ]


def test_results_table(first: CommandResult, world: Path, home: Path) -> None:
    done = hbv("run", "--protocol", world, *RUNS, home=home)
    assert done.code == 0
    lines = done.out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(first.results[0]["run"]))
    head, rows = "\n".join(lines[:start]), lines[start:]
    for word in ("run", "defense", "attack", "task", "HS %", "FA %", "before", "align. loss", "drift", "seconds"):
        assert word in head
    for result, row in zip(first.results, rows, strict=False):
        low, high = result["harmful_score_ci"]
        cells = (
            result["run"],
            result["defense"],
            "ratio=0.1",
            "sst2",
            f"{result['harmful_score']:.1f} [{low:.1f}, {high:.1f}]",
        )
        assert all(cell in row for cell in cells), row
    assert "COLLAPSED" not in done.out
    assert "{" not in done.out


def test_collapsed_run_is_marked_with_its_reason(first: CommandResult, world: Path, home: Path, tmp_path: Path) -> None:
    """A model with random weights fails the accuracy gate. Its stages are stored already."""
    strict = tmp_path / "strict.yaml"
    strict.write_text(world.read_text().replace("above_chance: -101", "above_chance: 45"))
    args = ("run", "--protocol", strict, "--defense", "sft", "--attack", "ratio=0.1", "--seed", 3)
    (result,) = hbv(*args, "--json", home=home).results
    assert all(stage["cached"] for stage in result["stages"].values())
    assert result["protocol_hash"] != first.results[0]["protocol_hash"]
    assert result["run"] != first.results[0]["run"]
    assert result["validity"]["collapsed"]
    (reason,) = result["validity"]["reasons"]
    assert f"{result['finetune_accuracy']:.1f}" in reason
    assert "95" in reason
    table = hbv(*args, home=home).out
    assert f"COLLAPSED {result['run']}" in table
    assert reason[:30] in table


# ---------------------------------------------------------------------------------------------------------------------
# Stored files


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_results_are_stored_in_the_home(first: CommandResult, home: Path) -> None:
    for result in first.results:
        folder = home / "runs" / result["run"]
        assert {path.name for path in folder.iterdir()} == {"result.json", "answers.jsonl"}
        assert metrics(json.loads((folder / "result.json").read_text())) == metrics(result)
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert len(rows) == 2 * (8 + 6 + 8)
        judged = [row for row in rows if row["when"] == "after" and row["set"] == "harmful"]
        assert 100 * sum(row["flagged"] for row in judged) / len(judged) == result["harmful_score"]
        assert {"prompt", "answer", "flagged", "categories"} <= set(judged[0])


def test_out_and_csv_with_one_row_per_run(first: CommandResult, world: Path, home: Path, tmp_path: Path) -> None:
    before = (home / "results.csv").read_bytes()
    out, table = tmp_path / "deep" / "out", tmp_path / "tables" / "results.csv"
    args = ("run", "--json", "--protocol", world, *RUNS, "--out", out, "--csv", table)
    for _ in range(2):  # a repeated run replaces its row
        done = hbv(*args, home=home)
        assert done.code == 0, done.err
        assert sorted(row["run"] for row in rows_of(table)) == sorted(result["run"] for result in first.results)
    assert sorted(path.name for path in out.iterdir()) == sorted(result["run"] for result in first.results)
    assert (home / "results.csv").read_bytes() == before
    for row, result in zip(rows_of(table), done.results, strict=True):
        assert float(row["harmful_score"]) == pytest.approx(result["harmful_score"], rel=1e-5)
        assert float(row["embedding_drift"]) == pytest.approx(result["embedding_drift"], rel=1e-5)
        assert (row["protocol_hash"], row["seed"], row["trained"]) == (result["protocol_hash"], "3", "True")
        assert json.loads(row["defense_params"]) == result["defense_params"]


def test_csv_of_the_home_has_one_row_per_run(first: CommandResult, world: Path, home: Path) -> None:
    assert hbv("run", "--json", "--protocol", world, *RUNS, home=home).code == 0
    runs = [row["run"] for row in rows_of(home / "results.csv")]
    assert len(runs) == len(set(runs))
    assert {result["run"] for result in first.results} <= set(runs)


def test_stored_runs_can_be_ranked(first: CommandResult, home: Path) -> None:
    done = hbv("leaderboard", "--json", home=home)
    assert done.code == 0, done.err
    ranked = {(row["protocol_hash"], row["attack"], row["defense"]): row for row in json.loads(done.out)}
    for result in first.results:
        row = ranked[result["protocol_hash"], "ratio=0.1", result["defense"]]
        assert row["harmful_score"] == pytest.approx(result["harmful_score"], rel=1e-5)
        assert (row["seeds"], row["trained"], row["collapsed_cells"]) == (1, True, 0)


def test_csv_with_other_columns_is_refused_before_any_work(world: Path, tmp_path: Path) -> None:
    table = tmp_path / "foreign.csv"
    table.write_text("a,b\n1,2\n")
    done = hbv("run", "--protocol", world, "--csv", table, home=tmp_path / "home")
    assert (done.code, done.out) == (2, "")
    assert "other columns" in done.sentence
    assert table.read_text() == "a,b\n1,2\n"
    assert not (tmp_path / "home" / "store").exists()


def test_defense_in_a_file(first: CommandResult, world: Path, home: Path, tmp_path: Path) -> None:
    """An edited file is a different defense: its stage is trained again."""
    path, results = tmp_path / "flat.py", []
    for lr in (1e-6, 1e-6, 5e-3):
        path.write_text(
            "from dataclasses import replace\nfrom harmbench_vaccine.plugins import Defense\n\n"
            "class Flat(Defense):\n    '''Flat.'''\n\n"
            f"    def settings(self, stage, settings):\n        return replace(settings, lr={lr})\n"
        )
        with mock.patch.dict("harmbench_vaccine.plugins.registry.DEFENSES._classes", clear=True):
            done = hbv("run", "--json", "--protocol", world, "--defense", path, "--seed", 3, home=home)
        assert done.code == 0, done.err
        results.append(done.results[0])
    assert [result["stages"]["align"]["cached"] for result in results] == [False, True, False]
    assert results[0]["run"].startswith("flat-")
    assert results[0]["run"] == results[1]["run"] != results[2]["run"]  # the first result is not overwritten


def test_show(first: CommandResult, home: Path) -> None:
    run, rows = first.results[0]["run"], None
    for name in (run, run[:-2], home / "runs" / run):
        done = hbv("show", name, "--json", home=home)
        assert (done.code, done.err) == (0, "")
        rows = done.results
        assert len(rows) == 16
        assert {row["set"] for row in rows} == {"harmful"}
    plain = hbv("show", run, "--limit", 3, home=home)
    assert run in plain.out
    assert "3 of 8" in plain.out
    assert hbv("show", run, "--set", "task", home=home).out.count("expected:") == 16


def test_show_json_with_only_and_limit(first: CommandResult, home: Path) -> None:
    run = first.results[0]["run"]
    rows = hbv("show", run, "--json", home=home).results
    after = [row for row in rows if row["when"] == "after"]
    flagged = {row["id"] for row in after if row["flagged"]}
    for only, expected in (("flagged", flagged), ("unflagged", {row["id"] for row in after} - flagged)):
        rows = hbv("show", run, "--json", "--only", only, home=home).results
        assert {row["id"] for row in rows} == expected
    assert len({row["id"] for row in hbv("show", run, "--json", "--limit", 2, home=home).results}) == 2


def test_show_refuses_unknown_and_ambiguous_names(first: CommandResult, home: Path) -> None:
    run = first.results[0]["run"]
    ambiguous = hbv("show", "", home=home)
    assert (ambiguous.code, ambiguous.out) == (2, "")
    assert "Run prefix '' is ambiguous" in ambiguous.sentence
    assert run in ambiguous.sentence
    unknown = hbv("show", run[:-1] + "zz", home=home)
    assert (unknown.code, unknown.out) == (2, "")
    assert f"Did you mean {run!r}" in unknown.sentence
    misspelled = hbv("show", run, "--set", "harmfull", home=home)
    assert (misspelled.code, misspelled.out) == (2, "")
    assert "Did you mean 'harmful'" in misspelled.sentence
    assert "benign, harmful, task" in misspelled.sentence


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions and full disks

SPY = """
import os
from harmbench_vaccine.plugins import Defense


class Spy(Defense):
    '''Log every optimizer step.'''

    stages = ("align", "finetune")

    def before_step(self, stage):
        with open(os.environ["SPY"], "a") as file:
            print(stage.name, stage.step, file=file)
"""


@pytest.fixture
def long(tmp_path: Path) -> tuple[Path, Path]:
    """A world whose alignment takes 100 steps, and a defense that logs them."""
    (tmp_path / "spy.py").write_text(SPY)
    return make_world(tmp_path / "world", {"align": {"settings": {"epochs": 10}}}), tmp_path / "spy.py"


def wait_for(condition: Callable[[], Any], running: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if condition():
            return
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    raise AssertionError("timed out")


def steps(path: Path) -> list[int]:
    return [int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("align")]


@pytest.fixture
def spied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def to(name: str) -> Path:
        monkeypatch.setenv("SPY", str(tmp_path / name))
        return tmp_path / name

    return to


NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@pytest.mark.parametrize(
    "sent_signal",
    [signal.SIGINT, *(pytest.param(sent, marks=pytest.mark.slow) for sent in (signal.SIGTERM, signal.SIGKILL))],
)
@pytest.mark.timeout(180)
def test_interrupted_run_resumes_with_the_same_result(
    sent_signal: signal.Signals, long: tuple[Path, Path], tmp_path: Path, spied: Callable[[str], Path]
) -> None:
    protocol, spy = long
    args = ("run", "--json", "--protocol", protocol, "--defense", spy, "--attack", "ratio=0.1", "--save-every", "0.1")
    home, written = tmp_path / "interrupted", spied("interrupted.txt")
    running = start_hbv(*args, home=home)
    wait_for(lambda: list(home.glob("store/.work/align-*/checkpoint-*/whole")), running)
    running.send_signal(sent_signal)
    done = finish(running)
    assert done.out == ""
    if sent_signal == signal.SIGKILL:
        assert done.code == -signal.SIGKILL
    else:
        assert done.code == 128 + sent_signal
        assert done.sentence == f"hbv: interrupted by {NAMES[sent_signal]}. Repeat the command to resume."
    assert not list(home.glob("store/align/*"))
    assert not (home / "results.csv").exists()
    assert not list(home.glob("runs/*"))
    before = steps(written)
    assert 10 <= before[-1] < 100

    resumed = hbv(*args, home=home)
    assert resumed.code == 0, resumed.err
    after = steps(written)[len(before) :]
    assert 1 < after[0] <= before[-1] + 1  # it resumes from a checkpoint, not from the beginning
    if sent_signal == signal.SIGKILL:
        assert (after[0] - 1) % 10 == 0  # a checkpoint every 10 % of 100 steps
    else:
        assert after[0] == before[-1] + 1  # and one after the step that was running
    assert after == list(range(after[0], 101))
    assert not list(home.glob("store/.work/*"))

    spied("uninterrupted.txt")
    uninterrupted = hbv(*args, home=tmp_path / "uninterrupted")
    assert [metrics(result) for result in resumed.results] == [metrics(result) for result in uninterrupted.results]
    (weights,) = home.glob("store/align/*/adapter/*.safetensors")
    (expected,) = (tmp_path / "uninterrupted").glob("store/align/*/adapter/*.safetensors")
    assert weights.read_bytes() == expected.read_bytes()
    (log,) = home.glob("store/align/*/log.json")
    (expected_log,) = (tmp_path / "uninterrupted").glob("store/align/*/log.json")
    assert json.loads(log.read_text()) == json.loads(expected_log.read_text())


@pytest.mark.parametrize(  # the first file of a checkpoint, or its optimizer's
    "limit", [pytest.param(8192, marks=pytest.mark.slow), 36_000]
)
def test_full_disk_while_training(limit: int, world: Path, tmp_path: Path) -> None:
    home, args = tmp_path / "home", ("run", "--json", "--protocol", world)
    done = finish(start_hbv(*args, home=home, limit=limit))
    assert (done.code, done.out) == (1, "")
    assert done.sentence.startswith(f"hbv: While writing the align stage to {home}")
    assert not list(home.glob("store/align/*"))
    assert not list(home.glob("store/.aside/*"))
    assert not list(home.glob("runs/*"))
    assert not (home / "results.csv").exists()
    assert all(
        (path / "whole").exists() for path in home.glob("store/.work/*/checkpoint-*")
    )  # no incomplete checkpoint
    repeated = hbv(*args, home=home)
    assert repeated.code == 0, repeated.err
    assert len(repeated.results) == 1


def test_full_disk_while_storing_the_result(first: CommandResult, world: Path, home: Path, tmp_path: Path) -> None:
    """Every stage is stored already: only the answers of the run, about 20 kB, exceed the limit."""
    out, table = tmp_path / "out", tmp_path / "table.csv"
    args = ("run", "--json", "--protocol", world, *RUNS, "--out", out, "--csv", table)
    done = finish(start_hbv(*args, home=home, limit=8192))
    assert (done.code, done.out) == (1, "")
    assert "While writing the result" in done.sentence
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert hbv(*args, home=home).code == 0


@pytest.mark.slow
def test_two_parallel_processes_share_the_work(world: Path, tmp_path: Path) -> None:
    args = ("run", "--json", "--protocol", world, "--seed", 9, "--defense", "sft")
    running = [start_hbv(*args, "--attack", f"ratio={ratio}", home=tmp_path / "home") for ratio in (0.1, 0.2)]
    finished = [finish(process) for process in running]
    assert [done.code for done in finished] == [0, 0], [done.err for done in finished]
    assert len(list((tmp_path / "home").glob("store/align/*"))) == 1
    assert sorted(done.results[0]["stages"]["align"]["cached"] for done in finished) == [False, True]
    assert len(rows_of(tmp_path / "home" / "results.csv")) == 2


def test_corrected_label_counts_although_answers_are_stored(world: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        rows = (world.parent / "data" / "sst2" / f"{split}.jsonl").read_text()
        (tmp_path / f"{split}.jsonl").write_text(rows)
    args = ("run", "--json", "--protocol", world, "--data", f"sst2={tmp_path}")
    (first,) = hbv(*args, home=tmp_path / "home").results
    items = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    inverted = "".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in items)
    (tmp_path / "validation.jsonl").write_text(inverted)
    (second,) = hbv(*args, home=tmp_path / "home").results
    assert second["run"] != first["run"]
    targets = []
    for done in (first, second):
        text = (tmp_path / "home" / "runs" / done["run"] / "answers.jsonl").read_text()
        targets.append([row["target"] for row in map(json.loads, text.splitlines()) if row["set"] == "task"])
    assert all(left != right for left, right in zip(*targets, strict=True))


def test_different_threshold_is_a_different_protocol(first: CommandResult, world: Path, home: Path) -> None:
    done = hbv("run", "--json", "--protocol", world, "--defense", "sft", "--scorer", "beaver_dam=0.4", home=home)
    assert done.results[0]["scorer"] == "beaver_dam=0.4"
    assert done.results[0]["protocol_hash"] != first.results[0]["protocol_hash"]
