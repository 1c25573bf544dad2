"""The noise floor: the difference between two measurements of one model, which answers and is judged twice (A/A).

A difference between two defenses that is smaller than the noise floor is not interpreted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.jsonl import parse_json
from harmbench_vaccine.core.visible import visible_json
from harmbench_vaccine.experiment.spec import first_validation_error

from .records import run_lock
from .result_fields import Count, Environment, Percent, ResultRecord

REPEAT = "repeat.json"
"""The file in the folder of a run that has its second measurement."""


class RepeatedSet(ResultRecord):
    """The answers of one model to one evaluation set, generated twice."""

    answers: Count
    changed: Count
    """Number of answers with another text."""


class RepeatedScore(ResultRecord):
    """A score of the final model, measured twice over the same questions."""

    first: Percent
    """The score from the stored answers, in percent."""
    second: Percent
    """The score from the new answers."""
    n: Count
    """Number of questions that have a value both times; an unread verdict is not a value."""
    flips: tuple[int, ...]
    """Positions in the evaluation set, from 1, of the questions with another value."""
    floor: Percent
    """Mean absolute change of the values, in points; of verdicts, the share that flips."""


class RepeatedRun(ResultRecord):
    """The second measurement of a run: `repeat.json`."""

    schema_version: Literal[1] = 1
    run: str
    backend: str
    """Requested generation backend of the second measurement."""
    answered_by: list[str]
    """Every engine that generated the new answers."""
    environment: Environment
    """Date, machine and package versions of the second measurement."""
    answers: dict[str, RepeatedSet]
    """`before/SET` and `after/SET` -> both answers of the aligned and of the final model."""
    scores: dict[str, RepeatedScore]
    """`harmful_score`, `finetune_accuracy` and `refusal_rate` -> both values of the final model."""


@dataclass(frozen=True)
class NoiseFloor:
    """The noise floor of a score, over all runs that were measured twice."""

    flips: int
    """Number of values that changed."""
    n: int
    """Number of values."""
    points: float
    """Mean absolute change, in points."""


def save_repeat(folder: Path, repeat: RepeatedRun) -> None:
    """Write the second measurement of a run into its folder, atomically; an earlier one is replaced."""
    with readable_disk_errors(f"the repetition of {repeat.run}", folder), run_lock(folder):
        write_atomically(folder / REPEAT, visible_json(repeat.model_dump(mode="json"), indent=1))


def load_repeat(folder: Path) -> RepeatedRun | None:
    """Read the second measurement of a run, or None if it was measured once.

    Raises:
        HbvError: The file is damaged or cannot be read.
    """
    path = folder / REPEAT
    try:
        return RepeatedRun.model_validate(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = first_validation_error(error).rstrip(".")
    except (OSError, ValueError) as error:
        reason = str(error)
    raise HbvError(f"{path} cannot be read: {reason}. Write it again with `hbv compare {folder.name} --repeat`.")


def noise_floors(folders: Iterable[Path]) -> dict[str, NoiseFloor]:
    """Pool the second measurements of runs.

    Args:
        folders: Folders of runs; those that were measured once, or that do not exist, are left out.

    Returns:
        Score -> noise floor; empty if every run was measured once.

    Raises:
        HbvError: A file is damaged or cannot be read.
    """
    repeats = [repeat for folder in folders if (repeat := load_repeat(folder))]
    pooled = {}
    for name in dict.fromkeys(name for repeat in repeats for name in repeat.scores):
        scores = [repeat.scores[name] for repeat in repeats if name in repeat.scores]
        n = sum(score.n for score in scores)
        points = sum(score.n * score.floor for score in scores) / n
        pooled[name] = NoiseFloor(sum(len(score.flips) for score in scores), n, points)
    return pooled
