"""The class attributes, required methods and signatures of a plug-in, checked when its class is loaded."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any, Literal, get_args, get_origin

from harmbench_vaccine.core.errors import BadInput, unknown_name

from .base import Plugin
from .grid import TuningGrid


def require_interface(cls: type[Plugin], base: type[Plugin]) -> None:
    """Check that a class has what the harness reads and calls, so that a mistake is reported before any work is spent.

    Args:
        cls: The class of the plug-in, with its name.
        base: The class of its kind.

    Raises:
        BadInput: A method or a class attribute is missing, an attribute has a value that is not allowed, a hook is not
            a method, or it takes other arguments.
    """
    plugin = f"{cls.kind.capitalize()} {cls.name!r}"
    types = inspect.get_annotations(base, eval_str=True)
    for name in base.__annotations__:
        if "ClassVar" in base.__annotations__[name]:
            if not hasattr(cls, name):
                raise BadInput(f"{plugin} has no class attribute {name!r}; see {base.__module__}.{base.__name__}.")
            _require_allowed(cls, name, types[name])
            if name == "grid":
                _require_grid(cls)
    hooks = [name for name in vars(base) if not name.startswith(("_", "model_"))]
    for name in hooks:
        hook, expected = inspect.getattr_static(cls, name), inspect.getattr_static(base, name)
        if hook is not expected and (problem := _hook_problem(cls, name, hook, expected)):
            raise BadInput(f"{plugin}: {problem}.")
    for name in cls.required_methods():
        if getattr(cls, name) is getattr(base, name):
            raise BadInput(f"{plugin} has no method {_call(name, getattr(base, name))}.")


def _require_allowed(cls: type[Plugin], name: str, declared: Any) -> None:
    """Check a class attribute where a wrong value would have no effect, or that of its letters.

    Raises:
        BadInput: It is a text instead of a tuple, or its type lists other values.
    """
    value = getattr(cls, name)
    if isinstance(value, str) and any(get_origin(kind) is tuple for kind in get_args(declared)):
        plugin = f"{cls.kind.capitalize()} {cls.name!r}"
        raise BadInput(f"{plugin}: {name} is a text, but must be a tuple: write ({value!r},) with the comma.")
    if choices := _listed_values(declared):
        for item in value if isinstance(value, tuple | list) else [value]:
            if item is not None and item not in choices:
                raise unknown_name(f"{name} value", str(item), choices, of=f"{cls.kind} {cls.name!r}")


def _require_grid(cls: type[Any]) -> None:
    """Check the parameter that `hbv tune` chooses.

    Raises:
        BadInput: It is not a grid, or the class does not have the parameter.
    """
    if cls.grid is None:
        return
    if not isinstance(cls.grid, TuningGrid):
        plugin = f"{cls.kind.capitalize()} {cls.name!r}"
        raise BadInput(f"{plugin}: grid is {cls.grid!r:.40}, but must be a TuningGrid: write TuningGrid(PARAMETER).")
    if cls.grid.parameter not in cls.model_fields:
        raise unknown_name("parameter", cls.grid.parameter, cls.model_fields, of=f"the grid of {cls.kind} {cls.name!r}")


def _listed_values(declared: Any) -> tuple[str, ...]:
    """Return the values of a Literal, also of one inside a tuple or an optional type; empty without a Literal."""
    if get_origin(declared) is Literal:
        return get_args(declared)
    return tuple(value for part in get_args(declared) for value in _listed_values(part))


def _hook_problem(cls: type[Plugin], name: str, hook: Any, expected: Any) -> str:
    """Describe how an overridden hook differs from the one that the harness calls; empty if it fits."""
    if isinstance(expected, property):
        is_method = inspect.isfunction(hook)
        return f"{name} is a method, but must be a property: write @property above it" if is_method else ""
    if not inspect.isfunction(expected):
        return ""
    method = f"a method {_call(name, expected)}"
    if isinstance(hook, property | cached_property):
        return f"{name} is a property, but must be {method}"
    if not callable(getattr(cls, name)):
        return f"{name} is a value ({hook!r:.40}), but must be {method}"
    if inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook):
        return f"{name} is asynchronous, but must be {method}"
    if _accepts(cls, name, expected):
        return ""
    return f"{name} takes other arguments ({_call(name, hook)}), but must be {method}"


def _accepts(cls: type[Plugin], name: str, expected: Any) -> bool:
    """Return whether a hook can be called with the required arguments of the interface, and with all of them."""
    instance = object()
    bound = inspect.getattr_static(cls, name)
    bound = bound.__get__(instance, cls) if hasattr(bound, "__get__") else bound
    parameters = list(inspect.signature(expected).parameters.values())[1:]
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    try:
        for arguments in (required, parameters):
            positional = [None for parameter in arguments if parameter.kind is not parameter.KEYWORD_ONLY]
            named = {parameter.name: None for parameter in arguments if parameter.kind is parameter.KEYWORD_ONLY}
            inspect.signature(bound).bind(*positional, **named)
    except TypeError:
        return False
    return True


def _call(name: str, function: Any) -> str:
    """Format a call of a hook, without `self`, types and defaults."""
    parameters = [
        str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
        for parameter in inspect.signature(function).parameters.values()
    ]
    return f"{name}({', '.join(text for text in parameters if text != 'self')})"
