"""Compare the texts of answers: one Unicode form, and the first word."""

from __future__ import annotations

import re
import unicodedata

_BREAK = re.compile(r"[\s()\[\]{}\"“”„«»;…—。，、；：（）「」『』《》]+|\.{2,}|(?<!\d)[,:]|[,:](?!\d)")
_OPENING, _CLOSING, _LIST_MARKS = "*`'‘’‚¿¡•", "`'‘’.,:;!?！？", "-–—•·#"


def comparable_text(text: str) -> str:
    """Return a text in the form in which texts are compared.

    White space at both ends is removed, letter case is folded ("ß" equals "SS"), and the characters are in Unicode's
    normal form C, so that a composed "é" equals "e" with a combining accent. Characters that only look alike or have a
    compatible meaning stay different: "x²" is not "x2", and a full-width "Ａ" is not "A".
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text.strip()).casefold())


def first_word(text: str) -> str:
    """Return the first word of a text in comparable form; empty if the text has no word.

    A word ends at white space, a bracket, a double quote, a semicolon, a long dash or an ellipsis, and at a comma or
    colon that is not between two digits. Quotes and Markdown emphasis around a word are not part of it, and neither is
    punctuation at its end. All other characters are: `-1`, `C++`, `C#`, `.NET`, `don't`, `1,000`, `50%`. List marks
    such as `-` and `##` are not words.
    """
    words = (_without_marks(piece) for piece in _BREAK.split(comparable_text(text)))
    return next((word for word in words if word.strip(_LIST_MARKS)), "")


def _without_marks(piece: str) -> str:
    word = piece.lstrip(_OPENING)
    opening = piece[: len(piece) - len(word)]
    word = word.rstrip(_CLOSING)
    for mark in reversed(opening):  # `A*` keeps its star, and `*A*` does not
        word = word.removesuffix(mark).rstrip(_CLOSING)
    return word
