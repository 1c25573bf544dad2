"""Bad input: exit code 2, one sentence that names the value and what is allowed, and nothing stored or created."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harmbench_vaccine.cli import run as run_command
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import MAX_FOLDERS, check_writable, home, user_path
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import leaf_values, load_protocol, protocol_names
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from support.cli import HBV, CommandResult, hbv
from support.examples import examples
from support.world import make_world

PROTOCOL = load_protocol("testbed")
LONG = "a" * 300
NINES = "9" * 5000
DEEP = "[" * 3000
NESTED = "a/" * 2000


def refused(done: CommandResult, *parts: str) -> None:
    """Assert that a command ended as bad input, with these parts in its sentence."""
    assert (done.code, done.out) == (2, ""), done.err
    assert "unexpected" not in done.err
    for part in parts:
        assert part in done.sentence
    assert len(done.sentence) < 6000


# ---------------------------------------------------------------------------------------------------------------------
# Ranges

SETTINGS = {
    "lr": ["0", "-1", ".nan", ".inf", "1e7", "fast", "true", "'1'", "null", "[1]", "{}", "2001-01-01", NINES],
    "epochs": ["0", "-1", ".nan", ".inf", "10001", "1e300", "no"],
    "batch": ["0", "-4", "1.5", "1e3", "true", "'4'", "1000000001"],
    "accumulation": ["0", "-1", "2.5"],
    "schedule": ["step", "cosin", "''", "1", "null", "cosine_with_restarts"],
    "warmup": ["-0.1", "1.1", ".nan"],
    "weight_decay": ["-0.1", ".inf"],
    "max_grad_norm": ["-1", ".nan"],
    "adam_beta1": ["1", "-0.1", ".nan"],
    "adam_beta2": ["1", "2"],
    "lora_rank": ["0", "-8", "8.5", "4097"],
    "lora_alpha": ["0", "-4", ".inf"],
    "lora_dropout": ["1", "-0.1"],
    "lora_targets": ["[]", "q_proj", "[1]", "['']", "{}", "null"],
    "max_length": ["0", "-1", "1.5"],
    "full": ["1", "yes", "'true'"],
}
VALUES = {
    "version": ["0", "-1", "1.5", "true", "'1'"],
    "model": ["''", "1", "null", "[a]", '"a\\nb"', '"\\ud800"'],
    "models": ["a", "[1]"],
    "dtype": ["float16", "32"],
    "quantization": ["2bit", "4"],
    "rows": ["all", "1"],
    "prompt": ["''", "1"],
    "topology": ["tripple", "null"],
    "data.sst2": ["''", "1", "[]"],
    "splits.train": ["''", "1", "null"],
    "align.rows": ["0", "-1", "1.5", NINES, "2001-01-01"],
    "align.instructions": ["-1", "1.5", "true", NINES],
    "align.source": ["unsafe"],
    "finetune.samples": ["0", "true"],
    "finetune.tasks": ["3", "[]", "{sst2: 1}"],
    "finetune.tasks.agnews.samples": ["0", "x"],
    "finetune.tasks.agnews.settings.lr": ["-1", "fast"],
    "finetune.tasks.agnews.settings.lrr": ["1"],
    "answer.harmful.prompts": ["0", "-1"],
    "answer.harmful.max_new_tokens": ["0", "1.5"],
    "answer.benign.prompts": ["0"],
    "answer.task_items": ["0", "-1"],
    "answer.task_tokens.sst2": ["0", "many"],
    "answer.items.sst2": ["0"],
    "answer.rows_in_order": ["safe"],
    "score.scorer": ["''", "1"],
    "score.accuracy": ["lenient"],
    "score.drift_rows": ["0"],
    "score.drift_batch": ["0"],
    "gates.degenerate": ["-1", "101", ".nan", ".inf"],
    "gates.refusals": ["-1", "100.1"],
    "gates.above_chance": ["-102", "101", ".nan"],
    "gates.accuracy_before": ["-1", "101"],
    "defenses": ["3", "[vaccine]"],
    "defenses.vaccine": ["3", "[1]"],
}
REPLACEMENTS = [
    *((f"align.settings.{key}", value) for key, values in SETTINGS.items() for value in values),
    *((path, value) for path, values in VALUES.items() for value in values),
]


@pytest.mark.parametrize(("path", "value"), REPLACEMENTS, ids=[f"{path}={value[:20]}" for path, value in REPLACEMENTS])
def test_value_out_of_range_is_refused_with_its_name(path: str, value: str) -> None:
    with pytest.raises(BadInput) as refusal:
        PROTOCOL.replaced({path: value})
    assert path in str(refusal.value)
    assert len(str(refusal.value)) < 4000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("prompt", "alpacca", "Unknown prompt template 'alpacca'. Did you mean 'alpaca'"),
        ("score.scorer", "unknown", "Unknown scorer 'unknown'"),
        ("score.scorer", "refusal_keywords+", "'refusal_keywords+' cannot be parsed"),
        ("finetune.tasks.agnew.samples", "3", "Unknown task 'agnew'. Did you mean 'agnews'"),
        ("answer.task_tokens.sst", "4", "Unknown task 'sst'. Did you mean 'sst2'"),
        ("defenses.vaccine.rho", "-1", "rho=-1 is not allowed; allowed: a number >= 0"),
        ("defenses.vaccine.rho", ".nan", "rho=nan is not allowed"),
        ("defenses.vaccine.rho", "[]", "rho=[] is not allowed"),
        ("defenses.vaccine.roh", "1", "Unknown parameter 'roh' of defense 'vaccine'. Did you mean 'rho'"),
        ("defenses.vacine.rho", "1", "Unknown defense 'vacine'. Did you mean 'vaccine'"),
        ("attacks.ratio.p", "2", "p=2 is not allowed"),
        ("scorers.beaver_dam.threshold", "2", "threshold=2 is not allowed"),
        ("tasks.agnews.rule", "exact", "rule=exact is not allowed"),
    ],
)
def test_value_of_a_plugin_is_checked_although_the_run_does_not_use_it(path: str, value: str, message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        Experiment.settle(RunSpec(values={path: value}))
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", protocol_names())
def test_every_value_of_a_protocol_has_a_range(name: str) -> None:
    """No value can be replaced by a list of a list, except parameters of plug-ins, whose classes check them."""
    protocol = load_protocol(name)
    for path, _ in leaf_values(protocol):
        if path.partition(".")[0] not in ("name", "defenses", "attacks", "scorers", "tasks"):
            with pytest.raises(BadInput):
                protocol.replaced({path: "[[1]]"})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("align.settings.lr", "1000000"),
        ("align.settings.epochs", "0.5"),
        ("align.settings.warmup", "1"),
        ("align.settings.schedule", "inverse_sqrt"),
        ("align.settings.lora_rank", "4096"),
        ("align.settings.adam_beta1", "0"),
        ("gates.above_chance", "-101"),
        ("gates.accuracy_before", "null"),
        ("score.judge", "''"),
        ("answer.cut_at", '"\\n"'),
    ],
)
def test_ends_of_the_ranges_are_allowed(path: str, value: str) -> None:
    assert load_protocol("testbed").replaced({path: value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr=0.0", "lr is 0.0. Input should be greater than 0"),
        ("epochs=float('nan')", "epochs is nan. Input should be a finite number"),
        ("adam_beta1=1.0", "adam_beta1 is 1.0. Input should be less than 1"),
        ("batch=0", "batch is 0. Input should be greater than or equal to 1"),
    ],
)
def test_settings_that_a_defense_changes_have_the_same_ranges(setting: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from dataclasses import replace\nfrom harmbench_vaccine.plugins import Defense\n\n"
        "class Odd(Defense):\n    '''Odd.'''\n\n"
        f"    def settings(self, stage, settings):\n        return replace(settings, {setting})\n"
    )
    with pytest.raises(BadInput) as refusal:
        Experiment.settle(RunSpec(defense=parse_plugins(str(tmp_path / "odd.py"))))
    assert message in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--set", "align.settings.lr=2001-99-99"), ("align.settings.lr is '2001-99-99'", "valid number")),
        (("--set", f"align.rows={NINES}"), ("'align.rows'", "5000 digits")),
        (("--set", f"align.settings.lr={DEEP}"), ("'align.settings.lr'", "nested too deeply")),
        (("--set", "align.settings.epochs=-1"), ("align.settings.epochs is -1", "greater than 0")),
        (("--set", "align.settings.epochs=1e-9"), ("'align'", "no step", "more epochs")),
        (("--set", "align.settings.lora_targets=[nope]"), ("LoRA target 'nope'", "q_proj")),
        (("--set", "data.=x"), ("data",)),
        (("--set", "align=1"), ("'align'",)),
        (("--set", "align.settings.lr.x=1"), ("'align.settings.lr.x'",)),
        (("--set", f"{LONG}=1"), ("Unknown protocol value 'aaa",)),
        (("--set", "=1"), ("PATH=VALUE",)),
        (("--model", "~nosuch/m"), ("'~nosuch/m'", "no home folder")),
        (("--model", LONG), ("aaa", "File name too long")),
        (("--model", ""), ("empty",)),
        (("--defense", "~nosuch/x.py"), ("~nosuch",)),
        (("--defense", f"./{LONG}.py"), ("File name too long",)),
        (("--attack", NESTED), (str(MAX_FOLDERS),)),
        (("--task", f"own:data={LONG}"), ("File name too long",)),
        (("--scorer", "shieldgemma:policies=/dev/zero"), ("/dev/zero is not a regular file",)),
        (("--scorer", "harmbench:template=~nosuch"), ("~nosuch",)),
        (("--scorer", "harmbench:template=."), ("not a regular file",)),
        (("--protocol", f"{LONG}.yaml"), ("File name too long",)),
        (("--protocol", "~nosuch/x.yaml"), ("~nosuch",)),
        (("--data", "sst2=~nosuch"), ("~nosuch",)),
        (("--data", "sst2=\udcff"), ("not UTF-8 text",)),
        (("--out", "~nosuch"), ("~nosuch",)),
        (("--out", NESTED), (str(MAX_FOLDERS),)),
        (("--csv", LONG), ("File name too long",)),
        (("--csv", "/dev/zero"), ("/dev/zero is not a",)),
        (("--seed", "-1"), ("--seed", "-1")),
        (("--seed", "99999999999999999999"), ("--seed", "2**63")),
        (("--seed", NINES), ("--seed",)),
        (("--gpu-memory", "nan"), ("--gpu-memory",)),
        (("--tensor-parallel", "0"), ("--tensor-parallel", "1<=x<=1024")),
        (("--tensor-parallel", "2"), ("models run on the CPU", "Allowed: 1, or --device cuda")),
        (("--save-every", "nan"), ("--save-every",)),
        (("--backend", "vlm"), ("Unknown value 'vlm' of --backend. Did you mean 'vllm'?",)),
        (("--attack", "samples=0"), ("n=0", ">= 1")),
        (("--defense", f"vaccine:rho={NINES}"), ("rho=999",)),
        (("--defense", "x" * 100_000), ("xxx",)),
    ],
)
def test_options_of_run(args: tuple[str, ...], parts: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    """A dry run refuses what the run refuses, with the same sentence."""
    protocol = [] if "--protocol" in args else ["--protocol", world]
    for dry_run in ([], ["--dry-run"]):
        refused(hbv("run", *protocol, *args, *dry_run, home=tmp_path / "home"), *parts)
    assert not (tmp_path / "home" / "store").exists()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("info", "~nosuch/x.py"), ("~nosuch",)),
        (("info", "vacine"), ("'vacine'", "'vaccine'")),
        (("info", "vaccine", "--protocol", "tesbed"), ("'testbed'",)),
        (("check", f"./{LONG}.py"), ("File name too long",)),
        (("check", "~nosuch/x.py"), ("~nosuch",)),
        (("new", "defense", LONG), ("File name too long",)),
        (("new", "defense", "a/b"), ("'a/b'", "letters, digits")),
        (("new", "defense", ""), ("''",)),
        (("new", "defense", "mine", "--dir", "~nosuch"), ("~nosuch",)),
        (("show", LONG), ("Unknown run", "aaa...")),
        (("show", "~nosuch"), ("Unknown run '~nosuch'",)),
        (("show", "x", "--limit", "0"), ("--limit",)),
        (("show", "x", "--limit", NINES), ("--limit",)),
        (("score", LONG), ("Unknown run",)),
        (("score", "x", "--threshold", "nan"), ("--threshold",)),
        (("why", "../x"), ("Unknown run",)),
        (("leaderboard", LONG), ("File name too long",)),
        (("leaderboard", "~nosuch/x.csv"), ("~nosuch",)),
        (("leaderboard", "/dev/zero"), ("not a regular file",)),
        (("leaderboard", "."), (". ",)),
        (("published", "--limit", "0"), ("--limit",)),
        (("published", "--paper", "x" * 100_000), ("xxx",)),
    ],
)
def test_options_of_other_commands(
    args: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(hbv(*args, home=tmp_path / "home"), *parts)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Paths and the environment


@pytest.mark.parametrize("text", ["", "~no-such-user/x", LONG, "a\0b", "\udcff", NESTED, "/" + "b" * 5000])
def test_path_that_no_file_can_have(text: str) -> None:
    with pytest.raises(BadInput, match=r"path|Path"):
        user_path(text)


def test_path_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    assert user_path("nothing/there") == Path("nothing/there")
    (tmp_path / "file").touch()
    assert user_path(tmp_path / "file" / "below") == tmp_path / "file" / "below"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BadInput, match="symbolic links"):
        user_path(tmp_path / "loop")


@pytest.mark.parametrize("value", ["~nosuch", f"/{LONG}", NESTED, "/dev/null/x"])
@pytest.mark.parametrize("command", [("show", "x"), ("leaderboard",), ("run", "--dry-run")])
def test_home_that_cannot_be(
    value: str, command: tuple[str, ...], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*command, "--protocol", str(world)] if command[0] == "run" else [*command]
    refused(hbv(*arguments, HBV_HOME=value))


def test_empty_home_is_the_default_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBV_HOME", "")
    assert home().name == "harmbench-vaccine"


def test_dry_run_needs_a_home_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x" / "y"):
        with pytest.raises(BadInput, match="cannot be written to"):
            check_writable(folder, "The folder")
    check_writable(tmp_path / "new" / "folder", "The folder")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "2"}, "torchrun"),
    ],
)
def test_variables_of_a_launcher(variables: dict[str, str], part: str) -> None:
    refused(hbv("list", "attacks", **variables), part)


def started(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HBV, *args], stderr=subprocess.PIPE, text=True, check=False, **options)


def test_arguments_that_are_not_text() -> None:
    done = subprocess.run([*map(str.encode, HBV), b"list", b"\xff"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"is not UTF-8 text" in done.stderr


def test_working_directory_that_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = started("list", "attacks", cwd=tmp_path / "gone", preexec_fn=(tmp_path / "gone").rmdir)
    assert done.returncode == 2
    assert done.stderr.startswith("hbv: The working directory is gone")


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        (">&-", 0, ""),
        ("<&-", 0, ""),
        ("2>&-", 0, ""),
        ("> /dev/full", 1, "hbv: Reading or writing failed: No space left on device.\n"),
    ],
)
def test_closed_and_full_streams(redirection: str, code: int, message: str) -> None:
    done = subprocess.run(
        f'"{sys.executable}" -m harmbench_vaccine list attacks {redirection}',
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, message)


# ---------------------------------------------------------------------------------------------------------------------
# Generated input

PATHS = sorted({path for path, _ in leaf_values(PROTOCOL)})
SPECS = [
    *("sft", "vaccine:rho=5", "vaccine+ewc:lambda=3", "none", "ratio=0.1,samples=20", "ratio=0.1", "optimizer:lr=0.1"),
    *("sst2", "agnews:rule=equals", "own:data=x.csv", "beaver_dam=0.4", "harmbench:template=x", "./mine.py", "testbed"),
    *("testbed:model", "org/name@main", "sst2=x", "align.settings.lr=1e-3", "{a: [1, 2]}", "~/x", "0.5", "3", "vllm"),
]
ARGUMENT = (
    st.text(min_size=1, max_size=40)
    | st.sampled_from(SPECS)
    | st.text(alphabet="+:=,./~[]{}&*!'\"- \n09e.", max_size=20)
)


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    """Return a valid text with a part removed, repeated or replaced."""
    text = draw(st.sampled_from([*SPECS, *PATHS]))
    start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    return text[:start] + draw(st.sampled_from(["", text[start:end] * 2, "\x1b", "9" * 400, "é", "="])) + text[end:]


VALUE = (
    ARGUMENT | _mutated() | st.integers().map(str) | st.floats().map(repr) | st.sampled_from([NINES, DEEP, LONG, ""])
)
OPTION = st.sampled_from(
    ["--defense", "--attack", "--task", "--seed", "--model", "--data", "--scorer", "--backend", "--out", "--csv"]
)
SET = st.tuples(st.sampled_from(PATHS) | VALUE, VALUE).map("=".join)
ARGUMENTS = st.lists(st.tuples(OPTION, VALUE) | st.tuples(st.just("--set"), SET | VALUE), min_size=1, max_size=3)


@contextmanager
def _without_estimates() -> Iterator[None]:
    """Check everything, but do not time models."""
    with mock.patch.object(run_command, "_print_dry_run"):
        yield


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARGUMENTS)
def test_any_input_of_run_is_accepted_or_refused_in_a_sentence(
    generated_folder: Path, arguments: list[tuple[str, str]]
) -> None:
    before = sorted(generated_folder.rglob("*"))
    with _without_estimates():
        done = hbv(
            "run",
            "--dry-run",
            "--protocol",
            generated_folder / "tiny.yaml",
            *(part for pair in arguments for part in pair),
            home=generated_folder / "home",
        )
    assert done.code in (0, 1, 2)
    assert "unexpected" not in done.err
    assert "Traceback" not in done.err
    if done.code:
        assert done.sentence.startswith("hbv: ")
    assert sorted(generated_folder.rglob("*")) == before


@pytest.fixture
def generated_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small world."""
    folder = tmp_path_factory.mktemp("generated")
    make_world(folder)
    monkeypatch.chdir(folder)
    return folder


@st.composite
def _damaged(draw: st.DrawFn) -> Any:
    """Return the values of a protocol file with one of them replaced, removed or added."""
    values: Any = yaml.safe_load(Path(_protocol_file()).read_text(encoding="utf-8"))
    group, key = values, draw(st.sampled_from(sorted(values)))
    while isinstance(group[key], dict) and group[key] and draw(st.booleans()):
        group, key = group[key], draw(st.sampled_from(sorted(group[key])))
    change = draw(st.sampled_from(["replace", "remove", "add"]))
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=6,
    )
    if change == "remove":
        del group[key]
    else:
        group[key if change == "replace" else draw(st.text(max_size=9))] = draw(anything)
    return values


def _protocol_file() -> Path:
    return Path(load_protocol.__code__.co_filename).parent / "protocols" / "testbed.yaml"


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_damaged())
def test_any_protocol_file_is_read_or_refused(tmp_path: Path, values: Any) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        Experiment.settle(RunSpec(protocol=str(tmp_path / "p.yaml")))
    except BadInput as refusal:
        message = str(refusal)
    else:
        message = ""
    assert "\n" not in message
