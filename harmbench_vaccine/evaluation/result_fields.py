"""The types of the fields of a result, and the base class of its records."""

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


class TuningRecord(ResultRecord):
    """The tuning of the parameters that a run used, by `hbv tune`."""

    untuned_hash: str
    """Hash of the protocol with the parameters before the tuning: the results that this result is comparable with."""
    runs: Count
    """Number of runs that chose the parameters of the defenses of this run."""
    seconds: Annotated[float, Field(ge=0)]
    """Time of these runs; a stage of several runs counts once."""
