"""Discovery of plug-ins: built in, by the entry points of an installed package, by the path of a file."""

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
    """A registry without the cache of other tests."""
    return Registry(Defense, "harmbench_vaccine.defenses")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with modules and entry points into a site directory, as pip does."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def add(name: str, modules: dict[str, str], entries: dict[str, str], group: str = "harmbench_vaccine.defenses"):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        text = "".join(f"{key} = {value}\n" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{text}")
        for module, code in modules.items():
            (site / f"{module}.py").write_text(code)
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()

    return add


def test_built_ins_are_listed_without_an_import() -> None:
    script = (
        "import sys\n"
        "from harmbench_vaccine.plugins import registry\n"
        "for kind in (registry.DEFENSES, registry.ATTACKS, registry.TASKS, registry.SCORERS):\n"
        "    print(*kind.entries(), *{entry.origin for entry in kind.entries().values()})\n"
        "parts = ('defenses', 'attacks', 'plugins.tasks', 'plugins.scorers')\n"
        "loaded = [m for m in sys.modules if m.startswith(tuple(f'harmbench_vaccine.{p}.' for p in parts))]\n"
        "assert not loaded, loaded\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [set(line.split()) for line in done.stdout.splitlines()]
    expected = [
        {"none", "sft", "vaccine", "random_vaccine"},
        {"ratio", "samples"},
        {"sst2", "agnews", "gsm8k"},
        {"beaver_dam"},
    ]
    for words, names in zip(lines, expected, strict=True):
        assert names | {"built-in"} <= words


@pytest.mark.parametrize(
    ("base", "package"),
    [(Defense, "defenses"), (Attack, "attacks"), (Task, "plugins.tasks"), (Scorer, "plugins.scorers")],
)
def test_every_built_in_is_one_documented_class(base: type, package: str) -> None:
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


def test_installed_package_is_discovered(install: Install, defenses: Registry[Defense]) -> None:
    install("theirs", {"theirs": PLUGIN}, {"their-idea": "theirs:Mine", "their_module": "theirs"})
    entries = defenses.entries()
    assert entries["their_idea"].origin == "package"
    assert "theirs" not in sys.modules
    assert list(entries) == sorted(entries)
    assert issubclass(defenses.get("their-idea"), Defense)
    assert defenses.get("their_idea").name == "their_idea"
    assert defenses.get("their_module").__doc__ == "Mine."


def test_entry_of_another_group_is_ignored(install: Install, defenses: Registry[Defense]) -> None:
    install("others", {"others": PLUGIN}, {"other": "others:Mine"}, group="harmbench_vaccine.attacks")
    assert "other" not in defenses.entries()
    with pytest.raises(BadInput, match="attack 'other' is not valid: expected a subclass of Attack"):
        Registry(Attack, "harmbench_vaccine.attacks").get("other")


@pytest.mark.parametrize(
    ("text", "entry", "message"),
    [
        ("raise RuntimeError('it is broken')", "broken:Mine", "RuntimeError: it is broken"),
        ("import no_such_module", "broken:Mine", "no_such_module"),
        ("syntax error", "broken:Mine", "SyntaxError"),
        ("x = 1", "broken:Mine", "Mine"),
        ("Mine = int", "broken:Mine", "expected a subclass of Defense, got "),
        ("x = 1", "broken", "0 defense classes"),
        ("Mine = 3", "broken:Mine", "expected a subclass of Defense, got "),
    ],
)
def test_broken_package_is_skipped_with_a_warning(
    install: Install, defenses: Registry[Defense], text: str, entry: str, message: str
) -> None:
    install("broken", {"broken": text}, {"broken": entry})
    install("working", {"working": PLUGIN}, {"working": "working:Mine"})
    with pytest.warns(UserWarning, match="Skipped: ") as records:
        classes = defenses.loadable()
    assert message in str(records[0].message)
    assert "broken" in str(records[0].message)
    assert "broken" not in classes
    assert {"working", "sft", "vaccine"} <= set(classes)
    with pytest.raises(BadInput, match="broken"):
        defenses.get("broken")


def test_package_cannot_replace_a_built_in(install: Install, defenses: Registry[Defense]) -> None:
    install("theirs", {"theirs": PLUGIN}, {"vaccine": "theirs:Mine", "random-vaccine": "theirs:Mine"})
    with pytest.warns(UserWarning, match="the name is taken") as records:
        entries = defenses.entries()
    assert {"'vaccine'", "'random_vaccine'"} <= {word for record in records for word in str(record.message).split()}
    assert entries["vaccine"].origin == entries["random_vaccine"].origin == "built-in"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert defenses.get("vaccine").__module__ == "harmbench_vaccine.defenses.vaccine"


def test_second_package_of_a_name_is_skipped_with_a_warning(install: Install, defenses: Registry[Defense]) -> None:
    install("first", {"first": PLUGIN}, {"shared": "first:Mine"})
    install("second", {"second": PLUGIN}, {"shared": "second:Mine"})
    with pytest.warns(UserWarning, match="'shared'.*the name is taken"):
        entries = defenses.entries()
    assert entries["shared"].origin == "package"


def test_alias_does_not_rename_a_built_in(install: Install, defenses: Registry[Defense]) -> None:
    install("alias", {}, {"plain": "harmbench_vaccine.defenses.sft:SFT"})
    defenses.get("sft")
    defenses.get("plain")
    assert defenses.get("sft").name == "sft"


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(("name", "expected"), [("./a", True), ("a.py", True), ("b/c", True), ("sft", False)])
def test_plugin_paths(name: str, expected: bool) -> None:
    assert is_plugin_path(name) is expected


def test_plugin_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defenses: Registry[Defense]) -> None:
    (tmp_path / "my-idea.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    for name in ("./my-idea.py", "my-idea.py", str(tmp_path / "my-idea.py")):
        cls = defenses.get(name)
        assert cls.name == "my_idea"
        assert cls.__doc__ == "Mine."
        cls.fingerprint()
    assert "my_idea" not in defenses.entries()


def test_imported_classes_are_ignored(tmp_path: Path, defenses: Registry[Defense]) -> None:
    (tmp_path / "one.py").write_text("from harmbench_vaccine.defenses.sft import SFT\n\nclass One(SFT):\n    pass\n")
    assert defenses.get(str(tmp_path / "one.py")).__name__ == "One"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLUGIN + "\nclass Second(Defense):\n    pass\n", "defines 2 defense classes, but a file must define one"),
        ("from harmbench_vaccine.defenses.sft import SFT\n", "defines 0 defense classes, but a file must define one"),
        ("", "defines 0 defense classes"),
        ("1 / 0", "ZeroDivisionError"),
        ("class (", "SyntaxError"),
    ],
)
def test_file_without_exactly_one_class_is_refused(
    tmp_path: Path, defenses: Registry[Defense], text: str, message: str
) -> None:
    path = tmp_path / "odd.py"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as refusal:
        defenses.get(str(path))
    assert "odd" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["./nowhere.py", "nowhere.py", "/no/such/file", "./"])
def test_missing_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defenses: Registry[Defense], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=f"The defense file '{name}' does not exist"):
        defenses.get(name)


def test_file_that_is_not_python_is_refused(tmp_path: Path, defenses: Registry[Defense]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadInput, match="not a Python file"):
        defenses.get(str(tmp_path / "notes.txt"))


def test_two_files_of_one_name_are_different_plugins(tmp_path: Path, defenses: Registry[Defense]) -> None:
    """Artifact keys contain the hash of the plug-in's source, so the hash must be that of the right file."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(PLUGIN + f"    mark = '{folder}'\n".replace("mark", "citation"))
    first, second = (defenses.get(str(tmp_path / folder / "mine.py")) for folder in ("a", "b"))
    assert (first.citation, second.citation) == ("a", "b")
    assert first.fingerprint() != second.fingerprint()


def test_edited_file_has_a_different_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    fingerprints = []
    for text in (PLUGIN, PLUGIN + "\n# a comment\n", PLUGIN + "\nCHANGED = 1\n"):
        path.write_text(text)
        fingerprints.append(Registry(Defense, "harmbench_vaccine.defenses").get(str(path)).fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


# ---------------------------------------------------------------------------------------------------------------------
# Broken files


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"class Mine(Defense:\n", "cannot be imported: SyntaxError"),
        (b"raise ValueError('a\\nb')\n", "cannot be imported: ValueError: a"),
        (b"import no_such_module\n", "cannot be imported: ModuleNotFoundError"),
        (b"import sys\nsys.exit(3)\n", "cannot be imported: SystemExit: 3"),
        (b"raise SystemExit\n", "cannot be imported: SystemExit"),
        (b"1 / 0\n", "cannot be imported: ZeroDivisionError"),
        (b"def f(): f()\nf()\n", "cannot be imported: RecursionError"),
        (b"x = 1\n", "defines 0 defense classes"),
        (b"\x00\xff", "cannot be imported"),
        (b"", "defines 0 defense classes"),
        (b"(" * 5000, "cannot be imported"),
    ],
)
def test_broken_file_is_bad_input(code: bytes, message: str, defenses: Registry[Defense], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_bytes(code)
    with pytest.raises(BadInput) as refusal:
        defenses.get(str(file))
    assert str(file) in str(refusal.value)
    assert message in str(refusal.value)


def test_huge_file_is_not_read(defenses: Registry[Defense], tmp_path: Path) -> None:
    with (tmp_path / "mine.py").open("wb") as file:
        file.truncate(10**12)  # without content on the disk
    with pytest.raises(BadInput, match="larger than 10 MiB"):
        defenses.get(str(tmp_path / "mine.py"))


@pytest.mark.parametrize("code", ["raise ValueError", "import sys\nsys.exit(3)", "x = 1", "class Foreign:\n    pass\n"])
def test_package_with_broken_code_is_skipped_with_a_warning(
    code: str, defenses: Registry[Defense], install: Install
) -> None:
    install("foreign", {"foreign_module": code}, {"foreign": "foreign_module:Foreign"})
    with pytest.warns(UserWarning, match="Skipped: defense 'foreign'"):
        assert "vaccine" in defenses.loadable()
    with pytest.raises(BadInput, match="'foreign'"):
        defenses.get("foreign")


def test_malformed_entry_point_is_skipped_with_a_warning(defenses: Registry[Defense], install: Install) -> None:
    install("foreign", {}, {"foreign": "not a module!", "no-object": "sys"})
    with pytest.warns(UserWarning, match="Skipped"):
        classes = defenses.loadable()
    assert "vaccine" in classes
    assert not {"foreign", "no_object"} & set(classes)


def test_edited_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defenses: Registry[Defense]
) -> None:
    """Two folders may have a file of one name, and a file may change between two cells of a notebook."""
    code = "from harmbench_vaccine.plugins import Defense\n\n\nclass Mine(Defense):\n    citation = {citation!r}\n"
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        Path("mine.py").write_text(code.format(citation=folder), encoding="utf-8")
        assert defenses.get("./mine.py").citation == folder
    unchanged = defenses.get("./mine.py")
    assert defenses.get(str(tmp_path / "second" / "mine.py")) is unchanged
    Path("mine.py").write_text(code.format(citation="a longer citation"), encoding="utf-8")
    assert defenses.get("./mine.py").citation == "a longer citation"
