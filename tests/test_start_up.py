"""The libraries that a command imports: one that trains nothing starts without those that take seconds to import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harmbench_vaccine.core.torch_build import cuda_version, is_cpu_build
from support.cli import hbv

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "matplotlib", "scipy.stats")
NUMBERS = ("numpy", "scipy", "pandas")
STARTED = ("run", "--defense", "sft", "--defense", "vaccine", "--attack", "ratio=0.1")
SCRIPT = """
import atexit, json, sys
sys.argv = ["hbv", *sys.argv[2:]]
atexit.register(lambda: print(json.dumps([name for name in NAMES if name in sys.modules]), file=sys.stderr))
from harmbench_vaccine.cli import main
main()
"""


def start(*arguments: object, home: Path, **environment: str) -> tuple[str, list[str]]:
    """Run a command in another process; return its output, and the heavy libraries that it imported."""
    code = SCRIPT.replace("NAMES", repr((*HEAVY, *NUMBERS)))
    done = subprocess.run(
        [sys.executable, "-c", code, "", *map(str, arguments)],
        env={**os.environ, "HBV_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


LISTS = ("defenses", "attacks", "tasks", "scorers", "protocols", "models", "suites", "runs")


@pytest.mark.parametrize("name", LISTS)
def test_list_imports_no_heavy_library(name: str, own_home: Path) -> None:
    printed, imported = start("list", name, home=own_home)
    assert printed
    assert imported == []


COMMANDS = [("--version",), ("run", "--help"), ("sweep", "--help"), ("judge", "train", "--help"), ("info", "vaccine")]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_without_runs_imports_no_heavy_library(command: tuple[str, ...], own_home: Path) -> None:
    assert start(*command, home=own_home)[1] == []


@pytest.fixture(scope="module")
def stored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, list[str]]:
    """The options of two runs, the home where they are stored, and their ids."""
    home = tmp_path_factory.mktemp("stored") / "home"
    options = [*STARTED, "--protocol", str(world)]
    done = hbv(*options, "--json", home=home)
    assert done.code == 0, done.err
    return options, home, [result["run"] for result in done.results]


STORED = {
    "run": ((), NUMBERS),
    "run --json": (("--json",), NUMBERS),
    "run --published": (("--published",), ("pandas",)),
    "dry run": (("--dry-run",), ("pandas",)),
}


@pytest.mark.parametrize(("options", "further"), STORED.values(), ids=STORED)
def test_stored_run_imports_no_heavy_library(
    stored: tuple[list[str], Path, list[str]], options: tuple[str, ...], further: tuple[str, ...]
) -> None:
    """Nothing is trained, answered or judged. Only the intervals of the dry run need scipy, but not its statistics."""
    command, home, _ = stored
    printed, imported = start(*command, *options, home=home)
    assert printed
    assert not {*HEAVY, *further} & {*imported}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "further"),
    [
        (("show", "FIRST"), NUMBERS),
        (("why", "FIRST"), NUMBERS),
        (("verify", "FIRST", "--cached"), NUMBERS),
        (("compare", "FIRST", "SECOND"), ("pandas",)),
        (("leaderboard",), ()),
        (("list", "runs"), NUMBERS),
        (("store", "du"), NUMBERS),
    ],
    ids=lambda part: " ".join(part),
)
def test_command_on_stored_runs_imports_no_heavy_library(
    stored: tuple[list[str], Path, list[str]], command: tuple[str, ...], further: tuple[str, ...]
) -> None:
    _, home, (first, second) = stored
    names = {"FIRST": first, "SECOND": second}
    printed, imported = start(*(names.get(part, part) for part in command), home=home)
    assert printed
    assert not {*HEAVY, *further} & {*imported}


@pytest.mark.slow
def test_plan_of_stored_runs_imports_no_heavy_library(
    stored: tuple[list[str], Path, list[str]], world: Path, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"name: two\ntitle: Two runs\nprotocol: {world}\ndefenses: [sft, vaccine]\nattacks: [ratio=0.1]\n")
    printed, imported = start("sweep", suite, "--plan", home=stored[1])
    assert "2 finished" in printed
    assert not {*HEAVY, "pandas"} & {*imported}


# ---------------------------------------------------------------------------------------------------------------------
# The output of stored runs


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--verbose",), ("--published",)])
def test_stored_run_prints_the_same_again(stored: tuple[list[str], Path, list[str]], options: tuple[str, ...]) -> None:
    """Without heavy libraries in a new process as with them in this one, where the runs were measured."""
    command, home, _ = stored
    with_libraries = hbv(*command, *options, home=home)
    assert start(*command, *options, home=home)[0] == with_libraries.out


def test_stored_run_has_the_same_result(stored: tuple[list[str], Path, list[str]]) -> None:
    """Dates and the time of a stage that is read instead of created aside, every value is that of the measured run."""
    command, home, ids = stored

    def results() -> list[str]:
        texts = [(home / "runs" / run / "result.json").read_text(encoding="utf-8") for run in ids]
        values = [json.loads(text) for text in texts]
        for result in values:
            del result["environment"]["date"]
        return [json.dumps(result).replace('"cached": false', '"cached": true') for result in values]

    before = results()
    start(*command, home=home)
    assert results() == before


@pytest.mark.slow
def test_damaged_stage_is_created_again(stored: tuple[list[str], Path, list[str]], tmp_path: Path) -> None:
    command, home, _ = stored
    before = hbv(*command, "--json", home=home).results
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    answers = next(path for path in sorted((copy / "store").glob("answer/*/answers.jsonl")))
    answers.write_text(answers.read_text() + " ")
    again = hbv(*command, "--json", home=copy)
    assert "the artifact is damaged and is created again" in again.err
    for name in ("run", "harmful_score", "finetune_accuracy", "alignment_loss"):
        assert [result[name] for result in again.results] == [result[name] for result in before]


# ---------------------------------------------------------------------------------------------------------------------
# The build of torch


def test_build_of_torch_is_read_without_importing_it() -> None:
    import torch

    code = (
        "import sys\nfrom harmbench_vaccine.core.torch_build import cuda_version, is_cpu_build\n"
        "print(cuda_version(), is_cpu_build(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    is_cpu = torch.version.cuda is None and torch.version.hip is None
    assert done.stdout.split() == [str(torch.version.cuda), str(is_cpu), "False"]
    assert (cuda_version(), is_cpu_build()) == (torch.version.cuda, is_cpu)


@pytest.mark.parametrize(("cuda", "hip", "is_cpu"), [(None, None, True), ("13.0", None, False), (None, "7.1", False)])
def test_build_for_gpus_needs_torch_to_find_them(tmp_path: Path, cuda: str, hip: str, is_cpu: bool) -> None:
    """A package in the place of torch: without GPUs in its build, the device is known without importing it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"cuda = {cuda!r}\nhip = {hip!r}\n")
    (tmp_path / "torch" / "__init__.py").write_text(
        "class cuda:\n    @staticmethod\n    def is_available():\n        return True\n"
    )
    code = "import sys\nfrom harmbench_vaccine.core.device import device\nprint(device(), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "HBV_DEVICE"}
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == (["cpu", "False"] if is_cpu else ["cuda", "True"])
