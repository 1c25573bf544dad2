"""Numbers in the answers of a user's task, read exactly or not at all.

A number has one of these forms:

    18  -18  +18  −18     digits, with an optional sign directly before them (`-`, `+` or U+2212)
    1,234,567             commas between groups of three digits
    .5  0.5               a decimal point
    1e3  6.02E-23         a power of ten, with an exponent of at most 4 digits
    1/2                   a fraction of two whole numbers; the second one is not 0

A currency sign directly before or after it and a unit after it do not count: `$18`, `-$18`, `18€`, `18km`, `18 km`,
`3rd` and `50%` are 18, -18, 18, 18, 18, 3 and 50. Neither do brackets, quotes, Markdown emphasis and `\\boxed{}` around
it, and punctuation at its end. A letter with a colon or comma, a sign of equality or comparison, `|`, `;`, `!`, `?`, a
double quote, and Chinese, Japanese or Thai text separate it from what is next to it: `x=5`, `Answer:5`.

Everything else with a digit is unreadable: `1.2.3`, `12:30`, `2024-01-05`, `1/0`, `1,23`, `10^3`, `½`, `H2O`. So is a
number that is only a part of a value: before a scale (`5 million`, `3k`, `2π`, `5 and a half`), next to another number
(`2 1/2`, `1 000`) or a month (`March 5, 2024`), after an operator or a separate sign (`5 - 3`, `3 × 4`, `- 3`, `minus
3`), or before an operator and another number.
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

_SCALE_LETTERS = "百千万萬億亿兆π"
_SEPARATORS = re.compile(
    r"[\n\r\v\f\x85\u2028\u2029=<>|;!?\"“”„«»…。、「」『』]|(?<=[^\W\d_])[:,]"
    rf"|(?![{_SCALE_LETTERS}])[\u0e01-\u0e3a\u0e40-\u0e4e\u3041-\u30ff\u3400-\u9fff]"
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Full-width forms of ASCII characters -> ASCII."""
_POWER_OF_UNIT = re.compile(r"(?<=[^\W\d_])(?:[²³]|\^[23]|\^\{[23]\})")

_CURRENCY = r"$¢-¥֏؋৲৳૱௹฿៛₠-⃀﷼"
_NUMBER = re.compile(
    rf"""
    (?P<lead> [-+−]? (?:[A-Z]{{0,3}}\\?(?P<currency>[{_CURRENCY}]))? [-+−]? )
    (?P<size> \d+/\d+ | (?: (?:[1-9]\d{{0,2}}(?:,\d{{3}})+|\d+) (?:\.\d+)? | \.\d+ ) (?:[eE][-+−]?\d{{1,4}})? )
    (?P<unit> \\?[%‰{_CURRENCY}] | °[CF]? | [/-]?[^\W\d_]+(?:[/·.-][^\W\d_]+)* )?
    """,
    re.VERBOSE,
)
_BEFORE, _AFTER = re.compile(r"^(?:[*_`~'‘’#≈—(\[{]|\\[(\[]|\$?\\boxed\{)+"), "*_`~'‘’.,:—)]}$\\"

_SCALES = frozenset("kKMBTi") | {"bn", "Bn", "mn"}
_SCALES_OF_MONEY = frozenset("mbt") | {"mm", "mio", "mrd"}
_SCALE_WORDS = frozenset(("hundred", "thousand", "million", "billion", "trillion", "dozen", "lakh", "crore", "pi"))
_PARTS = frozenset(("half", "third", "quarter"))
_MONTH = re.compile(
    "Jan(uary)?|Feb(ruary)?|Mar(ch)?|Apr(il)?|May|June?|July?|Aug(ust)?|Sept?|September|Oct(ober)?|Nov(ember)?|Dec(ember)?"
)
_SIGNS = frozenset("-−–±") | {"minus", "negative"}
_OPERATORS = _SIGNS | frozenset("+×÷·/*^x") | {"**", "plus", "times"}
_STOPS = ",.:)]"


def first_number(text: str) -> str:
    """Return the first number of a text in a plain form, such as `-1234.5`, `6.02E-23` or `1/2`.

    Raises:
        ValueError: The text has no number, or the first thing with a digit is unreadable.
    """
    return _read_place(text, 0)


def last_number(text: str) -> str:
    """Return the last number of a text in a plain form.

    Raises:
        ValueError: The text has no number, or the last thing with a digit is unreadable.
    """
    return _read_place(text, -1)


def parse_number(number: str) -> Fraction:
    """Convert a number in plain form, of any length, without rounding."""
    numerator, _, denominator = number.partition("/")  # Fraction and int refuse texts of more than 4300 digits
    return Fraction(Decimal(numerator)) / Fraction(Decimal(denominator or 1))


def _read_place(text: str, index: int) -> str:
    plain = _POWER_OF_UNIT.sub("", text.translate(_FULL_WIDTH))
    phrases = [phrase.split() for phrase in _SEPARATORS.split(plain)]
    places = [(words, place) for words in phrases for place, word in enumerate(words) if _has_digit(word)]
    if not places:
        raise ValueError("it has no digits")
    words, place = places[index]
    number = _read_word(words[place], words[place + 1 : place + 2])
    is_date = any(_MONTH.fullmatch(_bare(word)) for word in words[max(0, place - 2) : place + 3])
    if number is None or is_date or _follows(words[: place + 1]) or _continues(words[place:]):
        shown = " ".join(words[max(0, place - 2) : place + 3])
        raise ValueError(f"{shown if len(shown) <= 60 else shown[:57] + '...'!r} is not a number that can be read")
    return number


def _has_digit(word: str) -> bool:
    return any(char.isnumeric() and unicodedata.category(char)[0] == "N" for char in word)


def _bare(word: str) -> str:
    return _BEFORE.sub("", word.rstrip(_AFTER))


def _read_word(word: str, following: Sequence[str]) -> str | None:
    """Return the number of a word in plain form; None if it has another form, or if its unit changes the value."""
    match = _NUMBER.fullmatch(_bare(word))
    if match is None:
        return None
    signs = re.sub("[^-+−]", "", match["lead"])
    size = match["size"].replace(",", "").replace("−", "-")
    units = [match["unit"] or "", *map(_bare, following)]
    is_zero_fraction = "/" in size and not Decimal(size.partition("/")[2])
    if len(signs) > 1 or is_zero_fraction or _has_digit(units[0]):
        return None
    if any(_is_scale(unit, is_money=match["currency"] is not None) for unit in units):
        return None
    return size if signs in ("", "+") else f"-{size}"


def _is_scale(unit: str, is_money: bool) -> bool:
    """Return whether a unit changes the value of the number before it, or may do so: `k/day`, `million`, `π`."""
    name = re.split("[-/]", unit.lstrip("-/"))[0]
    word = name.casefold()
    return (
        name in _SCALES
        or name.startswith(tuple(_SCALE_LETTERS))
        or word.removesuffix("s") in _SCALE_WORDS
        or (is_money and word in _SCALES_OF_MONEY)
    )


def _follows(words: Sequence[str]) -> bool:
    """Return whether the last word is only a part of a value that the words before it begin."""
    if len(words) < 2 or words[-2][-1] in _STOPS:
        return False
    before, is_first = words[-2].casefold(), len(words) == 2
    return _has_digit(before) or before in (_SIGNS if is_first else _OPERATORS)  # `* 18` and `+ 18` are lists


def _continues(words: Sequence[str]) -> bool:
    """Return whether the first word is only a part of a value that the words after it continue."""
    if len(words) < 2 or words[0][-1] in _STOPS or words[1][0] in "([":
        return False
    following = [_bare(word).casefold() for word in words[1:4]]
    is_sum = words[1].casefold() in _OPERATORS and len(words) > 2 and _has_digit(words[2])
    return _has_digit(words[1]) or is_sum or (following[0] == "and" and not _PARTS.isdisjoint(following))
