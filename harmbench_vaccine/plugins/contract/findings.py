"""The registry of contract checks, and the finding that each check reports."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import Progress

from ..attack import Attack
from ..base import Plugin
from ..defense import Defense
from ..scorer import Scorer
from ..task import Task

S = TypeVar("S", bound="Subject")
Outcome = Literal["ok", "fails", "n/a"]
_BASES: tuple[type[Plugin], ...] = (Defense, Attack, Scorer, Task)


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    demand: str
    """The requirement that is checked, in one sentence."""
    outcome: Outcome
    reason: str
    """Why the check fails or does not apply; empty if it passes."""
    blocked_by: str = ""
    """The failing check that this check depends on."""


class Fails(Exception):
    """The plug-in breaks the requirement; the message describes how."""


class NotApplicable(Exception):
    """The check does not apply to the plug-in; the message gives the reason."""


@dataclass
class Subject:
    """The plug-in under test: its class, and the parameters that it is checked with."""

    cls: type[Plugin]
    params: dict[str, Any]

    def setting(self) -> str:
        """Return the parameters as text for a finding."""
        return ", ".join(f"{key}={value}" for key, value in self.params.items()) or "its only setting"

    def hooks(self) -> list[str]:
        """Return the hooks that the class overrides."""
        return [name for name in hook_names(self.base) if getattr(self.cls, name) is not getattr(self.base, name)]

    @property
    def base(self) -> type[Plugin]:
        """The class whose hooks the plug-in may override."""
        return next(base for base in _BASES if issubclass(self.cls, base))

    def is_neutral(self) -> bool:
        """Return whether the parameters are the declared neutral setting."""
        return self.cls.neutral is not None and self.cls(**self.cls.neutral).model_dump() == self.params


@dataclass(frozen=True)
class Check(Generic[S]):
    """A requirement of the contract, and the function that raises where a plug-in breaks it."""

    name: str
    function: Callable[[S], None]
    after: Sequence[str] = ()
    """Checks that this one depends on: if one of them fails, this one does not apply."""

    @property
    def demand(self) -> str:
        """The requirement: the docstring of the function."""
        return " ".join((self.function.__doc__ or "").split())


@dataclass
class Checks(Generic[S]):
    """The ordered checks of one kind of plug-in."""

    all: list[Check[S]] = field(default_factory=list)

    def add(self, name: str, *, after: Sequence[str] = ()) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
        """Register the decorated function as a check.

        Args:
            name: The name of the check, as `hbv check` prints it.
            after: Names of the checks that it depends on.
        """

        def register(function: Callable[[S], None]) -> Callable[[S], None]:
            self.all.append(Check(name, function, after))
            return function

        return register

    def examine(self, subject: S, progress: Progress) -> list[Finding]:
        """Run every check on one plug-in; an exception of a hook is a failed check."""
        findings = []
        failures: dict[str, str] = {}  # check -> the failing check, itself or one that it depends on
        with progress.bar(f"check {subject.cls.name}", len(self.all)) as advance:
            for check in self.all:
                if cause := next((failures[name] for name in check.after if name in failures), ""):
                    finding = Finding(check.name, check.demand, "n/a", f"Not checked, because {cause!r} fails.", cause)
                else:
                    finding = Finding(check.name, check.demand, *_outcome(check, subject))
                if cause or finding.outcome == "fails":
                    failures[check.name] = cause or check.name
                findings.append(finding)
                advance(1)
        return findings


def _outcome(check: Check[S], subject: S) -> tuple[Outcome, str]:
    try:
        check.function(subject)
    except NotApplicable as reason:
        return "n/a", str(reason)
    except Fails as reason:
        return "fails", str(reason)
    except Exception as error:
        return "fails", _exception_reason(subject, error)
    return "ok", ""


def describe_value(value: Any) -> str:
    """Describe the type of a value, and the shape of a tensor, for a finding."""
    if hasattr(value, "requires_grad"):
        return f"a tensor {format_shape(value)}{' with a graph' if value.requires_grad else ''}"
    return f"a {type(value).__name__}"


def format_shape(value: Any) -> str:
    """Format the shape of a tensor for a finding."""
    return "x".join(map(str, value.shape)) or "without dimensions"


def hook_names(base: type[Plugin]) -> list[str]:
    """Return the hooks of a kind of plug-in."""
    functions = (name for name, value in vars(base).items() if inspect.isfunction(value))
    return [name for name in functions if not name.startswith(("_", "model_"))]  # model_: hooks of pydantic


def _exception_reason(subject: Subject, error: Exception) -> str:
    """Name the exception and the hook that raised it."""
    base = subject.base
    classes = [cls for cls in subject.cls.__mro__ if issubclass(cls, base) and cls is not base]
    codes = {
        inspect.unwrap(vars(cls)[name]).__code__: name
        for cls in classes
        for name in hook_names(base)
        if inspect.isfunction(vars(cls).get(name))
    }
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    hook = next((codes[code] for code in frames if code in codes), "")
    if isinstance(error, HbvError) and not hook:
        return str(error)  # it describes what a hook returned
    text = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    text = f"{hook or 'The harness, given what its hooks returned,'} raised {text}"
    if isinstance(error, BadInput):
        text += " (The checks run in a small world: NAME:key=value sets a parameter for them.)"
    if "object has no field" in text:  # pydantic's message for an attribute that is not a parameter
        text += ". Begin the names of attributes that are not parameters with an underscore."
    return text
