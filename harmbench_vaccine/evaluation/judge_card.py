"""The description of a trained judge: `judge.json` in its folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.jsonl import parse_json
from harmbench_vaccine.data.text_files import read_text
from harmbench_vaccine.experiment.spec import first_validation_error

from .judge_report import JudgeReport, SecondJudge
from .result import DataSource
from .result_fields import Count, ResultRecord

CARD = "judge.json"


class LabeledRowCounts(ResultRecord):
    """The labeled pairs of one use."""

    rows: Count
    unsafe: Count
    """Number of pairs with an unsafe answer."""
    questions: Count
    """Number of different questions."""
    categories: dict[str, int]
    """Harm category -> number of pairs with it; categories without a pair are left out."""


class JudgeBase(ResultRecord):
    """The model that training started from."""

    location: str
    """A folder, a GGUF file, or a name of the Hub."""
    fingerprint: str
    """Hash of its content, or its name and commit on the Hub."""


class JudgeSettings(ResultRecord):
    """The choices of a training."""

    split: str
    held_out_split: str | None
    """Null: the pairs for the report were held out of `split`."""
    held_out: float | None
    """Share of the questions that were held out; null with `held_out_split`."""
    balance: float | None
    """Largest ratio of the more frequent kind of answer to the other one; null: no limit."""
    epochs: float
    lr: float
    batch: Count
    schedule: str
    warmup: float
    weight_decay: float
    max_length: Count
    """Tokens that the judge was trained on, and reads in the report: `tokens` of the scorer."""
    seed: Count


class JudgeCard(ResultRecord):
    """A trained judge, its data and its quality on held-out pairs."""

    made_by: str
    base: JudgeBase
    data: DataSource
    training: LabeledRowCounts
    """The pairs that the judge learned from."""
    held_out: LabeledRowCounts
    """The pairs of the report; their questions are not among those of training."""
    contradictory: Count
    """Rows that were left out, because `is_safe` and the categories contradict each other."""
    settings: JudgeSettings
    steps: Count
    """Number of optimizer steps."""
    losses: list[float]
    """Mean loss of every epoch."""
    report: JudgeReport
    """The quality on the held-out pairs."""
    second_judges: dict[str, SecondJudge]
    """Scorer -> its quality on the same pairs, and its agreement with this judge."""


def read_judge_card(folder: Path) -> JudgeCard | None:
    """Return the card of a folder; None if it has none.

    Raises:
        BadInput: The card is damaged.
    """
    path = folder / CARD
    if not path.exists():
        return None
    try:
        return JudgeCard.model_validate(parse_json(read_text(path)))
    except ValidationError as error:
        raise BadInput(
            f"{path} is not the card of a judge: {first_validation_error(error)} Copy the folder again, or delete this "
            "file."
        ) from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}. Copy the folder again, or delete this file.") from error
