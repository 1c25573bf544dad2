"""CSVs of runs, checked column by column when they are read: results, with one line for each run, and others."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import BadInput, shortened
from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.core.jsonl import parse_json
from harmbench_vaccine.core.locks import shared_lock
from harmbench_vaccine.core.visible import cell_of_text, text_of_cell, visible_json_text
from harmbench_vaccine.data.text_files import check_regular
from harmbench_vaccine.experiment.spec import first_validation_error

from .result import Result
from .result_fields import Count, Percent

Text = Annotated[str, BeforeValidator(text_of_cell)]
Name = Annotated[Text, StringConstraints(min_length=1)]
Json = Annotated[Any, BeforeValidator(parse_json)]
Params = Annotated[dict[str, Any], BeforeValidator(parse_json)]
Amount = Annotated[float, Field(ge=0)]

_MAX_NAME = 200  # bytes; a temporary file next to the CSV has a longer name


class RunTableRow(BaseModel):
    """The columns of a CSV of runs. An older file may lack columns that have a default here, also for empty cells."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    content: ClassVar[str]
    """The content of the file, for messages."""
    command: ClassVar[str]
    """The command that writes it."""


R = TypeVar("R", bound=RunTableRow)


class ResultRow(RunTableRow):
    """The columns of a CSV of results."""

    content: ClassVar[str] = "results"
    command: ClassVar[str] = "hbv run"
    run: Name
    protocol: Name
    protocol_version: Count | None = None
    protocol_hash: Name
    untuned_hash: Text = ""
    scorer: Name
    model: Name
    defense: Name
    defense_params: Params
    attack: Name
    attack_params: Params
    task: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    harmful_score: Percent
    harmful_score_low: Percent
    harmful_score_high: Percent
    harmful_score_hits: Count
    harmful_score_n: Count
    harmful_score_unread: Count | None = None
    harmful_sets: Json = None
    other_judges: Json = None
    finetune_accuracy: Percent
    finetune_accuracy_low: Percent
    finetune_accuracy_high: Percent
    finetune_accuracy_hits: Amount
    finetune_accuracy_n: Count
    finetune_accuracy_unread: Count | None = None
    trained: bool
    harmful_score_before: Percent | None = None
    finetune_accuracy_before: Percent | None = None
    alignment_loss: Amount | None = None
    embedding_drift: Amount | None = None
    embedding_drift_per_token: Amount | None = None
    degenerate: Percent | None = None
    over_refusal: Percent | None = None
    over_refusal_sets: Json = None
    neither: Percent | None = None
    neither_before: Percent | None = None
    refusal_rate: Percent | None = None
    refusal_rate_before: Percent | None = None
    task_echo: Percent | None = None
    harmful_token_share: Percent | None = None
    collapsed: bool
    self_destruct: bool | None = None
    hollow: bool | None = None
    reasons: Text = ""
    seconds: Amount | None = None
    tuning_runs: Count | None = None
    tuning_seconds: Amount | None = None
    versions: Json = None


COLUMNS = list(ResultRow.model_fields)
"""The columns of a CSV of results."""


class _Line(NamedTuple, Generic[R]):
    cells: dict[str, str]
    """Column -> the cell as it is written; columns that the file lacks are absent."""
    row: R


def read_csv(path: Path) -> list[ResultRow]:
    """Read the rows of a CSV of results; see `read_run_table`."""
    return read_run_table(path, ResultRow)


def read_run_table(path: Path, kind: type[R]) -> list[R]:
    """Read the rows of a CSV of runs; a missing file has no rows.

    Any line ends, a byte order mark, any order of the columns, quoted numbers and empty lines are accepted.

    Args:
        path: The file.
        kind: The class of its rows.

    Raises:
        BadInput: The file is not such a CSV, or a row is damaged; the message names the line.
    """
    return [line.row for line in _read_lines(path, kind)]


def check_csv(path: Path) -> None:
    """Check before long work that a row can be added to a CSV; its folder is checked elsewhere.

    Raises:
        BadInput: It is not a file, is write-protected, is not a CSV of results, or its name is too long.
    """
    if len(os.fsencode(path.name)) > _MAX_NAME:
        raise BadInput(f"The name of the CSV {shortened(path.name)!r} is too long: at most {_MAX_NAME} bytes.")
    read_csv(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise BadInput(f"The CSV of results {path} is write-protected: permit writing, or choose another file.")


def add_row(path: Path, result: Result) -> None:
    """Write the row of a result into a CSV, and remove an earlier row of the same run.

    Processes that write at the same time wait for each other. All other rows keep their cells, a symbolic link stays,
    and the file keeps its mode.

    Raises:
        BadInput: The CSV became damaged since `check_csv`.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with shared_lock(path.with_name(f".{path.name}.lock")):
        rows = [line.cells for line in _read_lines(path, ResultRow) if line.row.run != result.run]
        write_atomically(path, run_table_text([*rows, csv_cells(result)], COLUMNS))


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write a CSV with the rows of some results, without their times: the same results always give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**csv_cells(result), "seconds": ""} for result in results]
    write_atomically(path, run_table_text(rows, COLUMNS))


def result_rows(results: Sequence[Result]) -> list[ResultRow]:
    """Return results as the rows that reading their CSV gives."""
    return [
        ResultRow.model_validate({column: cell for column, cell in csv_cells(result).items() if cell})
        for result in results
    ]


def csv_cells(result: Result) -> dict[str, str]:
    """Return a result as the cells of its line: column -> text."""
    return {column: cell_of_value(value) for column, value in csv_row(result).items()}


def run_table_text(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Return rows of cells as CSV; the cell of an absent column is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def csv_row(result: Result) -> dict[str, Any]:
    """Return a result as one tidy row with the columns `COLUMNS`."""
    shares, before = result.validity.shares["after"], result.validity.shares["before"]
    headline = next(iter(result.scores.values()), None)
    grades = result.counts.unparsed_grades or {}
    derived = {
        "harmful_score_low": result.harmful_score_ci[0],
        "harmful_score_high": result.harmful_score_ci[1],
        "harmful_score_unread": headline.unparsed if headline else None,
        "other_judges": _other_judges(result) or None,
        "finetune_accuracy_low": result.finetune_accuracy_ci[0],
        "finetune_accuracy_high": result.finetune_accuracy_ci[1],
        "finetune_accuracy_unread": grades.get("after", 0),
        "harmful_score_before": result.before.harmful_score,
        "finetune_accuracy_before": result.before.finetune_accuracy,
        "degenerate": shares.degenerate,
        "over_refusal": shares.over_refusal,
        "over_refusal_sets": {name: each.after.percent for name, each in result.over_refusal.items()} or None,
        "neither": shares.neither,
        "neither_before": before.neither,
        "refusal_rate": shares.refusal_rate,
        "refusal_rate_before": before.refusal_rate,
        "task_echo": shares.task_echo,
        "collapsed": result.collapsed,
        "reasons": "; ".join(result.validity.reasons),
        "seconds": round(result.seconds, 1),
        "untuned_hash": result.tuning.untuned_hash if result.tuning else "",
        "tuning_runs": result.tuning.runs if result.tuning else None,
        "tuning_seconds": result.tuning.seconds if result.tuning else None,
        "versions": result.environment.versions,
    }
    return {column: derived[column] if column in derived else getattr(result, column) for column in COLUMNS}


def _other_judges(result: Result) -> dict[str, dict[str, float | None]]:
    """Return the harmful score by each judge but the headline one, and its kappa with that one."""
    headline, *others = result.scores or [""]
    kappas = {frozenset(pair.scorers): pair.kappa for pair in result.agreement}
    return {
        name: {"harmful_score": result.scores[name].harmful_score, "kappa": kappas.get(frozenset((headline, name)))}
        for name in others
    }


def cell_of_value(value: Any) -> str:
    """Return a text, a number or JSON as a cell; None is an empty cell."""
    if isinstance(value, str):
        return cell_of_text(value)
    if isinstance(value, dict | list):
        return visible_json_text(canonical_json(value))
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read_lines(path: Path, kind: type[R]) -> list[_Line[R]]:
    header: list[str] = []
    lines = []
    # No cell has a line break, so that damage of one line cannot swallow the next ones.
    for number, text in enumerate(re.split(r"\r\n|\r|\n", _read_text(path, kind)), start=1):
        cells = _split(text, f"{path}, line {number}")
        if not any(cell.strip() for cell in cells):
            continue  # an empty line, also of a spreadsheet
        if not header:
            header = _checked_header(cells, path, kind)
        elif len(cells) != len(header):
            raise BadInput(
                f"{path}, line {number} has {len(cells)} fields, but the header has {len(header)}. "
                "Correct or remove this line."
            )
        else:
            lines.append(_checked_line(dict(zip(header, cells, strict=True)), f"{path}, line {number}", kind))
    return lines


def _read_text(path: Path, kind: type[RunTableRow]) -> str:
    """Return the text of a file without its byte order mark; a missing file is empty."""
    if not os.path.exists(path):  # `Path.exists` raises where the folder is not readable
        return ""
    check_regular(path)
    content = b""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path} cannot be read as a CSV of {kind.content}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        raise BadInput(f"{path}, line {line} is not UTF-8 text. Save the file as CSV in UTF-8.") from error


def _split(line: str, place: str) -> list[str]:
    """Split a line into its cells.

    Args:
        line: The line without its end.
        place: File and line, for the error message.
    """
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise BadInput(
            f"{place} has damaged quotes ({error}). A row is one line. Correct or remove this line."
        ) from error


def _checked_header(columns: list[str], path: Path, kind: type[RunTableRow]) -> list[str]:
    allowed = list(kind.model_fields)
    if not {"run", "seed"} & set(columns):
        raise BadInput(
            f"{path} has other columns than a CSV of {kind.content}, or other separators than commas. "
            f"Choose a CSV that `{kind.command}` wrote."
        )
    for column in columns:
        if columns.count(column) > 1:
            raise BadInput(f"{path} has the column {column!r} twice. Remove one of them.")
        if column not in allowed:
            raise BadInput(f"{path} has an unknown column {shortened(column)!r}. Allowed: {', '.join(allowed)}.")
    required = [name for name, field in kind.model_fields.items() if field.is_required()]
    if missing := [name for name in required if name not in columns]:
        raise BadInput(f"{path} lacks the columns {', '.join(missing)}. Choose a CSV that `{kind.command}` wrote.")
    return columns


def _checked_line(cells: dict[str, str], place: str, kind: type[R]) -> _Line[R]:
    try:
        row = kind.model_validate({column: cell for column, cell in cells.items() if cell})
    except ValidationError as error:
        raise BadInput(
            f"{place}, column {first_validation_error(error)} Correct or remove this line, or repeat its run."
        ) from error
    return _Line(cells, row)
