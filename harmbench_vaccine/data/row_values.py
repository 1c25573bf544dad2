"""Check the values of a row when it is read: fields that are missing, and text that no tokenizer can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harmbench_vaccine.core.errors import BadInput, shortened

_TEXT_FIELDS = frozenset(
    [
        *("prompt", "response", "refusal", "instruction", "output", "sentence", "text", "question", "answer"),
        *("dialogue", "summary"),
    ]
)
"""Fields that hold text in every supported data set that needs them."""
_OPTIONAL_TEXT_FIELDS = frozenset(["input"])
"""Fields that hold text where they have a value."""


def check_row(place: str, values: Mapping[str, Any], fields: Sequence[str]) -> Mapping[str, Any]:
    """Check a row, and remove its missing values: null, NaN and infinity. `label` becomes an integer if it is whole.

    Args:
        place: File and line, or data set, split and row, for error messages.
        values: Field -> value.
        fields: The fields that the row must have.

    Raises:
        BadInput: A field is missing or has a wrong type, or a text contains a character that is not one.
    """
    row = {name: value for name, value in values.items() if not _is_missing(value)}
    for field in fields:
        if field not in row:
            kind = "has no value" if field in values else "is missing"
            raise BadInput(
                f"{place}: field {field!r} {kind}; a row needs {', '.join(fields)}, "
                f"and this one has {_names(row) or 'none'}."
            )
    text_fields = _OPTIONAL_TEXT_FIELDS.union(_TEXT_FIELDS.intersection(fields))
    for field, value in row.items():
        if isinstance(value, str):
            if not value.isascii() or "\0" in value:
                _check_characters(f"{place}: field {field!r}", value)
        elif isinstance(value, dict | list):
            _check_nested(f"{place}: field {field!r}", value)
        if field in text_fields and not isinstance(value, str):
            raise BadInput(f"{place}: field {field!r} holds {_shown(value)}, which is not text.")
    if not isinstance(row.get("is_safe", True), bool):
        raise BadInput(f"{place}: field 'is_safe' holds {_shown(row['is_safe'])}; allowed: true, false.")
    if isinstance(label := row.get("label"), float) and label.is_integer():
        row["label"] = int(label)
    return row


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _check_nested(place: str, value: Any) -> None:
    """Check every text of nested lists and objects, which may be nested more deeply than functions may be."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            _check_characters(place, value)
        elif isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list):
            values += value


def _check_characters(place: str, text: str) -> None:
    """Refuse half of a surrogate pair, which no file can store, and NUL, which ends a text in some libraries."""
    if "\0" in text:
        raise BadInput(f"{place} has a NUL character (\\u0000) after {_before(text, text.index(chr(0)))}. Delete it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{place} has half of a character (\\u{ord(text[error.start]):04x}) after "
            f"{_before(text, error.start)}. Delete it, or write the complete character."
        ) from error


def _before(text: str, position: int) -> str:
    return ascii(text[max(0, position - 20) : position])


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, dict | list) else shortened(repr(value))


def _names(row: Mapping[str, Any]) -> str:
    return shortened(", ".join(row).encode("utf-8", "backslashreplace").decode(), 200)
