"""Stored runs: read and write the folder of a run (result and answers) and its row of the CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.hashing import canonical_json, digest
from harmbench_vaccine.core.jsonl import read_lines
from harmbench_vaccine.core.locks import shared_lock
from harmbench_vaccine.core.paths import home

from .agreement import SCORER_FACTS, AnswerRow, judge_scores, pairwise_agreement
from .result import JudgeScore, Result

RESULT, ANSWERS = "result.json", "answers.jsonl"

COLUMNS = [
    *("run", "protocol", "protocol_version", "protocol_hash", "scorer", "model"),
    *("defense", "defense_params", "attack", "attack_params", "task", "seed"),
    *("harmful_score", "harmful_score_low", "harmful_score_high", "harmful_score_hits", "harmful_score_n"),
    "harmful_sets",
    *("finetune_accuracy", "finetune_accuracy_low", "finetune_accuracy_high"),
    *("finetune_accuracy_hits", "finetune_accuracy_n", "trained"),
    *("harmful_score_before", "finetune_accuracy_before"),
    *("alignment_loss", "embedding_drift", "embedding_drift_per_token"),
    *("degenerate", "over_refusal", "neither", "collapsed", "reasons", "seconds", "versions"),
]
"""The columns of a CSV of results."""


def save_run(result: Result, answers: list[dict[str, Any]], folder: Path, table: Path) -> Path:
    """Write `<folder>/<run>/` with a result and its answers, and the run's row of the CSV.

    The verdicts that an earlier `hbv score` added for the same answers stay in the folder.

    Returns:
        The folder of the run.
    """
    run = folder / result.run
    with readable_disk_errors(f"the result of {result.run}", run):
        run.mkdir(parents=True, exist_ok=True)
        with run_lock(run):
            write_run(run, *_with_earlier_judges(run, result, answers))
        _append(table, result)
    return run


def write_run(run: Path, result: Result, answers: Sequence[AnswerRow]) -> None:
    """Write the answers and the result of a run into its folder, each atomically."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    write_atomically(run / ANSWERS, lines)
    write_atomically(run / RESULT, json.dumps(result.to_json(), indent=1, ensure_ascii=False, allow_nan=False))


def load_run(folder: Path) -> tuple[Result, list[dict[str, Any]]]:
    """Read the result of a run, of this or an earlier schema, and its answers.

    Raises:
        HbvError: The result cannot be read.
    """
    path = folder / RESULT
    try:
        result = Result.from_json(json.loads(path.read_text(encoding="utf-8")))
        return result, read_lines(folder / ANSWERS)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise HbvError(f"{path} is not a result of this version: {where}: {error.errors()[0]['msg']}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HbvError(f"{path} cannot be read: {error}. Repeat the run's command to write it again.") from error


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
    """Group the answers to one evaluation set by question: `before` and `after` -> row.

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
    return [pair for pair in pairs.values() if only in (None, names.get(pair["after"].get("flagged", "")))]


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
    facts = {**{name: _facts(score) for name, score in result.scores.items()}, **judges}
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


def _with_earlier_judges(
    run: Path, result: Result, answers: list[dict[str, Any]]
) -> tuple[Result, list[dict[str, Any]]]:
    try:
        earlier, earlier_rows = load_run(run)
        verdicts = {row_identity(row): row.get("verdicts", {}) for row in earlier_rows}
    except (HbvError, KeyError):  # a damaged folder is written again
        return result, answers
    judged = [row_identity(row) for row in answers if "verdicts" in row]
    further = {
        name: _facts(score)
        for name, score in earlier.scores.items()
        if name not in result.scores and all(name in verdicts.get(identity, {}) for identity in judged)
    }
    return add_judges(result, answers, verdicts, further)


def _facts(score: JudgeScore) -> dict[str, Any]:
    return {key: getattr(score, key) for key in SCORER_FACTS}


# ---------------------------------------------------------------------------------------------------------------------
# The CSV


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV of results; a missing file has no rows.

    Raises:
        BadInput: The file is not such a CSV.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or list(reader.fieldnames) == COLUMNS:
                return list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as a CSV of results: {error}.") from error
    raise BadInput(f"{path} has other columns than the results of this version: choose a CSV that `hbv run` wrote.")


def csv_row(result: Result) -> dict[str, Any]:
    """Return a result as one tidy row with the columns `COLUMNS`."""
    shares = result.validity.shares["after"]
    derived = {
        "harmful_score_low": result.harmful_score_ci[0],
        "harmful_score_high": result.harmful_score_ci[1],
        "finetune_accuracy_low": result.finetune_accuracy_ci[0],
        "finetune_accuracy_high": result.finetune_accuracy_ci[1],
        "harmful_score_before": result.before.harmful_score,
        "finetune_accuracy_before": result.before.finetune_accuracy,
        "degenerate": shares.degenerate,
        "over_refusal": shares.over_refusal,
        "neither": shares.neither,
        "collapsed": result.collapsed,
        "reasons": "; ".join(result.validity.reasons),
        "seconds": round(result.seconds, 1),
        "versions": result.environment.versions,
    }
    return {column: derived[column] if column in derived else getattr(result, column) for column in COLUMNS}


def _append(path: Path, result: Result) -> None:
    """Write a result's row into the CSV, replacing an earlier row of the same run."""
    row = {key: _csv_text(value) for key, value in csv_row(result).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with shared_lock(path.with_name(f".{path.name}.lock")):
        rows = [earlier for earlier in read_csv(path) if earlier["run"] != row["run"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        write_atomically(path, text.getvalue())


def _csv_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return canonical_json(value) if isinstance(value, dict | list) else str(value)
