"""Plug-ins that are imported without slow libraries: every name has the value that a usual import gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Defense, late_imports
from harmbench_vaccine.plugins.registry import REGISTRIES, Registry, require_imports
from support.cli import hbv

LIBRARY = {
    "__init__": "from .inner import VALUE\n\ndef double(x): return 2 * x\n\ndef four(function): return 4\n",
    "inner": "VALUE = 7\n\nclass Thing:\n    pass\n",
}
HEAD = "from __future__ import annotations\n\nfrom harmbench_vaccine.plugins import Defense\n"
MINE = "\n\nclass Mine(Defense):\n    '''Mine.'''\n"

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load the code of a module, for which only the package `slow_library` is slow."""
    package = tmp_path / "slow_library"
    package.mkdir()
    for name, code in LIBRARY.items():
        (package / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(late_imports, "SLOW", ("slow_library",))

    def import_code(code: str) -> ModuleType:
        (tmp_path / "late_module.py").write_text(code)
        sys.modules.pop("late_module", None)
        return late_imports.import_late("late_module")

    yield import_code
    for name in [name for name in sys.modules if name.partition(".")[0] in ("slow_library", "late_module")]:
        del sys.modules[name]


def is_imported() -> bool:
    return "slow_library" in sys.modules


# Statement, expression of a function, its value.
IMPORTS = [
    ("import slow_library", "slow_library.double(4)", 8),
    ("import slow_library.inner", "slow_library.inner.VALUE + slow_library.double(1)", 9),
    ("import slow_library as short", "short.double(4)", 8),
    ("import slow_library.inner as inner", "inner.VALUE", 7),
    ("import slow_library as short, slow_library.inner as inner", "short.double(inner.VALUE)", 14),
    ("from slow_library import double", "double(4)", 8),
    ("from slow_library import double as twice, inner", "twice(inner.VALUE)", 14),
    ("from slow_library.inner import Thing", "isinstance(Thing(), Thing) and Thing.__name__", "Thing"),
    ("import slow_library\nimport slow_library.inner", "slow_library.inner.VALUE", 7),
]


@pytest.mark.parametrize(("statement", "expression", "value"), IMPORTS)
def test_import_is_executed_when_it_is_used(statement: str, expression: str, value: Any, load: Load) -> None:
    module = load(f"{statement}\nlimit = len('abc')\n\ndef compute():\n    return {expression}\n")
    assert module.limit == 3
    assert not is_imported()
    assert module.compute() == value
    assert is_imported()
    assert module.compute() == value


@pytest.mark.parametrize(
    "code",
    [
        "import slow_library\nvalue = slow_library.double(2)\n",
        "import slow_library\n\ndef f():\n    return slow_library.double(2)\n\nvalue = f()\n",
        "from slow_library import double\n\ndef f(function=double):\n    return function(2)\n\nvalue = f()\n",
        "from slow_library import four\n\n@four\ndef value(): ...\n",
        "from slow_library.inner import Thing\n\nclass Child(Thing): ...\n\nvalue = len(Child.__mro__) + 1\n",
        "from slow_library.inner import Thing\nPair = tuple[Thing, int]\nvalue = 4 * Pair.__args__.count(Thing)\n",
        "from slow_library import *\nvalue = double(2)\n",
        "from slow_library import double as abs\n\ndef f():\n    return abs(2)\n\nvalue = f()\n",
        "double = None\nfrom slow_library import double\nvalue = double(2)\n",
        "double = None\nfrom slow_library import double\nvalue = 4 if double else 0\n",
        "try:\n    import slow_library\nexcept ImportError:\n    slow_library = None\nvalue = slow_library.double(2)\n",
        "if True:\n    import slow_library\nvalue = slow_library.double(2)\n",
    ],
)
def test_module_that_needs_an_import_at_once_is_imported_as_usual(code: str, load: Load) -> None:
    assert load(code).value == 4
    assert is_imported()


def test_name_with_two_meanings_has_the_later_one(load: Load) -> None:
    module = load("double = len\nfrom slow_library import double\n\ndef f():\n    return double(2)\n")
    assert module.f() == 4
    assert load("from slow_library import double\ndouble = str\n\ndef f():\n    return double(2)\n").f() == "2"


def test_late_name_is_an_attribute_of_the_module(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("from slow_library import double\n\ndef f():\n    return double(2)\n")
    with pytest.raises(AttributeError, match="module 'late_module' has no attribute 'triple'"):
        _ = module.triple
    assert not is_imported()
    assert module.double(3) == 6
    monkeypatch.setattr(module, "double", str)
    assert module.f() == "2"


def test_missing_name_is_a_name_error(load: Load) -> None:
    module = load("import slow_library\n\ndef f():\n    return unknown\n")
    with pytest.raises(NameError, match="'unknown'"):
        module.f()
    assert not is_imported()
    with pytest.raises(NameError, match="'unknown'"):
        load("import slow_library\nunknown\n")
    assert "late_module" not in sys.modules


def test_annotations_import_nothing(load: Load) -> None:
    """Pydantic reads the annotations of a class, also those of private attributes."""
    code = "from pydantic import PrivateAttr\nfrom slow_library.inner import Thing\n"
    body = "\n    _thing: Thing | None = PrivateAttr(None)\n\n    def f(self, x: Thing) -> Thing: ...\n"
    module = load(HEAD + code + MINE + body)
    assert module.Mine()._thing is None
    assert not is_imported()


def test_type_hints_import_what_they_name(load: Load) -> None:
    code = "from slow_library.inner import Thing\n\ndef f(x: Thing | None) -> Thing: ...\n"
    module = load(f"from __future__ import annotations\n{code}")
    assert not is_imported()
    hints = get_type_hints(module.f)
    assert hints["return"] is sys.modules["slow_library.inner"].Thing


def test_file_in_another_encoding_is_read(load: Load, tmp_path: Path) -> None:
    code = "# coding: latin-1\nimport slow_library\n\ndef f():\n    return slow_library.double('\xe9')\n"
    (tmp_path / "late_latin.py").write_bytes(code.encode("latin-1"))
    assert late_imports.import_late("late_latin").f() == "\xe9\xe9"


def test_field_of_a_late_type_is_whole(load: Load) -> None:
    code = "from pydantic import BaseModel\nfrom slow_library.inner import Thing\n\n\nclass Mine(BaseModel):\n"
    module = load(
        f"from __future__ import annotations\n{code}    model_config = {{'arbitrary_types_allowed': True}}\n"
        "    thing: Thing\n"
    )
    assert is_imported()
    assert isinstance(module.Mine(thing=module.Thing()).thing, module.Thing)


def test_source_stays_available(load: Load) -> None:
    import inspect
    import traceback

    module = load("from slow_library import double\n\n\ndef f():\n    return double(None)\n")
    assert inspect.getsource(module.f) == "def f():\n    return double(None)\n"
    with pytest.raises(TypeError) as caught:
        module.f()
    assert [(frame.lineno, frame.line) for frame in traceback.extract_tb(caught.tb)][1] == (5, "return double(None)")


@pytest.mark.parametrize("late", ["import slow_library.absent", "from slow_library import absent"])
def test_mistake_in_an_import_is_one_sentence(late: str, load: Load, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"{HEAD}{late}\n{MINE}")
    cls = Registry(Defense, "harmbench_vaccine.defenses").get(str(tmp_path / "mine.py"))
    with pytest.raises(BadInput, match=r"mine.py' cannot be imported: (ImportError|ModuleNotFoundError): .*absent"):
        require_imports(cls)


def test_mistake_in_an_import_is_reported_before_any_work(world: Path, own_home: Path, tmp_path: Path) -> None:
    """The name of the module makes it slow, and it is not imported yet."""
    (tmp_path / "mine.py").write_text(f"{HEAD}from harmbench_vaccine.training.absent import Stage\n{MINE}")
    for options in ([], ["--dry-run"]):
        refused = hbv("run", "--protocol", world, "--defense", tmp_path / "mine.py", *options, home=own_home)
        assert refused.code == 2
        assert "mine.py' cannot be imported: ModuleNotFoundError: No module named" in refused.sentence
    refused = hbv("check", tmp_path / "mine.py", home=own_home)
    assert refused.code == 2
    assert "mine.py' cannot be imported" in refused.sentence
    assert not (own_home / "store" / "align").exists()


def test_edited_file_is_loaded_again(load: Load, tmp_path: Path) -> None:
    registry, file = Registry(Defense, "harmbench_vaccine.defenses"), tmp_path / "mine.py"
    for value in (1, 2):
        code = f"    def template(self, stage, template):\n        return slow_library.double({value})\n"
        file.write_text(f"{HEAD}import slow_library\n{MINE}\n{code}")
        cls: Any = registry.get(str(file))
        assert cls().template("train", None) == 2 * value


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_imports_are_executed_in_any_order(order: tuple[int, ...], load: Load) -> None:
    chosen = [IMPORTS[1], IMPORTS[6], IMPORTS[7]]
    functions = "".join(f"\n\ndef f{number}():\n    return {chosen[number][1]}\n" for number in range(3))
    module = load("\n".join(statement for statement, _, _ in chosen) + functions)
    assert not is_imported()
    for number in order:
        assert getattr(module, f"f{number}")() == chosen[number][2]


# ---------------------------------------------------------------------------------------------------------------------
# Built-in plug-ins

NEED_TORCH = {"antidote", "constrained_sft", "ldifs", "panacea", "quantize", "refusal_ablation", "weight_noise"}
"""Built-in plug-ins that use torch while they are imported: a decorator of theirs is torch's."""


def test_built_in_plug_ins_are_imported_without_torch() -> None:
    names = [
        (number, name) for number, kind in enumerate(REGISTRIES) for name in kind.entries() if name not in NEED_TORCH
    ]
    script = (
        "import sys\nfrom harmbench_vaccine.plugins.registry import REGISTRIES\n"
        f"for number, name in {names}:\n    REGISTRIES[number].get(name)\n"
        "    assert not {'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys(), name\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_built_in_plug_ins_have_all_their_names() -> None:
    """Every name that a late import binds has the value of the usual import."""
    script = (
        "import importlib, sys\nfrom harmbench_vaccine.plugins.late_imports import finish_imports\n"
        "from harmbench_vaccine.plugins.registry import REGISTRIES\n"
        f"classes = [kind.get(name) for kind in REGISTRIES for name in kind.entries() if name not in {NEED_TORCH}]\n"
        "late = [sys.modules.pop(cls.__module__) for cls in classes]\n"
        "late = [module for module in late if '__getattr__' in vars(module)]\n"
        "for module in late:\n"
        "    finish_imports(module)\n"
        "    usual = importlib.import_module(module.__name__)\n"
        "    for name, value in vars(usual).items():\n"
        "        if not name.startswith('__') and getattr(value, '__module__', '') != module.__name__:\n"
        "            assert vars(module)[name] is value or vars(module)[name] == value, name\n"
        "print(*[module.__name__.rpartition('.')[2] for module in late])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"vaccine", "tvaccine", "ewc", "realign", "booster", "safe_lora"} <= {*done.stdout.split()}
