"""Import plug-ins without the libraries that take seconds to import: these are imported when a plug-in uses them.

A plug-in imports torch at its top, as any other module does. Most commands need its parameters, its class attributes
and its cheap hooks only, so that a list, a plan and a run with stored stages do without torch. The statements at the
top of a plug-in that import from `SLOW` are left out at first. They are executed as they are written when a function of
the plug-in looks up a name that one of them binds. A plug-in that needs such a name while it is imported, for example
in a decorator, is imported as usual.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, find_spec, module_from_spec
from pathlib import Path
from symtable import symtable
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from harmbench_vaccine.core.errors import BadInput

SLOW = ("torch", "transformers", "peft", "harmbench_vaccine.training", "harmbench_vaccine.inference.answer_models")
"""Packages whose import takes seconds, alone or because it imports another one of them."""

Statements = dict[str, list[ast.stmt]]
"""Name -> the import statements that bind it."""


def import_late(name: str) -> ModuleType:
    """Import a module by its dotted name, as `importlib.import_module` does, but without `SLOW` if possible."""
    spec = None if name in sys.modules else find_spec(name)
    module = _executed_late(spec) if spec else None
    if module is None:
        return importlib.import_module(name)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def load_late(spec: ModuleSpec) -> ModuleType:
    """Create and execute the module of a spec, without `SLOW` if possible; it replaces a module of the same name."""
    module = _executed_late(spec)
    if module is None:
        assert spec.loader is not None
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def finish_imports(module: ModuleType) -> None:
    """Execute the late imports of a module that were not needed yet.

    Raises:
        BadInput: An import fails.
    """
    names = vars(module).get("__builtins__")
    if isinstance(names, _LateNames):
        names.bind_all()


class _LateNames(dict[str, Any]):
    """The built-in names of a module, where Python looks up names that the module does not bind, with late imports."""

    def __init__(self, module: ModuleType, statements: Mapping[str, Sequence[ast.stmt]], file: str) -> None:
        super().__init__(vars(builtins))
        self._namespace = vars(module)
        self._statements = statements
        self._file = file
        self.is_open = False
        """Whether late imports are executed; False while the module itself is imported."""

    def __missing__(self, name: str) -> Any:
        """Execute the late imports that bind a name, and return its value; Python reports other names as missing.

        Raises:
            BadInput: An import fails.
        """
        if not self.is_open or name not in self._statements:
            raise KeyError(name)
        try:
            exec(compile(ast.Module(list(self._statements[name]), []), self._file, "exec"), self._namespace)
        except Exception as error:  # a library may raise anything
            raise BadInput(f"{self._file!r} cannot be imported: {type(error).__name__}: {error}") from error
        return self._namespace[name]

    def attribute(self, name: str) -> Any:
        """Return a late name as an attribute of the module."""
        if name in self._statements:
            return self[name]
        raise AttributeError(f"module {self._namespace['__name__']!r} has no attribute {name!r}")

    def bind_all(self) -> None:
        """Execute all late imports that were not executed yet."""
        for name in self._statements.keys() - self._namespace.keys():
            self[name]


def _executed_late(spec: ModuleSpec) -> ModuleType | None:
    """Return the module of a spec with its late imports; None, and no change, if it has to be imported as usual."""
    file = str(spec.origin)
    try:
        code = decode_source(Path(file).read_bytes())
        tree, symbols = ast.parse(code, file), symtable(code, file, "exec")
    except (OSError, SyntaxError, ValueError):  # the usual import reports it
        return None
    tree.body, late = _divided(tree.body)
    if not late or any(symbols.lookup(name).is_assigned() for name in late):
        return None
    before = sys.modules.get(spec.name)
    module = sys.modules[spec.name] = module_from_spec(spec)
    vars(module)["__builtins__"] = names = _LateNames(module, late, file)
    try:
        with suppress(Exception):  # a missing name, or an error that the usual import reports
            exec(compile(tree, file, "exec"), vars(module))
            names.is_open = _is_whole(module, late)
    finally:
        if not names.is_open:
            _restore(spec.name, before)
    if not names.is_open:
        return None
    vars(module).setdefault("__getattr__", names.attribute)
    return module


def _is_whole(module: ModuleType, late: Statements) -> bool:
    """Return False if another import bound a late name of the module, or if a field of a class has a late type."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    return vars(module).keys().isdisjoint(late) and all(cls.__pydantic_complete__ for cls in classes)


def _restore(name: str, module: ModuleType | None) -> None:
    if module is None:
        del sys.modules[name]
    else:
        sys.modules[name] = module


def _divided(body: Sequence[ast.stmt]) -> tuple[list[ast.stmt], Statements]:
    """Divide the statements of a module into those to execute at once, and its late imports."""
    at_once: list[ast.stmt] = []
    late: Statements = {}
    for statement in body:
        names = _late_names(statement)
        if not names:
            at_once.append(statement)
        for name in names:
            late.setdefault(name, []).append(statement)
    return at_once, late


def _late_names(statement: ast.stmt) -> list[str]:
    """Return the names that a late import binds; none for another statement.

    It imports from `SLOW` only, and from a module that is not imported yet. It binds no built-in name, since Python
    would find the built-in one.
    """
    if isinstance(statement, ast.Import):
        modules = [alias.name for alias in statement.names]
        names = [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    elif isinstance(statement, ast.ImportFrom) and not statement.level:
        modules = [str(statement.module)]
        names = [alias.asname or alias.name for alias in statement.names]
    else:
        return []
    is_slow = all(f"{module}.".startswith(tuple(f"{package}." for package in SLOW)) for module in modules)
    is_imported = all(module in sys.modules for module in modules)
    return names if is_slow and not is_imported and not {"*", *vars(builtins)} & set(names) else []
