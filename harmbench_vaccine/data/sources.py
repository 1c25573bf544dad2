"""Where rows come from: a folder or file on disk, the testbed, or a data set of the hub, all through one door."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, HbvError, unknown

TESTBED = "testbed:"
"""Prefix of a location inside the embedded testbed."""


def locate(location: str) -> Path | None:
    """The path that a location stands for; None for a name on the hub.

    Raises:
        BadInput: it looks like a path, and nothing is there.
    """
    if location.startswith(TESTBED):
        from .. import testbed

        check_testbed(location)
        return testbed.folder() / location.removeprefix(TESTBED)
    path = Path(location).expanduser()
    if path.exists():
        return path.absolute()
    if (
        location.startswith((".", "/", "~"))
        or location.count("/") > 1
        or path.suffix in {".jsonl", ".json", ".csv", ".parquet"}
    ):
        raise BadInput(f"There is nothing at {location!r}: name a file, a folder, or a data set or model of the hub.")
    return None


def check_testbed(location: str) -> None:
    """Refuses a location that names no part of the testbed, without building it.

    Raises:
        BadInput: it names none.
    """
    from ..testbed import PARTS

    if location.startswith(TESTBED) and location.removeprefix(TESTBED) not in PARTS:
        raise unknown("part of the testbed", location, [TESTBED + part for part in PARTS])


def fingerprint(location: str) -> str:
    """A hash of what lies at a location, for addresses in the store; a name on the hub stands for itself.

    Text files are hashed whole; a model's weights by name, size and time, since they take minutes to read.
    """
    path = locate(location)
    if path is None:
        return location
    whole = hashlib.sha256()
    for file in sorted([path] if path.is_file() else path.rglob("*")):
        if not file.is_file():
            continue
        whole.update(file.relative_to(path).as_posix().encode())
        if file.suffix in {".safetensors", ".bin", ".parquet", ".arrow"}:
            status = file.stat()
            whole.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        else:
            whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


TEXTS = frozenset({"prompt", "response", "refusal", "instruction", "output", "sentence", "text", "question", "answer"})
"""Fields that hold text in every data set that is read here."""


@dataclass(frozen=True)
class Row:
    """One row of a data set, with the place it came from for messages and ids."""

    number: int
    """Counts from 0 in the split."""
    values: Mapping[str, Any]
    place: str
    """File and line, or data set, split and row."""


def read(location: str, split: str, fields: Sequence[str]) -> list[Row]:
    """The rows of one split, in file order.

    Raises:
        BadInput: there is no such split, a line is no JSON object, or a row lacks one of `fields`.
    """
    path = locate(location)
    rows = []
    for number, (place, values) in enumerate(_file(path, split) if path else _hub(location, split)):
        if missing := [name for name in fields if name not in values]:
            raise BadInput(f"{place}: field {missing[0]!r} is missing; a row needs {', '.join(fields)}.")
        for name in fields:
            if name in TEXTS and not isinstance(values[name], str):
                raise BadInput(f"{place}: field {name!r} holds {values[name]!r}, which is no text.")
            if name == "is_safe" and not isinstance(values[name], bool):
                raise BadInput(f"{place}: field {name!r} holds {values[name]!r}; allowed: true, false.")
        rows.append(Row(number, values, place))
    if not rows:
        raise BadInput(f"Split {split!r} of {location} is empty.")
    return rows


def _file(path: Path, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.is_file():
        there = sorted(other.stem for other in path.glob("*.jsonl"))
        raise BadInput(
            f"{path} has no split {split!r}. Allowed: {', '.join(there) or 'none: it holds no .jsonl file'}."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text: {error}.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except ValueError as error:
                raise BadInput(f"{place}: not JSON: {error}.") from error
            if not isinstance(values, dict):
                raise BadInput(f"{place}: a row is a JSON object, not {type(values).__name__}.")
            yield place, values


def _hub(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=split)
    except Exception as error:  # the library raises a dozen kinds; the user needs the sentence
        raise HbvError(f"Data set {name!r}, split {split!r}, cannot be read: {error}") from error
    for number, values in enumerate(rows):
        yield f"{name}, split {split}, row {number}", values
