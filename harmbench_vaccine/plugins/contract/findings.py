"""Checks, and how what they find is told."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import Progress

from ..attack import Attack
from ..base import Plugin
from ..defense import Defense

S = TypeVar("S", bound="Subject")
Outcome = Literal["ok", "fails", "n/a"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    demand: str
    """What it asks of a plug-in, in a sentence."""
    outcome: Outcome
    reason: str
    """What failed, or why the check does not apply; empty where all is well."""
    blocked_by: str = ""
    """The failing check without which this one says nothing."""


class Fails(Exception):
    """The plug-in does not do what it should; the text says what it does."""


class NotApplicable(Exception):
    """There is nothing to check; the text says why."""


@dataclass
class Subject:
    """What is checked: a plug-in's class with the parameters that it is checked at."""

    cls: type[Plugin]
    params: dict[str, Any]

    def words(self) -> str:
        """The parameters, to be named in a finding."""
        return ", ".join(f"{key}={value}" for key, value in self.params.items()) or "its only setting"

    def hooks(self) -> list[str]:
        """The hooks that it overrides."""
        return [name for name in hooks_of(self.base) if getattr(self.cls, name) is not getattr(self.base, name)]

    @property
    def base(self) -> type[Plugin]:
        """The class whose hooks it may override."""
        return Defense if issubclass(self.cls, Defense) else Attack

    def is_neutral(self) -> bool:
        """Whether the parameters are those at which it says that it changes nothing."""
        return self.cls.neutral is not None and self.cls(**self.cls.neutral).model_dump() == self.params


@dataclass(frozen=True)
class Check(Generic[S]):
    """One demand, and the function that raises where it is not met."""

    function: Callable[[S], None]
    after: Sequence[str]
    """Checks without which this one says nothing: where one of them fails, it does not apply."""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def demand(self) -> str:
        return " ".join((self.function.__doc__ or "").split())


@dataclass
class Checks(Generic[S]):
    """The checks of one kind of plug-in, in their order."""

    all: list[Check[S]] = field(default_factory=list)

    def add(self, *after: str) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
        """Makes a check of a function: its name is the check's, its docstring is what it demands."""

        def adding(function: Callable[[S], None]) -> Callable[[S], None]:
            self.all.append(Check(function, after))
            return function

        return adding

    def examine(self, subject: S, progress: Progress) -> list[Finding]:
        """Every check on one plug-in. What a hook raises is a failed check."""
        findings = []
        blocked: dict[str, str] = {}  # check -> the failing one, itself or one that it needs
        with progress.bar(f"check {subject.cls.name}", len(self.all)) as advance:
            for check in self.all:
                if needed := next((blocked[other] for other in check.after if other in blocked), ""):
                    reason = f"It says nothing while {needed!r} fails."
                    finding = Finding(check.name, check.demand, "n/a", reason, needed)
                else:
                    finding = Finding(check.name, check.demand, *_outcome(check, subject))
                if needed or finding.outcome == "fails":
                    blocked[check.name] = needed or check.name
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
        return "fails", _raised(subject, error)
    return "ok", ""


def a(value: Any) -> str:
    """What something is, for a finding."""
    if hasattr(value, "requires_grad"):
        return f"a tensor {shape(value)}{' with a graph' if value.requires_grad else ''}"
    return f"a {type(value).__name__}"


def shape(value: Any) -> str:
    """A tensor's shape, for a finding."""
    return "x".join(map(str, value.shape)) or "without dimensions"


def hooks_of(base: type[Plugin]) -> list[str]:
    """The hooks of a kind of plug-in."""
    own = (name for name, value in vars(base).items() if inspect.isfunction(value))
    return [name for name in own if not name.startswith(("_", "model_"))]  # model_: pydantic's


def _raised(subject: Subject, error: Exception) -> str:
    """What was raised, and the hook that it came out of."""
    base = subject.base
    own = [cls for cls in subject.cls.__mro__ if issubclass(cls, base) and cls is not base]
    codes = {
        inspect.unwrap(vars(cls)[name]).__code__: name
        for cls in own
        for name in hooks_of(base)
        if inspect.isfunction(vars(cls).get(name))
    }
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    hook = next((codes[code] for code in frames if code in codes), "The harness, given what its hooks returned,")
    text = f"{hook} raised {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    if isinstance(error, BadInput):
        text += " (The world of the checks is small: NAME:key=value sets a parameter for them.)"
    return text
