"""Plug-ins as a Python program names them: a text, a class, an object, or a tuple that composes them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

from harmbench_vaccine.core.errors import BadInput, shortened

from .base import Plugin
from .composition import Component, Composition, parse_plugins
from .registry import Registry

P = TypeVar("P", bound=Plugin)

PluginSpec = str | type[Plugin] | Plugin | tuple[str | type[Plugin] | Plugin, ...]
"""A text such as "name:key=5", a class, an object such as `Name(key=5)`, or a tuple that composes several of them."""


def parse_specification(written: PluginSpec, registry: Registry[P]) -> Composition:
    """Return the components of a specification.

    Of an object, only the parameters that its constructor received override the protocol.

    Args:
        written: The specification.
        registry: The registry of its kind; it receives classes that it does not have, such as one of a notebook.

    Raises:
        BadInput: The text does not follow the grammar, an object is not a plug-in of this kind, or a tuple is empty.
    """
    if isinstance(written, str):
        return parse_plugins(written)
    if isinstance(written, tuple):
        if not written:
            raise BadInput(f"A tuple that composes {registry.base.kind} plug-ins is empty; give at least one.")
        return tuple(component for part in written for component in parse_specification(part, registry))
    cls = written if inspect.isclass(written) else type(written)
    if not issubclass(cls, registry.base):
        raise BadInput(
            f"{shortened(repr(written))} specifies no {registry.base.kind}; allowed: a text such as "
            f"'name:key=value', a subclass of {registry.base.__name__}, an object of one, or a tuple of these."
        )
    params = {} if inspect.isclass(written) else written.model_dump(exclude_unset=True)
    return (Component(name=registry.register(cls), params={key: _text(value) for key, value in params.items()}),)


def check_class_names(specifications: Iterable[PluginSpec]) -> None:
    """Check that no two classes have the same name: only the last one would be registered.

    Raises:
        BadInput: Two classes have the same name.
    """
    parts = [part for written in specifications for part in (written if isinstance(written, tuple) else (written,))]
    classes = {part if inspect.isclass(part) else type(part) for part in parts}
    for name, count in Counter(cls.__name__ for cls in classes).items():
        if count > 1:
            raise BadInput(f"Two classes are named {name!r}; rename one of them.")


def _text(value: Any) -> str | int | float | bool:
    return "none" if value is None else value if isinstance(value, str | int | float | bool) else str(value)
