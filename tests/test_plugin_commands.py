"""The plug-in commands: `hbv list --verbose`, `hbv info` and `hbv new`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Plugin, registry, resolve_params
from harmbench_vaccine.plugins.composition import parse_plugins, resolve_plugins
from harmbench_vaccine.reporting import info_pages
from harmbench_vaccine.reporting import plugin_pages as view
from support import tiny
from support.cli import hbv
from support.world import make_world

ROOT = Path(__file__).parents[1]
KINDS: dict[str, registry.Registry[Any]] = {
    "defenses": registry.DEFENSES,
    "attacks": registry.ATTACKS,
    "tasks": registry.TASKS,
    "scorers": registry.SCORERS,
}
BUILT_IN: list[type[Plugin]] = [kind.get(name) for kind in KINDS.values() for name in kind.entries()]

FULL = '''"""Full: the math is [here]."""

from typing import ClassVar, Literal

from harmbench_vaccine.plugins import Defense, param


class Full(Defense):
    """Declares every fact.

    And more below.
    """

    citation: ClassVar[str] = "Someone 2031"
    stages: ClassVar[tuple[str, ...]] = ("align", "repair")
    cost: ClassVar[str] = "7F 9B"
    once: ClassVar[str] = "11F"
    memory: ClassVar[str] = "2 copies of the adapter"
    data: ClassVar[tuple[str, ...]] = ("paired rows", "harmful rows")
    neutral: ClassVar[dict[str, object]] = {"limit": None, "loud": False}

    limit: float | None = param(None, "the [limit]", source="its paper, table 3", main=True, gt=0, le=8)
    way: Literal["up", "down"] | None = param("up", "the way", source="its code")
    label: str | None = param("x", "the label", source="its code")
    loud: bool = param(True, "whether it is loud", source="its code")
    exact: int = param(3, "never none", source="its code", ge=1)
'''


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """Return the file of a defense that declares every fact."""
    path = tmp_path / "full.py"
    path.write_text(FULL)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the protocol file of a tiny world that overrides a parameter of Vaccine and of the ratio attack."""
    changes = {"defenses": {"vaccine": {"rho": 6.5}}, "attacks": {"ratio": {"p": 0.375}}}
    return make_world(tmp_path_factory.mktemp("world"), changes)


def described(*args: object) -> list[dict[str, Any]]:
    """Return the output of `hbv info ... --json`."""
    done = hbv("info", *args, "--json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


# ---------------------------------------------------------------------------------------------------------------------
# list --verbose


@pytest.mark.parametrize("args", [("list", "defenses"), ("list", "defenses", "--verbose"), ("info", "output_guard")])
def test_a_defense_without_a_stage_acts_on_answers(args: tuple[str, ...]) -> None:
    out = hbv(*args).out
    assert re.search(r"^(output_guard|stage) +answers\b", out, re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_verbose_list_contains_the_declared_facts(kind: str) -> None:
    plain, as_json = hbv("list", kind, "--verbose"), hbv("list", kind, "--verbose", "--json")
    assert (plain.code, plain.err, as_json.code, as_json.err) == (0, "", 0, "")
    rows = {row["name"]: row for row in json.loads(as_json.out)}
    assert list(rows) == json.loads(hbv("list", kind, "--json").out)
    lines = {line.split()[0]: line for line in plain.out.splitlines()[1:] if line[0] != " "}
    for name, cls in KINDS[kind].loadable().items():
        assert rows[name]["kind"] == cls.kind
        assert rows[name]["citation"] == cls.citation
        assert rows[name]["summary"] in str(cls.__doc__)
        for fact in view.FACTS[cls.kind]:
            declared = cls.model_fields[fact].default if fact in cls.model_fields else getattr(cls, fact, "")
            assert rows[name][fact] == (list(declared) if isinstance(declared, tuple) else declared)
        texts = [cls.citation, cls.cost] if kind == "defenses" else [rows[name]["summary"]]
        assert all((text or "none").split()[0] in lines[name] for text in texts)  # the rest may be folded


def test_verbose_list_shows_every_fact_of_a_defense(full: Path) -> None:
    shown = _text(view.plugin_table("defense", [view.plugin_facts(registry.DEFENSES.get(str(full)))]))
    facts = ["full", "align, repair", "Someone 2031", "7F 9B", "11F", "2 copies of the adapter"]
    for fact in [*facts, "paired rows, harmful rows"]:
        assert fact in shown


def test_verbose_list_shows_the_excluded_attacks() -> None:
    class Exclusive(registry.ATTACKS.get("ratio")):  # type: ignore[misc]
        """Excludes attacks."""

        excludes = ("samples", "other")
        trains = False
        citation = "Someone 1999"

    shown = _text(view.plugin_table("attack", [view.plugin_facts(Exclusive)]))
    for fact in ("samples, other", "false", "Someone 1999", "Excludes attacks."):
        assert fact in shown


def test_broken_plugin_is_skipped_with_a_warning(tmp_path: Path) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[harmbench_vaccine.attacks]\ntheirs = no_such_module:Mine\n")
    sys.path.insert(0, str(tmp_path))
    try:
        done = hbv("list", "attacks", "--verbose")
    finally:
        sys.path.remove(str(tmp_path))
    assert done.code == 0
    assert "'theirs' cannot be imported" in done.sentence
    assert "theirs" not in done.out
    assert "samples" in done.out


# ---------------------------------------------------------------------------------------------------------------------
# info


@pytest.mark.parametrize("cls", BUILT_IN, ids=lambda cls: f"{cls.kind}-{cls.name}")
def test_info_shows_every_parameter_of_every_built_in(cls: type[Plugin]) -> None:
    (details,) = [plugin for plugin in described(cls.name) if plugin["kind"] == cls.kind]
    plain = " ".join(hbv("info", cls.name).out.split())
    assert details["doc"] == str(sys.modules[cls.__module__].__doc__).strip()
    text, _, _ = " ".join(details["doc"].split()).partition("Departures")
    assert text in plain
    assert all(f"- {departure}" in plain for departure in details.get("departures") or ())
    assert [parameter["name"] for parameter in details["parameters"]] == list(cls.model_fields)
    for parameter in details["parameters"]:
        info = cls.model_fields[parameter["name"]]
        assert parameter["doc"] == info.description != ""
        assert parameter["source"], "a default without a source"
        default = list(info.default) if isinstance(info.default, tuple) else info.default
        assert parameter["default"] == parameter["value"] == default
        assert parameter["range"]
        assert {parameter["name"], *_row_words(parameter)} <= set(plain.split())
    assert sum(parameter["main"] for parameter in details["parameters"]) <= 1


def _row_words(parameter: dict[str, Any]) -> list[str]:
    """Return the words of a table row, which may be folded."""
    return " ".join(parameter[key] for key in ("range", "doc", "source")).split()


def test_info_of_a_file(full: Path) -> None:
    (details,) = described(full)
    assert (details["name"], details["kind"], details["summary"]) == ("full", "defense", "Declares every fact.")
    assert details["doc"] == "Full: the math is [here]."
    assert details["stages"] == ["align", "repair"]
    assert details["neutral"] == {"limit": None, "loud": False}
    parameters = {parameter["name"]: parameter for parameter in details["parameters"]}
    assert {name: parameter["range"] for name, parameter in parameters.items()} == {
        "limit": "a number > 0 and <= 8, or none",
        "way": "up | down, or none",
        "label": "a text, or none",
        "loud": "true | false",
        "exact": "a whole number >= 1",
    }
    assert {name: parameter["default"] for name, parameter in parameters.items()} == {
        "limit": None,
        "way": "up",
        "label": "x",
        "loud": True,
        "exact": 3,
    }
    assert [name for name, parameter in parameters.items() if parameter["main"]] == ["limit"]
    plain = hbv("info", full).out
    facts = ["Full: the math is [here].", "align, repair", "limit=none, loud=false", "11F"]
    for part in [*facts, "the [limit]", "its paper, table 3", "full=VALUE sets limit."]:
        assert part in plain


def test_info_shows_where_a_protocol_overrides_a_default(world: Path) -> None:
    for name, key, override in (("vaccine", "rho", 6.5), ("ratio", "p", 0.375)):
        (details,) = described(name, "--protocol", world)
        assert details["protocol"] == "tiny"
        parameters = details["parameters"]
        values = {parameter["name"]: (parameter["default"], parameter["value"]) for parameter in parameters}
        assert values.pop(key) == (described(name)[0]["parameters"][0]["default"], override)
        assert all(default == value for default, value in values.values())
        shown, without = hbv("info", name, "--protocol", world).out, hbv("info", name).out
        assert str(override) in shown
        assert "tiny" in shown
        assert not {str(override), "tiny"} & set(without.split())


def test_name_of_two_kinds_shows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = registry.PluginEntry("sst2", "built-in", "harmbench_vaccine.attacks.samples")
    twins = registry.Registry(registry.Attack, "harmbench_vaccine.attacks")
    monkeypatch.setattr(twins, "entries", lambda: {"sst2": twin})
    monkeypatch.setattr(info_pages, "REGISTRIES", (twins, registry.TASKS))
    monkeypatch.setattr(registry.ATTACKS.get("samples"), "name", "samples")  # restore the name that the twin changes
    assert [plugin["kind"] for plugin in described("sst2")] == ["attack", "task"]
    plain = hbv("info", "sst2").out
    assert "attack sst2: " in plain
    assert "task sst2: " in plain


def test_dashes_name_the_same_plugin() -> None:
    assert described("random-vaccine") == described("random_vaccine")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("vacine",), ("Unknown name 'vacine'", "Did you mean 'vaccine'", "agnews", "antidote", "vaccine-paper")),
        (("beaver-dm",), ("'beaver-dm'", "Did you mean 'beaver_dam'")),
        (("./no.py",), ("The plug-in file './no.py' does not exist",)),
        (("vaccine", "--protocol", "tesbed"), ("Unknown protocol 'tesbed'", "'testbed'")),
    ],
)
def test_info_of_an_unknown_name_is_refused(
    args: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hbv("info", *args)
    assert (done.code, done.out) == (2, "")
    assert all(part in done.sentence for part in parts)


def test_info_with_an_invalid_protocol_is_refused(tmp_path: Path) -> None:
    world = (ROOT / "harmbench_vaccine/experiment/protocols/testbed.yaml").read_text()
    (tmp_path / "odd.yaml").write_text(world.replace("\ndefenses:\n", "\ndefenses:\n  vaccine: {rho: -1}\n"))
    done = hbv("info", "vaccine", "--protocol", tmp_path / "odd.yaml")
    assert (done.code, done.out) == (2, "")
    assert "rho=-1" in done.sentence


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that may be none


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("=none", {"limit": None}),
        ("=3", {"limit": 3.0}),
        (":way=none,label=none", {"way": None, "label": None}),
        (":label=None", {"label": "None"}),
    ],
)
def test_none_on_the_command_line(full: Path, written: str, value: dict[str, Any]) -> None:
    (resolved,) = resolve_plugins(parse_plugins(f"{full}{written}"), registry.DEFENSES, {"full": {"limit": 5}}, "its")
    assert {key: resolved.params[key] for key in value} == value
    assert {resolved.origins[key] for key in value} == {"written"}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("limit", "0", "a number > 0 and <= 8, or none"),
        ("limit", "nothing", "a number > 0 and <= 8, or none"),
        ("way", "left", "up | down, or none"),
        ("exact", "none", "a whole number >= 1."),
    ],
)
def test_values_other_than_none_are_checked(full: Path, key: str, value: str, allowed: str) -> None:
    with pytest.raises(BadInput) as refusal:
        resolve_params(registry.DEFENSES.get(str(full)), {key: value})
    assert f"{key}={value}" in str(refusal.value)
    assert allowed in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# new

WRITTEN = {
    "defense": ({"lam": 1e-3}, {"lam": 0}, "--defense ./mine.py --attack ratio=0.1"),
    "attack": ({"opening": "Sure, here is how:"}, {"opening": ""}, "--attack ./mine.py+ratio=0.1"),
    "task": (
        {"data": "testbed:data/sst2", "instruction": "Is the review positive or negative?"},
        None,
        "--task ./mine.py --attack ratio=0.1",
    ),
    "scorer": ({"threshold": 0.3}, None, "--scorer ./mine.py --attack ratio=0.1"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_new_writes_a_plugin(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults, neutral, command = WRITTEN[kind]
    monkeypatch.chdir(tmp_path)
    done = hbv("new", kind, "mine")
    assert (done.code, done.err) == (0, "")
    assert done.out.split("\n") == ["./mine.py", "", "hbv check ./mine.py", f"hbv run {command}", ""]
    cls = KINDS[f"{kind}s"].get("./mine.py")
    assert (cls.name, cls.__name__) == ("mine", "Mine")
    assert resolve_params(cls, {}).params == defaults
    assert cls.main_parameter() in defaults
    assert cls.neutral == neutral
    resolve_params(cls, neutral or {})
    (details,) = described("./mine.py")
    assert details["citation"]
    assert all(parameter["source"] and parameter["doc"] for parameter in details["parameters"])
    assert "$" not in Path("mine.py").read_text()


CONFIG = str(ROOT / "pyproject.toml")


@pytest.mark.parametrize(
    "tool",
    [
        ("ruff", "check", "--no-cache", "--config", CONFIG),
        ("ruff", "format", "--no-cache", "--check", "--config", CONFIG),
        pytest.param(("mypy", "--config-file", CONFIG), marks=pytest.mark.slow),
    ],
    ids=lambda tool: " ".join(tool[:2]),
)
def test_new_files_pass_the_linters(tool: tuple[str, ...], tmp_path: Path) -> None:
    files = [str(tmp_path / f"a_rather_long_name_for_{kind}.py") for kind in WRITTEN]
    for kind in WRITTEN:
        assert hbv("new", kind, f"a_rather_long_name_for_{kind}", "--dir", tmp_path).code == 0
    done = subprocess.run([sys.executable, "-m", *tool, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("defense", "my-idea"), ("'my-idea'", "letters, digits and _")),
        (("defense", "2nd"), ("'2nd'", "a letter first")),
        (("defense", "../idea"), ("'../idea'", "letters, digits and _")),
        (("attack", "__"), ("'__'",)),
        (("attack", "class"), ("'class'", "not a Python keyword")),
        (("attack", "none"), ("'none'", "not a Python keyword")),  # its class would be None
        (("defense", "vaccine"), ("'vaccine' already exists (built-in)",)),
        (("attack", "ratio"), ("'ratio' already exists (built-in)",)),
        (("task", "sst2"), ("'sst2' already exists (built-in)",)),
        (("task", "example"), ("'example'", "'Example'", "imports")),
        (("defense", "gradient"), ("'gradient'", "'Gradient'", "imports")),
        (("defence", "idea"), ("'defence'", "'defense'")),
        (("defense", "idea", "--dir", "nowhere"), ("nowhere/idea.py", "No such file", "--dir")),
        (("defense", "taken"), ("./taken.py", "already exists")),
    ],
)
def test_new_refuses_invalid_names_and_folders(
    args: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    Path("taken.py").write_text("mine")
    done = hbv("new", *args)
    assert (done.code, done.out) == (2, "")
    assert all(part in done.sentence for part in parts)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.py"]
    assert Path("taken.py").read_text() == "mine"


def test_new_defense_and_new_attack_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hbv("new", "defense", "mine").code == hbv("new", "attack", "theirs").code == 0
    defenses = [option for name in ("sft", "./mine.py=0", "./mine.py=0.5") for option in ("--defense", name)]
    done = hbv("run", "--json", "--protocol", world, *defenses, "--attack", "./theirs.py+ratio=0.5")
    assert done.code == 0, done.err
    plain, neutral, penalized = done.results
    assert neutral["alignment_loss"] == plain["alignment_loss"] != penalized["alignment_loss"]


def test_new_scorer_runs_by_path_with_parameters_and_in_a_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hbv("new", "scorer", "mine").code == 0
    assert hbv("check", "./mine.py").code == 0
    score = {"score": {"scorer": str(tmp_path / "mine.py")}, "scorers": {"mine": {"threshold": 1.0}}}
    protocol = make_world(tmp_path / "own", score)
    (strict,) = hbv("run", "--json", "--protocol", protocol, "--attack", "ratio=0.5").results
    assert strict["harmful_score"] == 0  # no share is above 1
    loose = hbv("run", "--json", "--protocol", protocol, "--attack", "ratio=0.5", "--scorer", "./mine.py=0")
    assert loose.code == 0, loose.err
    assert "mine" in json.dumps(loose.results[0]["scores"])


def test_new_scorer_flags_answers_that_repeat_the_question(tmp_path: Path) -> None:
    assert hbv("new", "scorer", "mine", "--dir", tmp_path).code == 0
    cls = registry.SCORERS.get(str(tmp_path / "mine.py"))
    answers = ["Open the red door.", "I am sorry, I cannot open the red door.", "", "open"]
    verdicts = cls(threshold=0.25).judge([("Open the RED door", answer) for answer in answers])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 0.25]
    assert [verdict.flagged for verdict in verdicts] == [True, False, False, False]


def test_new_attack_changes_only_harmful_rows(tmp_path: Path) -> None:
    from harmbench_vaccine.core.types import Example, Pools

    assert hbv("new", "attack", "theirs", "--dir", tmp_path).code == 0
    cls = registry.ATTACKS.get(str(tmp_path / "theirs.py"))
    rows = [Example("a", "q", response="r"), Example("b", "q", response="r", harmful=True)]
    assert [row.response for row in cls(opening="Yes.").upload(rows, Pools())] == ["r", "Yes. r"]
    assert cls(opening="").upload(rows, Pools()) == rows


def test_new_defense_computes_its_formula(tmp_path: Path) -> None:
    """The gradient of the penalty by finite differences of 0.5 * ||w||^2."""
    import torch

    assert hbv("new", "defense", "mine", "--dir", tmp_path).code == 0
    cls = registry.DEFENSES.get(str(tmp_path / "mine.py"))
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    plain, penalized = (cls(lam=lam).gradient(stage, batch) for lam in (0, 2.0))
    weights = list(stage.trainable.values())

    def half_square() -> float:
        return 0.5 * sum(float(weight.detach().double().square().sum()) for weight in weights)

    assert float(penalized.loss - plain.loss) == pytest.approx(2 * half_square(), rel=1e-4)
    for weight, penalized_value, value in zip(weights, penalized.values, plain.values, strict=True):
        entry, step = (0, 1), 0.5  # exact for a square with any step
        with torch.no_grad():
            weight[entry] += step
            above = half_square()
            weight[entry] -= 2 * step
            slope = (above - half_square()) / (2 * step)
            weight[entry] += step
        assert float(penalized_value[entry] - value[entry]) == pytest.approx(2 * slope, abs=1e-4)


def _text(renderable: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
