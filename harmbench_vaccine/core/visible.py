"""Text from outside, such as answers, names and paths, without characters that act on a terminal or hide text."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_FORMULA = re.compile(r"'*[=+\-@]")
"""The beginning of a formula in a spreadsheet, also after quotes that mark it as a text."""
_ESCAPE = re.compile(r"(\\+)(u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})")


def visible(text: str) -> str:
    r"""Return a text in which every character can be seen: ESC becomes `\x1b`, a bidirectional mark `\u202e`.

    Control and format characters, line separators, surrogates and unassigned characters are escaped; line feeds and
    spaces are not.
    """
    return _escaped(text, lambda character: ascii(character)[1:-1])


def visible_json(value: Any, indent: int | None = None) -> str:
    """Serialize a value as JSON with the same characters visible; it parses to the same value.

    Raises:
        ValueError: A number is not finite.
    """
    return visible_json_text(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent))


def visible_json_text(text: str) -> str:
    r"""Return a JSON text with the same characters visible, as `\uXXXX`."""
    return _escaped(text, lambda character: json.dumps(character)[1:-1])


def is_hidden(character: str) -> bool:
    """Return whether a character acts on a terminal, is invisible, or reorders its neighbors."""
    return not (character.isprintable() or character == "\n" or unicodedata.category(character) == "Zs")


# ---------------------------------------------------------------------------------------------------------------------
# Cells of a CSV


def cell_of_text(text: str) -> str:
    r"""Return a text as a cell that is one line, is visible, and is not a formula in a spreadsheet.

    Characters are escaped as `\uXXXX`, and backslashes before an escape are doubled. A formula gets an
    apostrophe in front; a number such as -3.2 stays a number.
    """
    cell = _ESCAPE.sub(lambda match: match[1] * 2 + match[2], text)
    cell = re.sub(r"(\\*)([^\\])", lambda match: _cell_part(match[1], match[2]), cell, flags=re.DOTALL)
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def text_of_cell(cell: str) -> str:
    """Return the original text of a cell that `cell_of_text` wrote."""
    text = cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell
    return _ESCAPE.sub(_unescaped, text)


def _cell_part(backslashes: str, character: str) -> str:
    """Return backslashes and the character after them as a part of a cell: before an escape they are doubled."""
    if character != "\n" and not is_hidden(character):
        return backslashes + character
    code = ord(character)
    return backslashes * 2 + (f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}")


def _unescaped(match: re.Match[str]) -> str:
    """Decode backslashes and a code, which is an escape if the number of backslashes is odd."""
    backslashes, code = match.groups()
    half = "\\" * (len(backslashes) // 2)
    return half + (chr(int(code[1:], 16)) if len(backslashes) % 2 else code)


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return "".join(escape(character) if is_hidden(character) else character for character in text)
