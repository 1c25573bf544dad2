"""The code that the fingerprint of a plug-in covers: its file, the helpers that it imports, and its prompt file."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput

CONTRACT = frozenset(f"{__package__}.{module}" for module in ("base", "defense", "attack", "task", "scorer"))
"""Modules of base classes, which are not part of a fingerprint."""
_FILES = 512
"""Number of files whose code is parsed once: every run computes the fingerprints of its plug-ins."""


def code_of_modules(modules: Mapping[str, Path]) -> str:
    """Return the code of modules without comments, docstrings and imports.

    A helper is a module that they import from their own folder or from `harmbench_vaccine.plugins`. A prompt file has
    the name of a module and the ending `.txt`. The code of helpers and the text of prompt files come after the modules.

    Args:
        modules: Dotted name -> file.
    """
    covered = dict(modules)
    unread = list(modules)
    while unread:
        helpers = dict(_helpers(name := unread.pop(), covered[name]))
        unread += helpers.keys() - covered.keys()
        covered = helpers | covered
    prompts = [file.with_suffix(".txt") for _, file in sorted(covered.items())]
    helper_files = [covered[name] for name in sorted(covered.keys() - modules.keys())]
    files = dict.fromkeys([*modules.values(), *helper_files])
    code = [_normal_form(file.read_text(encoding="utf-8")) for file in files]
    return "".join([*code, *(file.read_text(encoding="utf-8") for file in prompts if file.is_file())])


def code_of_definitions(definitions: Iterable[type]) -> str:
    """Return the code of classes of a script or a notebook, and of everything in their module that it uses.

    These are functions, classes, plain values and containers of these, at any depth; modules that they import and
    other objects are left out.

    Raises:
        BadInput: The code of a class or a function is not available.
    """
    unread: list[Any] = list(definitions)
    read: set[int] = set()
    texts: set[str] = set()
    while unread:
        definition = unread.pop()
        if id(definition) in read:
            continue
        read.add(id(definition))
        tree = _tree(definition)
        texts.add(f"{definition.__qualname__}: {ast.unparse(_CodeOnly().visit(tree))}")
        module = vars(sys.modules[definition.__module__])
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & module.keys():
            text, used = _value_text(module[name], definition.__module__)
            unread += used
            texts |= {f"{name}: {text}"} if text else set()
    return "\n".join(sorted(texts))


def _value_text(value: Any, module: str) -> tuple[str, list[Any]]:
    """Return a text that is equal in every process, and the functions and classes of the module that the value has.

    The text of other objects, whose `repr` may have an address, is empty.
    """
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__qualname__, [value] if value.__module__ == module else []
    if isinstance(value, dict | tuple | list | set | frozenset):
        parts = [_value_text(item, module) for item in (value.items() if isinstance(value, dict) else value)]
        texts = [text for text, _ in parts]
        if isinstance(value, set | frozenset):
            texts.sort()
        return f"{type(value).__name__}({', '.join(texts)})", [item for _, used in parts for item in used]
    return (repr(value) if isinstance(value, str | int | float | bool | None) else ""), []


def _tree(definition: Any) -> ast.Module:
    """Parse the source of a function or a class.

    Raises:
        BadInput: It is not available, or it is a part of a statement, as that of a lambda in a dictionary.
    """
    try:
        return ast.parse(textwrap.dedent(_source(definition)))
    except SyntaxError as error:
        raise BadInput(f"The code of {definition.__qualname__!r} is not available: write it with `def`.") from error


def _source(definition: Any) -> str:
    """Return the source of a function or a class; inspect does not find that of a class in a notebook."""
    with suppress(OSError, TypeError):
        return inspect.getsource(definition)
    for member in vars(definition).values():
        if inspect.isfunction(member):
            cell = "".join(linecache.getlines(member.__code__.co_filename))
            for node in ast.parse(cell).body if cell else ():
                if isinstance(node, ast.ClassDef) and node.name == definition.__name__:
                    return ast.unparse(node)
    raise BadInput(f"The code of {definition.__name__!r} is not available: define it in a file.")


def _helpers(module: str, file: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of each helper that a module imports, at any depth of its code."""
    package = module.rpartition(".")[0]
    folders = {__package__: Path(__file__).parent, package: file.parent}
    for name in _imports(file.read_text(encoding="utf-8"), package):
        parent, _, stem = name.rpartition(".")
        folder = folders.get(parent)
        if folder and name not in CONTRACT and f"{stem}.py" in os.listdir(folder):  # with equal letter case
            yield name, folder / f"{stem}.py"


@lru_cache(maxsize=_FILES)
def _imports(code: str, package: str) -> tuple[str, ...]:
    """Return the dotted names that a module of a package imports, members of modules included."""
    names: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return tuple(names)


UNCOVERED = frozenset({"grid", "separate_trainings"})
"""Class attributes and methods that change nothing that a plug-in computes, and are not part of a fingerprint."""


class _CodeOnly(ast.NodeTransformer):
    """A transformer that removes docstrings, other bare strings, imports and the members `UNCOVERED` of classes."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [statement for statement in node.body if not _defined_names(statement) & UNCOVERED]
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...


def _defined_names(statement: ast.stmt) -> set[str]:
    """Return the names that an assignment or a function sets; empty for another statement."""
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@lru_cache(maxsize=_FILES)
def _normal_form(code: str) -> str:
    return ast.unparse(_CodeOnly().visit(ast.parse(code)))
