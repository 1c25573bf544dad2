"""Plug-in discovery: built-in packages, entry points of installed packages, and files by path.

Names come from a list of files and entry points. A plug-in is imported when it is first used, so that `hbv list` works
without torch and despite a broken third-party package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Literal, TypeVar

from pydantic import PydanticUserError

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.paths import user_path

from .attack import Attack
from .base import Plugin, name_of_class
from .defense import Defense
from .late_imports import finish_imports, import_late, load_late
from .scorer import Scorer
from .signatures import require_interface
from .task import Task

P = TypeVar("P", bound=Plugin)

MAX_FILE_SIZE = 10 * 2**20
"""Largest size of a plug-in file, in bytes."""


@dataclass(frozen=True)
class PluginEntry:
    """The name and the origin of a plug-in that is not imported yet."""

    name: str
    origin: Literal["built-in", "package"]
    entry: EntryPoint | str
    """The entry point of an installed package, or the module of a built-in."""


class Registry(Generic[P]):
    """The plug-ins of one kind."""

    def __init__(self, base: type[P], group: str, package: str = "") -> None:
        """Create a registry.

        Args:
            base: The class of this kind of plug-in.
            group: The entry-point group of third-party plug-ins.
            package: The package of the built-in plug-ins; empty: `group`.
        """
        self.base = base
        self.group = group
        self.package = package or group
        self._classes: dict[str, type[P]] = {}
        self._files: dict[Path, tuple[bytes, type[P]]] = {}  # file -> its content and its class

    def entries(self) -> dict[str, PluginEntry]:
        """Return every installed plug-in by name, in alphabetical order; a third party cannot replace a built-in."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None
        names = [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)]
        entries = {name: PluginEntry(name, "built-in", f"{self.package}.{name}") for name in names if name[0] != "_"}
        for entry in _entry_points(tuple(map(_modified, sys.path))).select(group=self.group):
            name = _canonical(entry.name)
            if name in entries:
                warnings.warn(
                    f"{self.base.kind} {name!r} of {entry.value} is skipped: the name is taken.", stacklevel=2
                )
            else:
                entries[name] = PluginEntry(name, "package", entry)
        return dict(sorted(entries.items()))

    def get(self, name: str) -> type[P]:
        """Return the class of a plug-in.

        Args:
            name: A name, or a file: a text with a path separator or the ending `.py`.

        Raises:
            BadInput: The name is unknown, or the plug-in cannot be imported.
        """
        if is_plugin_path(name):
            return self._file(name)
        if name not in self._classes:
            self._classes[name] = self._installed(_canonical(name))
        return self._classes[name]

    def register(self, cls: type[P]) -> str:
        """Return the name of a class. One that no package and no file provides is stored under its own name.

        Raises:
            BadInput: Another plug-in has the name, or the class is not a valid plug-in.
        """
        for entry in self.entries().values():
            module = entry.entry if isinstance(entry.entry, str) else entry.entry.module
            if module == cls.__module__ and issubclass(self.get(entry.name), cls):
                return entry.name
        named = [*self._classes.items(), *((str(path), known) for path, (_, known) in self._files.items())]
        for name, known in named:
            if known is cls:
                return name
        name = name_of_class(cls)
        if name in self.entries():
            raise BadInput(
                f"The name of class {cls.__name__!r} is that of {self.base.kind} {name!r}: rename the class."
            )
        self._classes[name] = self._class(cls, name)
        return name

    def loadable(self) -> dict[str, type[P]]:
        """Return every installed plug-in that can be imported; a broken one is skipped with a warning."""
        classes = {}
        for name in self.entries():
            try:
                classes[name] = self.get(name)
            except BadInput as error:
                warnings.warn(f"Skipped: {error}", stacklevel=2)
        return classes

    def _installed(self, name: str) -> type[P]:
        entries = self.entries()
        if name not in entries:
            raise missing_plugin(self.base.kind, name, entries)
        entry = entries[name].entry
        with _readable_import_errors(f"{self.base.kind} {name!r}"):
            module = import_late(entry if isinstance(entry, str) else entry.module)
            loaded = module if isinstance(entry, str) else entry.load()
        return self._class(loaded, name)

    def _file(self, name: str) -> type[P]:
        """Return the class of a file, which is read again if it was edited, as between two cells of a notebook."""
        path = user_path(name).resolve()
        if not path.is_file():
            raise BadInput(f"The {self.base.kind} file {name!r} does not exist.")
        if path.stat().st_size > MAX_FILE_SIZE:
            raise BadInput(f"{name!r} is larger than {MAX_FILE_SIZE // 2**20} MiB, so it is not a plug-in file.")
        content = path.read_bytes()
        if path in self._files and self._files[path][0] == content:
            return self._files[path][1]
        module_name = f"hbv_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise BadInput(f"{name!r} is not a Python file.")
        with _readable_import_errors(repr(name)):
            module = load_late(spec)
        self._files[path] = content, self._class(module, _canonical(path.stem))
        return self._files[path][1]

    def _class(self, loaded: ModuleType | type, name: str) -> type[P]:
        if isinstance(loaded, ModuleType):
            classes = [
                value
                for value in vars(loaded).values()
                if inspect.isclass(value) and issubclass(value, self.base) and value.__module__ == loaded.__name__
            ]
            if len(classes) != 1:
                place = getattr(loaded, "__file__", name)
                raise BadInput(
                    f"'{place}' defines {len(classes)} {self.base.kind} classes, but a file must define one."
                )
            loaded = classes[0]
        if not (inspect.isclass(loaded) and issubclass(loaded, self.base)):
            expected = f"a subclass of {self.base.__name__}"
            raise BadInput(f"{self.base.kind} {name!r} is not valid: expected {expected}, got {loaded!r}.")
        plugin: type[P] = loaded
        if vars(plugin).get("name", name) != name:  # one class under two names: each keeps its own
            plugin = type(plugin.__name__, (plugin,), {"__module__": plugin.__module__, "__doc__": plugin.__doc__})
        plugin.name = name
        bases = (Defense, Attack, Task, Scorer)  # a registry of any kind of plug-in has none of them
        require_interface(plugin, next((base for base in bases if issubclass(plugin, base)), self.base))
        return plugin


def require_imports(cls: type[Plugin]) -> None:
    """Execute the imports of a plug-in that were left out, so that a mistake in them is reported before any work.

    Raises:
        BadInput: An import fails.
    """
    for base in cls.__mro__:
        finish_imports(sys.modules[base.__module__])


@contextmanager
def _readable_import_errors(what: str) -> Iterator[None]:
    """Translate any error of a plug-in's code, `sys.exit` included, into one sentence."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise BadInput(f"{what} cannot be imported: {_import_problem(error)}") from error


def _import_problem(error: BaseException) -> str:
    """Describe why the code of a plug-in cannot be imported."""
    if isinstance(error, PydanticUserError) and error.code == "model-field-missing-annotation":
        name = error.message.partition("`")[2].partition(" ")[0]
        return (
            f"attribute {name!r} has no type: write {name}: float = param(...) for a parameter, or "
            f"{name}: ClassVar[float] = ... for a constant."
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_plugin_path(name: str) -> bool:
    """Return whether a plug-in is named by its file."""
    return "/" in name or name.endswith(".py")


@lru_cache(maxsize=1)
def _entry_points(path: tuple[tuple[str, int], ...]) -> Any:  # an EntryPoints since Python 3.12
    """Return the entry points of all installed packages: to read their files takes long for a name of a plug-in.

    Args:
        path: The folders of packages with the times of their last changes.
    """
    return entry_points()


def _modified(folder: str) -> tuple[str, int]:
    with suppress(OSError):
        return folder, os.stat(folder or ".").st_mtime_ns
    return folder, 0


def _canonical(name: str) -> str:
    return name.replace("-", "_")


DEFENSES = Registry(Defense, "harmbench_vaccine.defenses")
ATTACKS = Registry(Attack, "harmbench_vaccine.attacks")
TASKS = Registry(Task, "harmbench_vaccine.tasks", "harmbench_vaccine.plugins.tasks")
SCORERS = Registry(Scorer, "harmbench_vaccine.scorers", "harmbench_vaccine.plugins.scorers")
REGISTRIES: tuple[Registry[Any], ...] = (DEFENSES, ATTACKS, TASKS, SCORERS)


def missing_plugin(kind: str, name: str, installed: Iterable[str]) -> BadInput:
    """Return the error for a name that no installed plug-in has; a file of that name is written with its path."""
    if os.path.isfile(f"{name}.py"):
        return BadInput(f"Unknown {kind} {name!r}; to use the file {name}.py, write './{name}.py'.")
    return unknown_plugin(kind, name, installed)


def unknown_plugin(kind: str, name: str, allowed: Iterable[str]) -> BadInput:
    """Return the error for an unknown name; if a plug-in of another kind has it, the error names that kind."""
    owners = [registry.base.kind for registry in REGISTRIES if _canonical(name) in registry.entries()]
    return unknown_name(kind, name, allowed, other_kind=owners[0] if owners and kind not in owners else "")
