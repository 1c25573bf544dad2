"""Read the facts that the file of a plug-in declares, without importing it.

So a list is fast, and needs neither torch nor a working third-party package.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput

from .registry import PluginEntry, Registry


@dataclass(frozen=True)
class Declaration:
    """The documentation and the facts of a plug-in."""

    doc: str
    """The docstring of its module."""
    summary: str
    """The first line of its class's docstring."""
    facts: Mapping[str, Any]
    """Class attribute -> value."""

    @property
    def title(self) -> str:
        """The first line of the docstring of its module."""
        return _first_line(self.doc)


def read_declarations(registry: Registry[Any], facts: tuple[str, ...]) -> dict[str, Declaration | None]:
    """Read the declarations of every installed plug-in of a kind; None where one cannot be read or imported.

    Args:
        registry: The plug-ins of one kind.
        facts: The class attributes to read.
    """
    return {name: _read(registry, entry, facts) for name, entry in registry.entries().items()}


def _read(registry: Registry[Any], entry: PluginEntry, facts: tuple[str, ...]) -> Declaration | None:
    try:
        return _parse(_module_file(entry), registry.base, facts)
    except LookupError:  # its class inherits facts from another module
        try:
            return _imported(registry.get(entry.name), facts)
        except BadInput:
            return None


def _module_file(entry: PluginEntry) -> Path:
    module = entry.entry if isinstance(entry.entry, str) else entry.entry.module
    try:
        spec = find_spec(module)
    except Exception as error:  # it imports the package of the module, which may be broken in any way
        raise LookupError(module) from error
    if spec is None or not spec.has_location or spec.origin is None:
        raise LookupError(module)
    return Path(spec.origin)


def _parse(file: Path, base: type, facts: tuple[str, ...]) -> Declaration:
    """Read a file with one class that inherits directly from `base`.

    Raises:
        LookupError: The file has another structure.
    """
    try:
        module = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise LookupError(file) from error
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    plugins = [node for node in classes if base.__name__ in map(ast.unparse, node.bases)]
    if len(plugins) != 1:
        raise LookupError(file)
    values = {fact: getattr(base, fact, "") for fact in facts} | dict(_constants(plugins[0], facts))
    return Declaration(ast.get_docstring(module) or "", _first_line(ast.get_docstring(plugins[0])), values)


def _constants(plugin: ast.ClassDef, facts: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the class attributes among `facts` that the class sets.

    Raises:
        LookupError: One is computed.
    """
    for node in plugin.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in facts and (value := getattr(node, "value", None)):
                try:
                    yield target.id, ast.literal_eval(value)
                except ValueError as error:
                    raise LookupError(target.id) from error


def _imported(cls: type, facts: tuple[str, ...]) -> Declaration:
    module = sys.modules[cls.__module__].__doc__
    return Declaration(module or "", _first_line(cls.__doc__), {fact: getattr(cls, fact, "") for fact in facts})


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]
