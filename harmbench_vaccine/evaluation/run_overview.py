"""The overview of a stored run, which lists read without the other parts of its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.jsonl import parse_json
from harmbench_vaccine.experiment.spec import first_validation_error

from .result_fields import Date, OverRefusal, Percent

RESULT = "result.json"

R = TypeVar("R")


class RunOverview(BaseModel):
    """The identity and the headline scores of a stored run; None is a part that an old result does not have."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    run: str
    defense: str
    attack: str
    task: str | None = None
    seed: int | None = None
    model: str | None = None
    protocol: str | None = None
    protocol_hash: str | None = None
    scorer: str | None = None
    harmful_score: Percent | None = None
    finetune_accuracy: Percent | None = None
    harmful_token_share: Percent | None = None
    trained: bool | None = None
    """False if the attack edits weights instead of training."""
    over_refusal: dict[str, OverRefusal] = Field(default_factory=dict)
    """Set of prompts that should not be refused -> refusals."""
    date: Date | None = Field(None, validation_alias=AliasPath("environment", "date"))
    """UTC date and time."""
    collapsed: bool | None = Field(None, validation_alias=AliasPath("validity", "collapsed"))
    """True if the final model fails a gate."""


def read_overview(folder: Path) -> RunOverview:
    """Read the overview of a run, whose result may be old and incomplete, without its answers.

    Raises:
        HbvError: The file is damaged or cannot be read.
    """
    return read_result_file(folder / RESULT, RunOverview.model_validate)


def read_result_file(path: Path, parse: Callable[[Any], R]) -> R:
    """Read the result of a run from its file.

    Args:
        path: The file.
        parse: Converts the plain JSON of the file.

    Raises:
        HbvError: The file is damaged or cannot be read.
    """
    try:
        return parse(parse_json(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise HbvError(
            f"{path} is not a result of this version: {first_validation_error(error)} Repeat its command."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HbvError(f"{path} cannot be read: {error}. Repeat the run's command to write it again.") from error
