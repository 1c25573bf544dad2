"""How plug-ins are found: built in, by an installed package's entry points, by a file's path."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Attack, Defense, Scorer, Task
from harmbench_vaccine.plugins.registry import Registry, is_plugin_path

PLUGIN = "from harmbench_vaccine.plugins import Defense\n\nclass Mine(Defense):\n    '''Mine.'''\n"

Install = Callable[..., None]


@pytest.fixture
def defenses() -> Registry[Defense]:
    """A registry that remembers nothing of other tests."""
    return Registry(Defense, "harmbench_vaccine.defenses")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with modules and entry points, as pip would leave it in a site directory."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def add(name: str, modules: dict[str, str], entries: dict[str, str], group: str = "harmbench_vaccine.defenses"):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        listed = "".join(f"{key} = {value}\n" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{listed}")
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()

    return add


def test_built_ins_are_found_without_being_imported() -> None:
    script = (
        "import sys\n"
        "from harmbench_vaccine import registry\n"
        "for each in (registry.DEFENSES, registry.ATTACKS, registry.TASKS, registry.SCORERS):\n"
        "    print(*each.found(), *{found.origin for found in each.found().values()})\n"
        "parts = ('defenses', 'attacks', 'tasks', 'scorers')\n"
        "loaded = [m for m in sys.modules if m.startswith(tuple(f'harmbench_vaccine.{p}.' for p in parts))]\n"
        "assert not loaded, loaded\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [set(line.split()) for line in done.stdout.splitlines()]
    wanted = [
        {"none", "sft", "vaccine", "random_vaccine"}, {"ratio", "samples"}, {"sst2", "agnews", "gsm8k"}, {"beaver_dam"}
    ]  # fmt: skip
    for found, names in zip(lines, wanted, strict=True):
        assert names | {"built-in"} <= found


@pytest.mark.parametrize(
    ("base", "package"), [(Defense, "defenses"), (Attack, "attacks"), (Task, "tasks"), (Scorer, "scorers")]
)
def test_every_built_in_holds_one_class_of_its_name_with_a_sentence(base: type, package: str) -> None:
    registry: Registry = Registry(base, f"harmbench_vaccine.{package}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classes = registry.loadable()
    assert list(classes) == list(registry.entries())
    for name, cls in classes.items():
        assert cls.name == name
        assert cls.__doc__ != base.__doc__
        for key in cls.model_fields:
            assert cls.model_fields[key].description
            assert cls.source_of(key), f"{name}: the default of {key} has no source"
            assert cls.range_of(key)
        assert sum(cls._extra(key)["main"] for key in cls.model_fields) <= 1


def test_dashes_name_the_same_plugin(defenses: Registry[Defense]) -> None:
    assert defenses.get("random-vaccine") is defenses.get("random_vaccine")


# ---------------------------------------------------------------------------------------------------------------------
# Installed packages


def test_an_installed_package_is_discovered(install: Install, defenses: Registry[Defense]) -> None:
    install("theirs", {"theirs": PLUGIN}, {"their-idea": "theirs:Mine", "their_module": "theirs"})
    found = defenses.entries()
    assert found["their_idea"].origin == "package"
    assert "theirs" not in sys.modules
    assert list(found) == sorted(found)
    assert issubclass(defenses.get("their-idea"), Defense)
    assert defenses.get("their_idea").name == "their_idea"
    assert defenses.get("their_module").__doc__ == "Mine."


def test_an_entry_of_another_group_is_no_defense(install: Install, defenses: Registry[Defense]) -> None:
    install("others", {"others": PLUGIN}, {"other": "others:Mine"}, group="harmbench_vaccine.attacks")
    assert "other" not in defenses.entries()
    with pytest.raises(BadInput, match="no attack"):
        Registry(Attack, "harmbench_vaccine.attacks").get("other")


@pytest.mark.parametrize(
    ("text", "entry", "said"),
    [
        ("raise RuntimeError('it is broken')", "broken:Mine", "RuntimeError: it is broken"),
        ("import no_such_module", "broken:Mine", "no_such_module"),
        ("syntax error", "broken:Mine", "SyntaxError"),
        ("x = 1", "broken:Mine", "Mine"),
        ("Mine = int", "broken:Mine", "no defense"),
        ("x = 1", "broken", "0 defense classes"),
        ("Mine = 3", "broken:Mine", "no defense"),
    ],
)
def test_a_broken_package_warns_and_is_skipped(
    install: Install, defenses: Registry[Defense], text: str, entry: str, said: str
) -> None:
    install("broken", {"broken": text}, {"broken": entry})
    install("whole", {"whole": PLUGIN}, {"whole": "whole:Mine"})
    with pytest.warns(UserWarning, match="Skipped: ") as warned:
        classes = defenses.loadable()
    assert said in str(warned[0].message)
    assert "broken" in str(warned[0].message)
    assert "broken" not in classes
    assert {"whole", "sft", "vaccine"} <= set(classes)
    with pytest.raises(BadInput, match="broken"):
        defenses.get("broken")


def test_a_package_cannot_take_a_built_in_name(install: Install, defenses: Registry[Defense]) -> None:
    install("thief", {"thief": PLUGIN}, {"vaccine": "thief:Mine", "random-vaccine": "thief:Mine"})
    with pytest.warns(UserWarning, match="the name is taken") as warned:
        found = defenses.entries()
    assert {"'vaccine'", "'random_vaccine'"} <= {word for one in warned for word in str(one.message).split()}
    assert found["vaccine"].origin == found["random_vaccine"].origin == "built-in"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert defenses.get("vaccine").__module__ == "harmbench_vaccine.defenses.vaccine"


def test_two_packages_with_one_name_warn(install: Install, defenses: Registry[Defense]) -> None:
    install("first", {"first": PLUGIN}, {"shared": "first:Mine"})
    install("second", {"second": PLUGIN}, {"shared": "second:Mine"})
    with pytest.warns(UserWarning, match="'shared'.*the name is taken"):
        found = defenses.entries()
    assert found["shared"].origin == "package"


def test_an_alias_of_a_built_in_leaves_the_built_in_its_name(install: Install, defenses: Registry[Defense]) -> None:
    install("alias", {}, {"plain": "harmbench_vaccine.defenses.sft:SFT"})
    defenses.get("sft")
    defenses.get("plain")
    assert defenses.get("sft").name == "sft"


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(("name", "expected"), [("./a", True), ("a.py", True), ("b/c", True), ("sft", False)])
def test_what_is_a_path(name: str, expected: bool) -> None:
    assert is_plugin_path(name) is expected


def test_a_file_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defenses: Registry[Defense]) -> None:
    (tmp_path / "my-idea.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    for name in ("./my-idea.py", "my-idea.py", str(tmp_path / "my-idea.py")):
        cls = defenses.get(name)
        assert cls.name == "my_idea"
        assert cls.__doc__ == "Mine."
        cls.fingerprint()
    assert "my_idea" not in defenses.entries()


def test_imported_classes_do_not_count(tmp_path: Path, defenses: Registry[Defense]) -> None:
    (tmp_path / "one.py").write_text("from harmbench_vaccine.defenses.sft import SFT\n\nclass One(SFT):\n    pass\n")
    assert defenses.get(str(tmp_path / "one.py")).__name__ == "One"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLUGIN + "\nclass Second(Defense):\n    pass\n", "defines 2 defense classes; a file holds one"),
        ("from harmbench_vaccine.defenses.sft import SFT\n", "defines 0 defense classes; a file holds one"),
        ("", "defines 0 defense classes"),
        ("1 / 0", "ZeroDivisionError"),
        ("class (", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_hold_one_class_is_refused(
    tmp_path: Path, defenses: Registry[Defense], text: str, said: str
) -> None:
    path = tmp_path / "odd.py"
    path.write_text(text)
    with pytest.raises(BadInput, match=said) as refusal:
        defenses.get(str(path))
    assert "odd" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["./nowhere.py", "nowhere.py", "/no/such/file", "./"])
def test_no_file_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defenses: Registry[Defense], name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no defense file"):
        defenses.get(name)


def test_a_file_that_is_no_python_is_refused(tmp_path: Path, defenses: Registry[Defense]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadInput, match="not a Python file"):
        defenses.get(str(tmp_path / "notes.txt"))


def test_two_files_of_one_name_are_two_plugins(tmp_path: Path, defenses: Registry[Defense]) -> None:
    """An artifact is stored under the hash of the plug-in's source: the hash must be of its own source."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(PLUGIN + f"    mark = '{folder}'\n".replace("mark", "citation"))
    first, second = (defenses.get(str(tmp_path / folder / "mine.py")) for folder in ("a", "b"))
    assert (first.citation, second.citation) == ("a", "b")
    assert first.fingerprint() != second.fingerprint()


def test_an_edited_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    seen = []
    for text in (PLUGIN, PLUGIN + "\n# a comment\n", PLUGIN + "\nCHANGED = 1\n"):
        path.write_text(text)
        seen.append(Registry(Defense, "harmbench_vaccine.defenses").get(str(path)).fingerprint())
    assert seen[0] == seen[1] != seen[2]
