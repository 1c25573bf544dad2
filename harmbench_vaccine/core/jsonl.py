"""Read and write JSON and JSON Lines files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file: one object per line."""
    text = path.read_text(encoding="utf-8")
    # `splitlines` would also split at characters inside an answer.
    return [json.loads(line) for line in text.split("\n") if line]


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
