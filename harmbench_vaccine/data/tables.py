"""Read CSV and TSV files, and refuse what two readers would read differently.

A field may be in quotes; then it may contain delimiters, line breaks, and quotes that are written twice. A quote inside
a field that does not begin with one is an ordinary character. Programs that write TSV without quotes give no meaning to
a quote at the beginning of a field either; where such a file could be read in both ways, with different rows, it is
refused.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput, shortened

from .text_files import read_text

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False, "": None}
_INTEGER = re.compile(r"\s*(-?[0-9]{1,18})(?:\.0*)?\s*")
"""A label. Programs that store a column with missing values as numbers write `1.0`."""


def read_table(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows below a header.

    All values are text, except booleans in `is_safe` and integers in `label`; these are None where the field is empty.

    Args:
        path: The file.
        delimiter: The character between two fields, `,` or a tab.

    Yields:
        The place of a row (file and first line), and its values.

    Raises:
        BadInput: The file is not such a table.
    """
    records = _records(path, delimiter)
    _, header = next(records, (1, []))
    names = [name.strip() for name in header]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise BadInput(f"{path}: several columns have the same name: {shortened(repeated)}. Rename or delete one.")
    for line, fields in records:
        if len(fields) != len(names):
            raise BadInput(
                f"{path}, line {line}: the number of fields differs from the header: {len(fields)} instead of "
                f"{len(names)}. Correct the line; a field with the separator in it needs quotes."
            )
        values: dict[str, Any] = dict(zip(names, fields, strict=True))
        if (safe := values.get("is_safe")) is not None:
            values["is_safe"] = _BOOLEANS.get(safe.strip().lower(), safe)
        if (label := values.get("label")) is not None:
            match = _INTEGER.fullmatch(label)
            values["label"] = int(match[1]) if match else label or None
        yield f"{path}, line {line}", values


class _Lines:
    """The lines of a text, one after the other, and those of the current record."""

    def __init__(self, text: str) -> None:
        first_end = re.search(r"\r\n|\r|\n", text)
        only_returns = first_end is not None and first_end[0] == "\r"
        self.source = io.StringIO(text, newline="" if only_returns else "\n")
        self.record: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for line in self.source:
            self.record.append(line)
            yield line


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Return the number of the first line, and the fields, of every record, also of the header."""
    csv.field_size_limit(2**31 - 1)  # answers are longer than the default limit
    lines = _Lines(read_text(path))
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    width = 0
    while True:
        lines.record.clear()
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _damaged(path, first, lines.record, delimiter, error) from error
        if not fields:  # an empty line
            continue
        width = width or len(fields)
        if delimiter == "\t" and len(lines.record) > 1 and _is_ambiguous(lines.record, width):
            raise BadInput(
                f"{path}, line {first}: a quote opens here and closes on line {reader.line_num}, but each of these "
                "lines is also a complete row. Delete these quotes, or save the file as CSV or JSON Lines."
            )
        yield first, fields


def _is_ambiguous(lines: list[str], width: int) -> bool:
    """Return True if every line of a record is a row of its own where quotes have no meaning."""
    return width > 1 and all(line.count("\t") == width - 1 for line in lines)


def _damaged(path: Path, first: int, record: list[str], delimiter: str, error: csv.Error) -> BadInput:
    """Return the error for a record that cannot be read, with the line where its wrong quote opens."""
    text = "".join(record)
    field = re.compile(rf'(?:"(?:[^"]++|"")*+"|[^"{delimiter}\r\n][^{delimiter}\r\n]*|)(?:{delimiter}|\r\n?|\n|\Z)')
    position = 0
    while position < len(text) and (match := field.match(text, position)):
        position = match.end()
    if position == len(text):
        problem = "a carriage return is not in quotes" if "new-line character" in str(error) else str(error)
        return BadInput(f"{path}, line {first}: not a table: {problem}.")
    ends = accumulate(map(len, record))
    line = first + sum(end <= position for end in ends)
    return BadInput(
        f"{path}, line {line}: the field {shortened(text[position:], 30)!r} begins with a quote, but no quote "
        "closes it at the end of the field. Close it, and write a quote inside such a field twice."
    )
