"""Read rows from data files (JSON, JSON Lines, CSV, TSV, parquet, plain or compressed) and from folders of splits.

A folder may be written by `datasets` with `save_to_disk`, or contain its splits like the data sets of the Hub:
`train.jsonl`, `data/train-00000-of-00002.parquet`, or `round0/30k/train.jsonl.gz` for the split `30k_train` of
BeaverTails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.jsonl import parse_json

from .tables import read_table
from .text_files import check_regular, first_line, read_text, size_limit, too_large

PlacedRow = tuple[str, Mapping[str, Any]]
"""The place of a row, for error messages, and the row."""

_NAME = re.compile(
    r"(?P<split>.+?)(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5})(?:-[0-9a-f]{16})?)?"
    r"(?P<kind>(?i:\.(?:jsonl|json|csv|tsv|parquet)))(?i:\.(?:gz|xz))?"
)
"""The name of a data file. The Hub's converter appends a hash to the shard."""
_NO_SPLITS = frozenset({"dataset_infos", "dataset_info", "state"})
"""Stems of JSON files that describe a data set."""


def is_data_file(name: str) -> bool:
    """Return True if a file with this name contains rows."""
    return _NAME.fullmatch(Path(name).name) is not None


def read_path(path: Path, split: str) -> Iterator[PlacedRow]:
    """Read the rows of one split of a folder, or all rows of a file, in order.

    Raises:
        BadInput: The folder has no such split, or a file does not have the format of its name.
    """
    if path.is_dir():
        # `Path.is_file` would raise an error in a folder whose files may not be read
        if any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json")):
            yield from _saved_dataset(path, split)
            return
        for file in _files_of(path, split):
            yield from _file(file)
    else:
        yield from _file(path)


def read_dataset(place: str, table: Any) -> Iterator[PlacedRow]:
    """Read the rows of a `datasets.Dataset` in order.

    Args:
        place: Description of the data set, for error messages.
        table: The data set.

    Raises:
        BadInput: A column cannot be decoded, such as one with pictures.
    """
    number = 0  # batches of columns are ten times faster than single rows
    for batch in _batches(place, table):
        for values in zip(*batch.values(), strict=True):
            yield f"{place}, row {number}", dict(zip(batch, values, strict=True))
            number += 1


def _batches(place: str, table: Any) -> Iterator[Mapping[str, list[Any]]]:
    try:
        yield from table.iter(batch_size=1000)
    except Exception as error:  # decoders of pictures and sounds raise many kinds of errors
        raise BadInput(f"{place} cannot be read: {first_line(error)}. Keep only text and numbers.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _files_of(folder: Path, split: str) -> list[Path]:
    splits = _splits(folder)
    if split not in splits:
        names = ", ".join(sorted(splits)) or "none: it contains no .jsonl, .json, .csv, .tsv or .parquet file"
        raise BadInput(f"{folder} has no split {split!r}. Allowed: {names}.")
    files = sorted(splits[split])
    matches = [_NAME.fullmatch(file.name) for file in files]
    shards = {match["shards"] for match in matches if match}
    if len(files) > 1 and (None in shards or len(shards) > 1):
        names = ", ".join(file.name for file in files)
        raise BadInput(f"{folder} has split {split!r} in several files: {names}. Keep one file, or shards of one file.")
    if (count := shards.pop()) is not None and len(files) != int(count):
        raise BadInput(f"{folder}: split {split!r} has {len(files)} of its {int(count)} files. Add the missing files.")
    return files


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every split, by their names."""
    splits: dict[str, list[Path]] = {}
    places = [(folder, ""), (folder / "data", "")]
    places += [(inner, f"{inner.name}_") for inner in _entries(folder / "round0")]
    for place, prefix in places:
        for file in _entries(place):
            match = _NAME.fullmatch(file.name)
            if match and not os.path.isdir(file) and match["split"] not in _NO_SPLITS:
                splits.setdefault(prefix + match["split"], []).append(file)
    return splits


def _entries(folder: Path) -> list[Path]:
    """Return the files and folders in a folder; none if it does not exist."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BadInput(f"{folder} cannot be read: {error.strerror}.") from error


def _saved_dataset(folder: Path, split: str) -> Iterator[PlacedRow]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise HbvError(f"{folder} needs the package `datasets`: pip install datasets.") from error
    try:
        table = load_from_disk(str(folder))
    except Exception as error:  # Arrow and JSON raise many kinds of errors on a damaged folder
        raise BadInput(f"{folder} cannot be read as a data set: {first_line(error)}.") from error
    if isinstance(table, DatasetDict):
        if split not in table:
            raise BadInput(f"{folder} has no split {split!r}. Allowed: {', '.join(sorted(table))}.")
        table = table[split]
    yield from read_dataset(f"{folder}, split {split}", table)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _file(path: Path) -> Iterator[PlacedRow]:
    match = _NAME.fullmatch(path.name)
    kind = match["kind"].lower() if match else ".jsonl"
    if kind == ".parquet":
        return _parquet(path)
    return read_table(path, "," if kind == ".csv" else "\t") if kind in (".csv", ".tsv") else _json(path)


def _json(path: Path) -> Iterator[PlacedRow]:
    """Read one array of objects, or one object per line, whichever of the two the file contains."""
    text = read_text(path)
    if re.match(r"\s*\[", text):
        for number, values in enumerate(_parsed(str(path), text)):
            yield _object(f"{path}, row {number}", values)
        return
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also splits at characters inside a text
        if line.strip():
            place = f"{path}, line {number}"
            yield _object(place, _parsed(place, line))


def _parsed(place: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadInput(f"{place}: {error}.") from error


def _object(place: str, values: Any) -> PlacedRow:
    if not isinstance(values, dict):
        raise BadInput(f"{place}: a row must be a JSON object, not {type(values).__name__}.")
    return place, values


def _parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    from pyarrow import parquet

    check_regular(path)
    number, size = 0, 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise BadInput(f"{path} has columns with the same name: {', '.join(names)}. Rename or delete one.")
            for batch in file.iter_batches(batch_size=1000):
                if (size := size + batch.nbytes) > size_limit():
                    raise too_large(path)
                columns = [column.to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True):
                    yield f"{path}, row {number}", dict(zip(names, values, strict=True))
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadInput(f"{path} cannot be read as parquet: {first_line(error)}.") from error
