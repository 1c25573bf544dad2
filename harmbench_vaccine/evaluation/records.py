"""Stored runs: read and write the folder of a run, with its result and its answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.jsonl import finite, read_lines
from harmbench_vaccine.core.locks import shared_lock
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.visible import visible_json
from harmbench_vaccine.experiment.spec import first_validation_error

from .agreement import AnswerRow, judge_scores, pairwise_agreement
from .over_refusal import with_earlier_sets
from .result import Result
from .result_judges import JudgeScore
from .results_csv import add_row
from .run_overview import RESULT, RunOverview, read_overview, read_result_file
from .run_registry import register_run_folder
from .scorer_facts import SCORER_FACTS

ANSWERS = "answers.jsonl"
_FURTHER_FIELDS = ConfigDict(extra="allow", strict=True)


class _StoredVerdict(BaseModel):
    """The fields of a verdict that every version stores."""

    model_config = _FURTHER_FIELDS

    flagged: bool | None
    categories: list[str] = []


class _StoredAnswer(BaseModel):
    """The fields of a row of `answers.jsonl` that every version stores, and those of a judged one."""

    model_config = _FURTHER_FIELDS

    when: Literal["before", "after"]
    set: str
    id: str
    instruction: str
    input: str
    target: str
    answer: str
    flagged: bool | None = None
    categories: list[str] = []
    verdicts: dict[str, _StoredVerdict] = {}
    grade: float | None = None


def save_run(result: Result, answers: list[dict[str, Any]], folder: Path, table: Path) -> Path:
    """Write the folder of a run as `save_run_folder` does, and the run's row of the CSV.

    Returns:
        The folder of the run.
    """
    run = save_run_folder(result, answers, folder)
    with readable_disk_errors(f"the result of {result.run}", table):
        add_row(table, result)
    return run


def save_run_folder(result: Result, answers: list[dict[str, Any]], folder: Path) -> Path:
    """Write `<folder>/<run>/` with a result and its answers.

    The verdicts that an earlier `hbv score` added for the same answers stay in the folder, and so do the over-refusal
    sets that only an earlier command measured for the same models.

    Returns:
        The folder of the run.
    """
    run = folder / result.run
    with readable_disk_errors(f"the result of {result.run}", run):
        run.mkdir(parents=True, exist_ok=True)
        register_run_folder(folder, home() / "store")
        with run_lock(run):
            write_run(run, *_with_earlier_measurements(run, result, answers))
    return run


def write_run(run: Path, result: Result, answers: Sequence[AnswerRow]) -> None:
    """Write the answers and the result of a run into its folder, each atomically."""
    write_atomically(run / ANSWERS, "".join(f"{visible_json(finite(row))}\n" for row in answers))
    write_atomically(run / RESULT, visible_json(result.to_json(), indent=1))


def load_run(folder: Path) -> tuple[Result, list[dict[str, Any]]]:
    """Read the result of a run, of this or an earlier schema, and its answers.

    Raises:
        HbvError: A file is damaged or cannot be read.
    """
    return load_result(folder), _read_answers(folder / ANSWERS)


def load_result(folder: Path) -> Result:
    """Read the result of a run, of this or an earlier schema, without its answers.

    Raises:
        HbvError: The file is damaged or cannot be read.
    """
    return read_result_file(folder / RESULT, Result.from_json)


def require_keys(result: Result) -> None:
    """Check that a result names the artifacts of its run.

    Raises:
        BadInput: An earlier version stored the run.
    """
    if not any(record.artifacts for record in result.stages.values()):
        raise BadInput(
            f"Run {result.run} was stored by an earlier version, without its keys. Repeat its `hbv run` command."
        )


def load_overview(folder: Path) -> tuple[RunOverview, list[dict[str, Any]]]:
    """Read the overview of a run, whose result may be old and incomplete, and its answers.

    Raises:
        HbvError: A file is damaged or cannot be read.
    """
    return read_overview(folder), _read_answers(folder / ANSWERS)


def _read_answers(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_lines(path)
    except OSError as error:
        raise HbvError(f"{path} cannot be read: {error}. Repeat the run's command to write it again.") from error
    for number, row in enumerate(rows, start=1):
        try:
            _StoredAnswer.model_validate(row)
        except ValidationError as error:
            raise HbvError(
                f"{path}, answer {number}, is damaged: {first_validation_error(error)} Repeat the run's command."
            ) from error
    return rows


def find_run(run: str, folder: Path) -> Path:
    """Return the folder of a run, by its id, a unique prefix of one, or a path.

    Raises:
        BadInput: No run or several runs match.
    """
    if os.path.isfile(Path(run) / RESULT):  # a name may be too long for a path
        return Path(run)
    runs = {path.parent.name: path.parent for path in folder.glob(f"*/{RESULT}")}
    if run in runs:
        return runs[run]
    matches = sorted(name for name in runs if name.startswith(run))
    if len(matches) > 1:
        raise BadInput(f"Run prefix {run!r} is ambiguous: {', '.join(matches)}.")
    if not matches:
        raise unknown_name("run", run, runs)
    return runs[matches[0]]


def by_question(
    answers: Sequence[dict[str, Any]], eval_set: str, only: str | None = None
) -> list[dict[str, dict[str, Any]]]:
    """Group the answers to one evaluation set by question: `before` and `after` -> row, or one of them.

    Args:
        answers: The answers of a run.
        eval_set: The name of the set.
        only: Keep questions whose `after` is "flagged", "unflagged" or "unread".
    """
    names = {True: "flagged", False: "unflagged", None: "unread"}
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in answers:
        if row["set"] == eval_set:
            pairs.setdefault(row["id"], {})[row["when"]] = row
    return [pair for pair in pairs.values() if only in (None, names.get(pair.get("after", {}).get("flagged", "")))]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts of further judges


def add_judges(
    result: Result,
    answers: Sequence[dict[str, Any]],
    verdicts: Mapping[Any, Mapping[str, Any]],
    judges: Mapping[str, Mapping[str, Any]],
) -> tuple[Result, list[dict[str, Any]]]:
    """Add the verdicts of further judges to a result and its answers.

    Args:
        result: The result.
        answers: Its answers.
        verdicts: `row_identity` of an answer -> judge -> verdict.
        judges: Judge -> its `scorer_facts`.
    """
    rows = [
        {**row, "verdicts": {**row["verdicts"], **{name: verdicts[row_identity(row)][name] for name in judges}}}
        if "verdicts" in row
        else row
        for row in answers
    ]
    facts = {**{name: judge_facts(score) for name, score in result.scores.items()}, **judges}
    update = {"scores": judge_scores(rows, facts), "agreement": pairwise_agreement(rows, list(facts))}
    return result.model_copy(update=update), rows


def row_identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that identify an answer of a run, its text included."""
    return tuple(row[key] for key in ("when", "set", "id", "instruction", "input", "answer"))


def run_lock(run: Path) -> FileLock:
    """Return the lock that keeps two processes from changing the folder of a run at the same time."""
    folder = home() / "store" / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return shared_lock(folder / f"run-{digest(str(run.resolve()))}")


def _with_earlier_measurements(
    run: Path, result: Result, answers: list[dict[str, Any]]
) -> tuple[Result, list[dict[str, Any]]]:
    try:
        earlier, earlier_rows = load_run(run)
        verdicts = {row_identity(row): row.get("verdicts", {}) for row in earlier_rows}
    except (HbvError, KeyError):  # a damaged folder is written again
        return result, answers
    judged = [row_identity(row) for row in answers if "verdicts" in row]
    further = {
        name: judge_facts(score)
        for name, score in earlier.scores.items()
        if name not in result.scores and all(name in verdicts.get(identity, {}) for identity in judged)
    }
    result, answers = add_judges(result, answers, verdicts, further)
    return with_earlier_sets(result, answers, earlier, earlier_rows)


def judge_facts(score: JudgeScore) -> dict[str, Any]:
    """Return the `scorer_facts` of a judge from its stored score."""
    return {key: getattr(score, key) for key in SCORER_FACTS}
