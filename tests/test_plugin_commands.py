"""The commands about plug-ins: what they declare, what they take, and a file to start one from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Plugin, registry, resolve_params
from harmbench_vaccine.plugins.composition import parse_plugins, resolve_plugins
from harmbench_vaccine.reporting import plugin_pages as view
from support import tiny
from support.cli import hbv
from support.world import make_world

ROOT = Path(__file__).parents[1]
KINDS: dict[str, registry.Registry[Any]] = {
    "defenses": registry.DEFENSES, "attacks": registry.ATTACKS, "tasks": registry.TASKS, "scorers": registry.SCORERS
}  # fmt: skip
BUILT_IN: list[type[Plugin]] = [each.get(name) for each in KINDS.values() for name in each.entries()]

FULL = '''"""Full: the math stands [here]."""

from typing import ClassVar, Literal

from harmbench_vaccine.plugins import Defense, param


class Full(Defense):
    """Declares all there is.

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
    """A defense in a file that declares every fact."""
    path = tmp_path / "full.py"
    path.write_text(FULL)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol file of a tiny world, which overrides a parameter of Vaccine and one of the ratio attack."""
    changes = {"defenses": {"vaccine": {"rho": 6.5}}, "attacks": {"ratio": {"p": 0.375}}}
    return make_world(tmp_path_factory.mktemp("world"), changes)


def described(*args: object) -> list[dict[str, Any]]:
    """What `hbv info ... --json` prints."""
    done = hbv("info", *args, "--json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


# ---------------------------------------------------------------------------------------------------------------------
# list --verbose


@pytest.mark.parametrize("kind", KINDS)
def test_the_verbose_list_has_what_each_declares(kind: str) -> None:
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
        told = [cls.citation, cls.cost] if kind == "defenses" else [rows[name]["summary"]]
        assert all((part or "none").split()[0] in lines[name] for part in told)  # what follows may be folded


def test_the_verbose_list_shows_every_fact_of_a_defense(full: Path) -> None:
    shown = _text(view.plugin_table("defense", [view.plugin_facts(registry.DEFENSES.get(str(full)))]))
    for fact in ("full", "align, repair", "Someone 2031", "7F 9B", "11F", "2 copies of the adapter",
                 "paired rows, harmful rows"):  # fmt: skip
        assert fact in shown


def test_the_verbose_list_shows_what_an_attack_excludes() -> None:
    class Alone(registry.ATTACKS.get("ratio")):  # type: ignore[misc]
        """Acts alone."""

        excludes = ("samples", "other")
        trains = False
        citation = "Nobody 1999"

    shown = _text(view.plugin_table("attack", [view.plugin_facts(Alone)]))
    for fact in ("samples, other", "false", "Nobody 1999", "Acts alone."):
        assert fact in shown


def test_a_broken_plugin_is_skipped_with_a_warning(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["protocols", "models"])
def test_what_is_no_plugin_declares_nothing(kind: str) -> None:
    done = hbv("list", kind, "--verbose")
    assert (done.code, done.out) == (2, "")
    assert "allowed: defenses, attacks, tasks, scorers" in done.sentence


# ---------------------------------------------------------------------------------------------------------------------
# info


@pytest.mark.parametrize("cls", BUILT_IN, ids=lambda cls: f"{cls.kind}-{cls.name}")
def test_info_shows_every_parameter_of_every_built_in(cls: type[Plugin]) -> None:
    (about,) = [each for each in described(cls.name) if each["kind"] == cls.kind]
    plain = " ".join(hbv("info", cls.name).out.split())
    assert about["doc"] == str(sys.modules[cls.__module__].__doc__).strip()
    assert " ".join(about["doc"].split()) in plain
    assert [each["name"] for each in about["parameters"]] == list(cls.model_fields)
    for each in about["parameters"]:
        info = cls.model_fields[each["name"]]
        assert each["doc"] == info.description != ""
        assert each["source"], "a default without a source"
        default = list(info.default) if isinstance(info.default, tuple) else info.default
        assert each["default"] == each["value"] == default
        assert each["range"]
        assert {each["name"], *_pieces(each)} <= set(plain.split())
    assert sum(each["main"] for each in about["parameters"]) <= 1


def _pieces(parameter: dict[str, Any]) -> list[str]:
    """The words of a table's row, which may be folded."""
    return " ".join(parameter[key] for key in ("range", "doc", "source")).split()


def test_info_of_a_file(full: Path) -> None:
    (about,) = described(full)
    assert (about["name"], about["kind"], about["summary"]) == ("full", "defense", "Declares all there is.")
    assert about["doc"] == "Full: the math stands [here]."
    assert about["stages"] == ["align", "repair"]
    assert about["neutral"] == {"limit": None, "loud": False}
    parameters = {each["name"]: each for each in about["parameters"]}
    assert {name: each["range"] for name, each in parameters.items()} == {
        "limit": "a number > 0 and <= 8, or none",
        "way": "up | down, or none",
        "label": "a text, or none",
        "loud": "true | false",
        "exact": "a whole number >= 1",
    }
    assert {name: each["default"] for name, each in parameters.items()} == {
        "limit": None, "way": "up", "label": "x", "loud": True, "exact": 3
    }  # fmt: skip
    assert [name for name, each in parameters.items() if each["main"]] == ["limit"]
    plain = hbv("info", full).out
    for part in ("Full: the math stands [here].", "align, repair", "limit=none, loud=false", "the [limit]", "11F",
                 "its paper, table 3", "full=VALUE sets limit."):  # fmt: skip
        assert part in plain


def test_info_shows_where_a_protocol_overrides_a_default(world: Path) -> None:
    for name, key, override in (("vaccine", "rho", 6.5), ("ratio", "p", 0.375)):
        (about,) = described(name, "--protocol", world)
        assert about["protocol"] == "tiny"
        values = {each["name"]: (each["default"], each["value"]) for each in about["parameters"]}
        assert values.pop(key) == (described(name)[0]["parameters"][0]["default"], override)
        assert all(default == value for default, value in values.values())
        shown, without = hbv("info", name, "--protocol", world).out, hbv("info", name).out
        assert str(override) in shown
        assert "tiny" in shown
        assert not {str(override), "tiny"} & set(without.split())


def test_a_name_of_two_kinds_shows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = registry.PluginEntry("sst2", "built-in", "harmbench_vaccine.attacks.samples")
    monkeypatch.setattr(view, "ATTACKS", registry.Registry(registry.Attack, "harmbench_vaccine.attacks"))
    monkeypatch.setattr(view.ATTACKS, "found", lambda: {"sst2": twin})
    monkeypatch.setattr(registry.ATTACKS.get("samples"), "name", "samples")  # put back what the twin takes
    assert [each["kind"] for each in described("sst2")] == ["attack", "task"]
    plain = hbv("info", "sst2").out
    assert "attack sst2: " in plain
    assert "task sst2: " in plain


def test_dashes_name_the_same_plugin() -> None:
    assert described("random-vaccine") == described("random_vaccine")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("vacine",), ("Unknown plug-in 'vacine'", "Did you mean 'vaccine'", "agnews", "ratio", "beaver_dam")),
        (("beaver-dm",), ("'beaver-dm'", "Did you mean 'beaver_dam'")),
        (("./no.py",), ("no plug-in file './no.py'",)),
        (("vaccine", "--protocol", "tesbed"), ("Unknown protocol 'tesbed'", "'testbed'")),
    ],
)
def test_info_of_what_is_not_there(
    args: tuple[str, ...], said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hbv("info", *args)
    assert (done.code, done.out) == (2, "")
    assert all(part in done.sentence for part in said)


def test_info_of_a_protocol_that_does_not_fit(tmp_path: Path) -> None:
    world = (ROOT / "harmbench_vaccine/protocols/testbed.yaml").read_text()
    (tmp_path / "odd.yaml").write_text(f"{world}\ndefenses: {{vaccine: {{rho: -1}}}}\n")
    done = hbv("info", "vaccine", "--protocol", tmp_path / "odd.yaml")
    assert (done.code, done.out) == (2, "")
    assert "rho=-1" in done.sentence


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that may be none


@pytest.mark.parametrize(
    ("written", "value"),
    [("=none", {"limit": None}), ("=3", {"limit": 3.0}), (":way=none,label=none", {"way": None, "label": None}),
     (":label=None", {"label": "None"})],
)  # fmt: skip
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
def test_none_does_not_loosen_a_range(full: Path, key: str, value: str, allowed: str) -> None:
    with pytest.raises(BadInput) as refusal:
        resolve_params(registry.DEFENSES.get(str(full)), {key: value})
    assert f"{key}={value}" in str(refusal.value)
    assert allowed in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# new

WRITTEN = {
    "defense": ({"lam": 1e-3}, {"lam": 0}, "--defense ./mine.py --attack ratio=0.1"),
    "attack": ({"opening": "Sure, here is how:"}, {"opening": ""}, "--attack ./mine.py+ratio=0.1"),
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
    resolve_params(cls, neutral)
    (about,) = described("./mine.py")
    assert about["citation"]
    assert all(each["source"] and each["doc"] for each in about["parameters"])
    assert "$" not in Path("mine.py").read_text()


CONFIG = str(ROOT / "pyproject.toml")


@pytest.mark.parametrize(
    "tool",
    [
        ("ruff", "check", "--no-cache", "--config", CONFIG),
        ("ruff", "format", "--no-cache", "--check", "--config", CONFIG),
        pytest.param(("mypy", "--config-file", CONFIG, "--follow-imports", "silent"), marks=pytest.mark.slow),
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
    ("args", "said"),
    [
        (("defense", "my-idea"), ("'my-idea'", "letters, digits and _")),
        (("defense", "2nd"), ("'2nd'", "a letter first")),
        (("defense", "../idea"), ("'../idea'", "letters, digits and _")),
        (("attack", "__"), ("'__'",)),
        (("attack", "class"), ("'class'", "no word of Python's")),
        (("attack", "none"), ("'none'", "no word of Python's")),  # its class would be None
        (("defense", "vaccine"), ("'vaccine' exists (built-in)",)),
        (("attack", "ratio"), ("'ratio' exists (built-in)",)),
        (("defense", "gradient"), ("'gradient'", "'Gradient'", "imports")),
        (("defence", "idea"), ("'defence'", "'defense'")),
        (("defense", "idea", "--dir", "nowhere"), ("nowhere/idea.py", "No such file", "--dir")),
        (("defense", "taken"), ("./taken.py", "exists and is left as it is")),
    ],
)
def test_new_refuses(
    args: tuple[str, ...], said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    Path("taken.py").write_text("mine")
    done = hbv("new", *args)
    assert (done.code, done.out) == (2, "")
    assert all(part in done.sentence for part in said)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.py"]
    assert Path("taken.py").read_text() == "mine"


def test_a_new_defense_and_a_new_attack_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hbv("new", "defense", "mine").code == hbv("new", "attack", "theirs").code == 0
    done = hbv("run", "--json", "--protocol", world, "--defense", "sft", "--defense", "./mine.py=0",
               "--defense", "./mine.py=0.5", "--attack", "./theirs.py+ratio=0.5")  # fmt: skip
    assert done.code == 0, done.err
    plain, neutral, penalised = done.results
    assert neutral["alignment_loss"] == plain["alignment_loss"] != penalised["alignment_loss"]


def test_the_new_attack_opens_harmful_rows_only(tmp_path: Path) -> None:
    from harmbench_vaccine.core.types import Example, Pools

    assert hbv("new", "attack", "theirs", "--dir", tmp_path).code == 0
    cls = registry.ATTACKS.get(str(tmp_path / "theirs.py"))
    rows = [Example("a", "q", response="r"), Example("b", "q", response="r", harmful=True)]
    assert [row.response for row in cls(opening="Yes.").upload(rows, Pools())] == ["r", "Yes. r"]
    assert cls(opening="").upload(rows, Pools()) == rows


def test_the_new_defense_follows_its_formula(tmp_path: Path) -> None:
    """The gradient of the penalty by finite differences of 0.5 * ||w||^2."""
    import torch

    assert hbv("new", "defense", "mine", "--dir", tmp_path).code == 0
    cls = registry.DEFENSES.get(str(tmp_path / "mine.py"))
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    plain, penalised = (cls(lam=lam).gradient(stage, batch) for lam in (0, 2.0))
    weights = list(stage.trainable.values())

    def half_square() -> float:
        return 0.5 * sum(float(weight.detach().double().square().sum()) for weight in weights)

    assert float(penalised.loss - plain.loss) == pytest.approx(2 * half_square(), rel=1e-4)
    for weight, with_it, without in zip(weights, penalised.values, plain.values, strict=True):
        place, step = (0, 1), 0.5  # exact for a square, whatever the step
        with torch.no_grad():
            weight[place] += step
            above = half_square()
            weight[place] -= 2 * step
            slope = (above - half_square()) / (2 * step)
            weight[place] += step
        assert float(with_it[place] - without[place]) == pytest.approx(2 * slope, abs=1e-4)


def _text(what: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(what)
    return capture.get()
