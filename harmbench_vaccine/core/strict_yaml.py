"""YAML without surprises: the core schema of YAML 1.2, unique names, no tags, and a limit on references.

YAML 1.1, which the library reads by default, takes 1:30 for the number 90, 010 for 8, `no` for false and 2001-01-01 for
a date, requires a decimal point in 1e-3, and keeps the last of two equal names. References (`*name`) can describe
gigabytes in a few lines, or a list that contains itself.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from .errors import BadInput, shortened

_CORE_SCHEMA = [
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
]
"""Type, pattern and first characters of the plain values that are not text; the first match counts."""


_MAX_VALUES = 100_000
"""Allowed number of values in a text, where a value counts again for each reference to it."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # the library shares it by class

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0
        self._counts: dict[yaml.Node, int] = {}
        """Complete node -> the number of values in it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        before = self._count
        if tag := getattr(event, "tag", None):
            problem = f"tags ({tag.replace('tag:yaml.org,2002:', '!!')}) are not allowed"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        node: Any = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and node not in self._counts:
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor} is inside itself", mark)
        self._count += self._counts.get(node, 1)
        if self._count > _MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {_MAX_VALUES} values", mark)
        self._counts[node] = self._count - before
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        for name_node, _ in node.value:
            name = self.construct_object(name_node, deep=True)
            if not isinstance(name, str):
                problem = f"a name must be text, not {shortened(repr(name))}"
                raise yaml.constructor.ConstructorError(None, None, problem, name_node.start_mark)
            if name in names:
                problem = f"{shortened(name)!r} is set twice"
                raise yaml.constructor.ConstructorError(None, None, problem, name_node.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: Any) -> int:
        text = self.construct_scalar(node)
        try:
            return int(text)
        except ValueError as error:  # thousands of digits
            problem = f"a number of {len(text)} digits is not supported"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


for _kind, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


def read_yaml(text: str, origin: str) -> Any:
    """Read a YAML text.

    Args:
        text: The text.
        origin: Description of its origin, which begins the error message.

    Raises:
        BadInput: It cannot be read.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = str(error.problem or error.context).replace("unexpected ", "")  # our word for a fault of the program
        raise BadInput(f"{origin} cannot be read as YAML: {place}{problem}.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{origin} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    except RecursionError as error:
        raise BadInput(f"{origin} cannot be read as YAML: it is nested too deeply.") from error
    except ValueError as error:  # an escape in quotes that is not a character
        raise BadInput(f"{origin} cannot be read as YAML: {error}.") from error
