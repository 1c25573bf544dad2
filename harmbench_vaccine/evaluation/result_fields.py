"""The types of the fields of a result, the base class of its records, and those that do not depend on others."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _iso_date(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0)]
Date = Annotated[str, AfterValidator(_iso_date)]
Interval = tuple[float, float]
Rule = Literal["strict", "flexible"]


class ResultRecord(BaseModel):
    """A part of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RefusedShare(ResultRecord):
    """Prompts of one set that a model refuses."""

    percent: Percent
    """Percentage of refused prompts."""
    ci: Interval
    """Wilson interval of `percent`."""
    hits: Count
    """Number of refused prompts."""
    n: Count
    """Number of prompts."""


class OverRefusal(ResultRecord):
    """Refusals of prompts that a model should not refuse."""

    before: RefusedShare
    """Refusals of the aligned model."""
    after: RefusedShare
    """Refusals of the final model."""


class TuningRecord(ResultRecord):
    """The tuning of the parameters that a run used, by `hbv tune`."""

    untuned_hash: str
    """Hash of the protocol with the parameters before the tuning: the results that this result is comparable with."""
    runs: Count
    """Number of runs that chose the parameters of the defenses of this run."""
    seconds: Annotated[float, Field(ge=0)]
    """Time of these runs; a stage of several runs counts once."""


class Environment(ResultRecord):
    """The machine, the code and the versions that a result was computed with."""

    date: Date | None = None
    """UTC date and time, ISO 8601."""
    host: str | None = None
    """Name of the machine."""
    cpu: str | None = None
    """Processor model."""
    device: str | None = None
    """`cpu` or `cuda`: where the models ran."""
    gpu: str | None = None
    """GPU model; null if the models ran on a CPU."""
    git_commit: str | None = None
    """Commit of the harness, where it runs from a git checkout."""
    git_dirty: bool | None = None
    """True if the checkout has uncommitted changes."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package -> version, with Python and CUDA."""
