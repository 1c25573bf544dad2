"""Read and write JSON and JSON Lines files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import HbvError


def parse_json(text: str) -> Any:
    """Parse JSON that hbv did not write. NaN and infinity, which JSON does not have, are None.

    Raises:
        ValueError: The text is not JSON, an object has a key twice, values are nested too deeply, or a number has too
            many digits. The message is one line.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at character {error.colno}{line}") from error
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error
    except ValueError as error:
        if "digits" in str(error):  # the limit of Python for the conversion of a text to an integer
            raise ValueError("a number has too many digits") from error
        raise


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!a} twice")
    return values


def _finite_number(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None  # 1e999 is infinity


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates, parse_float=_finite_number, parse_constant=lambda _: None
)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file that hbv wrote: one object per line.

    Raises:
        HbvError: The file is damaged.
        OSError: The file cannot be read.
    """
    rows = []
    # `splitlines` would also split at characters inside an answer.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line:
            try:
                row = parse_json(line.decode())
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            except ValueError as error:
                raise HbvError(
                    f"{path}, line {number}, is damaged: {error}. Repeat the command that wrote it."
                ) from error
            rows.append(row)
    return rows


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file: one object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None in a nested value."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in which NaN and infinity are null."""
    path.write_text(json.dumps(finite(value), indent=1, allow_nan=False), encoding="utf-8")
