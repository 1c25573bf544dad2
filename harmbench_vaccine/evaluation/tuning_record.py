"""The record of a tuned protocol in a result."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class TuningRecord(BaseModel):
    """The tuning of the parameters that a run used, by `hbv tune`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    untuned_hash: str
    """Hash of the protocol with the parameters before the tuning: the results that this result is comparable with."""
    runs: Annotated[int, Field(ge=0)]
    """Number of runs that chose the parameters of the defenses of this run."""
    seconds: Annotated[float, Field(ge=0)]
    """Time of these runs; a stage of several runs counts once."""
