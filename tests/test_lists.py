"""`hbv list` and `hbv info` for every kind of name: runs with filters, protocols, models, tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.experiment.protocol import load_protocol, protocol_names
from harmbench_vaccine.plugins.declarations import read_declarations
from harmbench_vaccine.plugins.registry import REGISTRIES, TASKS, Registry
from harmbench_vaccine.reporting.run_list import parse_since
from support.cli import hbv
from support.results import collapsed, make_result

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)


def store(home: Path, result: Result, **environment: Any) -> None:
    """Store a result without answers."""
    folder = home / "runs" / result.run
    folder.mkdir(parents=True)
    write_run(folder, Result.model_validate({**result.model_dump(), "environment": environment}), [])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home with four runs, the newest last."""
    runs = [
        make_result(run="sft-1", protocol="testbed", **collapsed("60% of answers are empty")),
        make_result(run="vaccine-2", defense="vaccine:rho=5+ewc", attack="ratio=0.1,samples=500", seed=3),
        make_result(run="vaccine-3", defense="vaccine", model="meta-llama/Llama-2-7b-hf", task="sst2:rule=contains"),
        make_result(run="mine-4", defense="./mine.py:lam=2", attack="ratio=0.2", task="gsm8k"),
    ]
    for age, result in zip((400, 8, 3, 0), runs, strict=True):
        store(tmp_path, result, date=(datetime.now(UTC) - timedelta(days=age)).isoformat())
    return tmp_path


def listed(home: Path, *args: str) -> list[str]:
    """Return the ids of `hbv list runs ... --json`."""
    done = hbv("list", "runs", *args, "--json", home=home)
    assert (done.code, done.err) == (0, "")
    return [run["run"] for run in json.loads(done.out)]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    ("args", "runs"),
    [
        ((), ["mine-4", "vaccine-3", "vaccine-2", "sft-1"]),
        (("--defense", "vaccine"), ["vaccine-3", "vaccine-2"]),
        (("--defense", "ewc"), ["vaccine-2"]),
        (("--defense", "vaccine:rho=5+ewc"), ["vaccine-2"]),
        (("--defense", "./mine.py"), ["mine-4"]),
        (("--defense", "sft", "--defense", "ewc"), ["vaccine-2", "sft-1"]),
        (("--defense", "safe-lora"), []),
        (("--attack", "samples"), ["vaccine-2"]),
        (("--attack", "ratio=0.2"), ["mine-4"]),
        (("--task", "sst2"), ["vaccine-3", "vaccine-2", "sft-1"]),
        (("--task", "gsm8k", "--attack", "ratio"), ["mine-4"]),
        (("--protocol", "testbed"), ["sft-1"]),
        (("--model", "Llama-2-7b-hf"), ["vaccine-3"]),
        (("--model", "meta-llama/Llama-2-7b-hf"), ["vaccine-3"]),
        (("--since", "7d"), ["mine-4", "vaccine-3"]),
        (("--since", "2w"), ["mine-4", "vaccine-3", "vaccine-2"]),
        (("--collapsed",), ["sft-1"]),
        (("--limit", "2"), ["mine-4", "vaccine-3"]),
        (("--defense", "vaccine", "--since", "7d"), ["vaccine-3"]),
    ],
)
def test_filters_select_runs(home: Path, args: tuple[str, ...], runs: list[str]) -> None:
    assert listed(home, *args) == runs


@pytest.mark.parametrize("task", ["own=./rows.csv", "own:data=./rows.csv,rule=number"])
def test_a_task_is_found_by_its_file(tmp_path: Path, task: str) -> None:
    store(tmp_path, make_result(run="own-1", task=task))
    store(tmp_path, make_result(run="own-2", task="own=./other.csv"))
    assert listed(tmp_path, "--task", "./rows.csv") == ["own-1"]
    assert set(listed(tmp_path, "--task", "own")) == {"own-1", "own-2"}


def test_the_list_shows_identity_scores_and_collapse(home: Path) -> None:
    done = hbv("list", "runs", home=home)
    assert (done.code, done.err) == (0, "")
    lines = {line.split()[0]: line.split() for line in done.out.splitlines() if line}
    assert {"vaccine-2", "vaccine:rho=5+ewc", "ratio=0.1,samples=500", "3", "50.0", "97.0"} <= set(lines["vaccine-2"])
    assert "collapsed" in lines["sft-1"]
    assert "collapsed" not in lines["vaccine-2"]
    assert "4 of 4 runs" in done.out
    done = hbv("list", "runs", "--defense", "vaccine", "--limit", "1", home=home)
    assert "1 of 2 matching runs" in done.out
    assert "--limit shows more" in done.out


def test_json_has_the_folder_and_the_date(home: Path) -> None:
    (run,) = json.loads(hbv("list", "runs", "--collapsed", "--json", home=home).out)
    assert Path(run["folder"]) == home / "runs/sft-1"
    assert datetime.fromisoformat(run["date"]) < datetime.now(UTC) - timedelta(days=399)
    assert (run["collapsed"], run["harmful_score"], run["scorer"]) == (True, 50.0, "beaver_dam")


def test_a_home_without_runs_gets_the_first_command(tmp_path: Path) -> None:
    done = hbv("list", "runs", home=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "hbv run --defense" in done.out
    assert hbv("list", "runs", "--json", home=tmp_path).out == "[]\n"
    assert not (tmp_path / "runs").exists()


def test_no_match_is_not_an_empty_home(home: Path) -> None:
    done = hbv("list", "runs", "--defense", "antidote", home=home)
    assert done.code == 0
    assert "None of the 4 runs" in done.out


@pytest.mark.parametrize("text", ["{", "[]", '{"run": "x"}', ""])
def test_a_damaged_run_is_a_warning(home: Path, text: str) -> None:
    (home / "runs/vaccine-2/result.json").write_text(text)
    done = hbv("list", "runs", "--json", home=home)
    assert done.code == 0
    assert "vaccine-2" in done.sentence
    assert [run["run"] for run in json.loads(done.out)] == ["mine-4", "vaccine-3", "sft-1"]


def test_a_run_without_a_date_is_listed_by_its_file(home: Path) -> None:
    store(home, make_result(run="old-5"))
    assert listed(home)[0] == "old-5"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--defense", "vacine"), ("Unknown defense 'vacine'", "Did you mean 'vaccine'", "./mine.py")),
        (("--defense", "ratio"), ("'ratio' is an attack, not a defense", "antidote")),
        (("--attack", "beaver_dam"), ("'beaver_dam' is a scorer, not an attack",)),
        (("--task", "sst"), ("Unknown task 'sst'", "Did you mean 'sst2'")),
        (("--protocol", "tesbed"), ("Unknown protocol 'tesbed'", "Did you mean 'testbed'")),
        (("--model", "Llama-3"), ("Unknown model 'Llama-3'", "Llama-2-7b-hf")),
        (("--since", "soon"), ("--since 'soon'", "2026-01-31", "7d")),
        (("--since", "99999999999d"), ("--since", "7d")),
        (("--since", "400000w"), ("--since", "7d")),
        (("--since", ""), ("--since ''",)),
        (("--limit", "0"), ("--limit",)),
        (("extra",), ("extra",)),
    ],
)
def test_invalid_filters_are_refused(home: Path, args: tuple[str, ...], parts: tuple[str, ...]) -> None:
    done = hbv("list", "runs", *args, home=home)
    assert (done.code, done.out) == (2, "")
    assert all(part in done.sentence for part in parts), done.err


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("12h", datetime(2026, 3, 10, 0, tzinfo=UTC)),
        ("7d", datetime(2026, 3, 3, 12, tzinfo=UTC)),
        ("1w", datetime(2026, 3, 3, 12, tzinfo=UTC)),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T10:00+02:00", datetime(2026, 1, 31, 8, tzinfo=UTC)),
    ],
)
def test_since(text: str, time: datetime) -> None:
    assert parse_since(text, NOW) == time


def test_since_is_a_date_or_an_age() -> None:
    with pytest.raises(BadInput):
        parse_since("-7d", NOW)


# ---------------------------------------------------------------------------------------------------------------------
# Plug-ins


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.base.kind)
def test_declarations_equal_the_imported_classes(registry: Registry[Any]) -> None:
    facts = ("stages", "measure", "unverified", "comparison_only", "citation")
    for name, declared in read_declarations(registry, facts).items():
        cls = registry.get(name)
        assert declared is not None
        assert declared.facts == {fact: getattr(cls, fact, "") for fact in facts}
        assert declared.summary == str(cls.__doc__).partition("\n")[0]
        assert declared.title == str(sys.modules[cls.__module__].__doc__).partition("\n")[0]


@pytest.mark.parametrize("kind", ["defenses", "attacks", "tasks", "scorers"])
def test_a_list_describes_every_plugin_in_a_line(kind: str) -> None:
    done = hbv("list", kind)
    assert (done.code, done.err) == (0, "")
    lines = {line.split()[0]: line for line in done.out.splitlines()}
    for details in json.loads(hbv("list", kind, "--verbose", "--json").out):
        line = " ".join(lines[details["name"]].split())
        assert details["title" if kind == "tasks" else "summary"] in line
        for fact in details.get("stages", ()):
            assert fact in line
        assert details.get("measure", "") in line


def test_lists_need_no_torch() -> None:
    code = "import sys; from harmbench_vaccine.cli import main; sys.argv = ['hbv', 'list', 'defenses']; main()"
    probe = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
    done = subprocess.run([sys.executable, "-c", probe + code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"
    assert "vaccine" in done.stdout


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("from harmbench_vaccine.plugins import Attack\nclass Mine(Attack):\n    '''Does it.'''\n", "Does it."),
        ("from harmbench_vaccine.attacks.ratio import Ratio\nclass Mine(Ratio):\n    '''Inherits.'''\n", "Inherits."),
        ("import no_such_module\nclass Mine:\n    pass\n", "cannot be imported"),
        ("class Mine(:\n", "cannot be imported"),
        (
            "from typing import ClassVar\nfrom harmbench_vaccine.plugins import Attack\n"
            "class Mine(Attack):\n    comparison_only: ClassVar[bool] = not False\n",
            "comparison only",
        ),
    ],
)
def test_plugins_of_packages_are_described(
    text: str, described: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"theirs_{abs(hash(text))}"  # modules and plug-ins are imported once for each name
    (tmp_path / f"{name}.py").write_text(text)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[harmbench_vaccine.attacks]\n{name} = {name}:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = hbv("list", "attacks")
    (line,) = [line for line in done.out.splitlines() if line.startswith(name)]
    assert (done.code, done.err) == (0, "")
    assert described in line
    assert described == "cannot be imported" or "package" in line


# ---------------------------------------------------------------------------------------------------------------------
# Protocols and models


def test_verbose_protocols_state_their_values() -> None:
    rows = json.loads(hbv("list", "protocols", "--verbose", "--json").out)
    assert [row["name"] for row in rows] == protocol_names()
    folder = Path(__file__).parents[1] / "harmbench_vaccine/experiment/protocols"
    shown = hbv("list", "protocols", "--verbose").out
    for row in rows:
        written = yaml.safe_load((folder / f"{row['name']}.yaml").read_text())
        base = yaml.safe_load((folder / f"{written['base']}.yaml").read_text()) if "base" in written else {}
        values = base | written
        assert (row["version"], row["model"], row["scorer"], row["accuracy"]) == (
            values["version"],
            values["model"],
            values["score"]["scorer"],
            values["score"]["accuracy"],
        )
        assert (row["align_rows"], row["user_rows"]) == (values["align"]["rows"], values["finetune"]["samples"])
        assert row["hash"] == load_protocol(row["name"]).hash
        assert ("hbv tune" if base else "arXiv") in row["description"]
        assert row["hash"] in shown


def test_protocols_and_models_are_listed_by_name(tmp_path: Path) -> None:
    protocols, models = hbv("list", "protocols"), hbv("list", "models")
    assert json.loads(hbv("list", "protocols", "--json").out) == protocol_names()
    assert all(name in protocols.out for name in protocol_names())
    names = json.loads(hbv("list", "models", "--json").out)
    facts = json.loads(hbv("list", "models", "--verbose", "--json", home=tmp_path).out)
    assert names == [fact["name"] for fact in facts]
    assert [fact["available"] for fact in facts if fact["name"] == "testbed:model"] == [False]
    lines = {line.split()[0]: line for line in models.out.splitlines()}
    assert "vaccine-paper" in lines["meta-llama/Llama-2-7b-hf"]
    assert {name for fact in facts for name in fact["default_of"]} == set(protocol_names())


@pytest.mark.parametrize("name", protocol_names())
def test_info_shows_every_value_of_a_protocol_with_its_source(name: str) -> None:
    (details,) = json.loads(hbv("info", name, "--json").out)
    assert (details["kind"], details["name"]) == ("protocol", name)
    values = {entry["path"]: entry for entry in details["values"]}
    assert values["align.settings.lr"]["value"] == load_protocol(name).align.settings.lr
    assert [path for path, entry in values.items() if entry["value"] and not entry["source"]] == []
    done = hbv("info", name)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"protocol {name}: {details['description'].partition('.')[0]}")
    assert details["description"]
    text = "".join(done.out.split())
    if name == "testbed-tuned":  # it shows only what it changes
        assert "Allothervaluesarethoseoftestbed" in text
        tuned = {path: entry for path, entry in values.items() if "testbed-tuned" in entry["source"]}
        assert len(tuned) == len(load_protocol(name).tuning) == 18
        values = {path: entry for path, entry in tuned.items() if entry["changed"]}
        assert tuned.keys() - values.keys() == {"defenses.backdoor_align.rows"}
    for path, entry in values.items():
        assert path.partition(".")[2] in text
        assert "".join(entry["source"].split())[:10] in text


def test_info_of_a_protocol_file(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "harmbench_vaccine/experiment/protocols/testbed.yaml"
    text = source.read_text().replace("name: testbed", "name: mine").replace("rows: 1000", "rows: 900")
    (tmp_path / "mine.yaml").write_text("\n".join(line for line in text.splitlines() if line[:1] != "#"))
    (details,) = json.loads(hbv("info", tmp_path / "mine.yaml", "--json").out)
    assert (details["name"], details["align_rows"], details["description"]) == ("mine", 900, "")
    assert hbv("info", tmp_path / "mine.yaml").out.startswith("protocol mine")


def test_info_of_a_model() -> None:
    done = hbv("info", "facebook/opt-2.7b")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("model facebook/opt-2.7b\n")
    assert "lisa-paper, vaccine-paper" in done.out


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("info", "tesbed"), ("Unknown name 'tesbed'", "Did you mean 'testbed'", "antibody", "beaver_dam")),
        (("info", "vacc"), ("Unknown name 'vacc'", "Did you mean 'vaccine'")),
        (("info", "vaccine-12"), ("'vaccine-12' is a stored run", "hbv show vaccine-12345678")),
        (("info", "no.yaml"), ("Protocol file 'no.yaml' does not exist",)),
        (("list", "defences"), ("Unknown command 'defences'", "Did you mean 'defenses'", "runs")),
        (("list", "tasks", "--limit", "3"), ("--limit",)),
        (("run", "--dry-run", "--defense", "ratio"), ("'ratio' is an attack, not a defense", "vaccine")),
        (("run", "--dry-run", "--attack", "vaccine"), ("'vaccine' is a defense, not an attack", "ratio")),
        (("run", "--dry-run", "--task", "beaver-dam"), ("is a scorer, not a task", "sst2")),
        (("run", "--dry-run", "--scorer", "sst2"), ("'sst2' is a task, not a scorer", "beaver_dam")),
        (("run", "--dry-run", "--protocol", "vaccine"), ("is a defense, not a protocol", "'vaccine-paper'")),
        (("run", "--dry-run", "--set", "score.scorer=kl"), ("'kl' is a defense, not a scorer",)),
    ],
)
def test_names_of_another_kind_are_refused(args: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path) -> None:
    store(tmp_path, make_result(run="vaccine-12345678"))
    done = hbv(*args, home=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert all(part in done.sentence for part in parts), done.err


def test_list_of_tasks_names_the_way_to_your_own_rows() -> None:
    assert "--task ./rows.jsonl" in hbv("list", "tasks").out
    assert json.loads(hbv("list", "tasks", "--json").out) == sorted(TASKS.entries())
