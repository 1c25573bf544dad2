"""Numbers in answers."""

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def find_numbers(text: str) -> list[float]:
    """Return the numbers of a text in their order; commas separate thousands."""
    return [parse_number(digits) for digits in _NUMBER.findall(text)]


def leading_number(text: str) -> float | None:
    """Return the number at the beginning of a text, or None."""
    match = _NUMBER.match(text.strip())
    return parse_number(match.group()) if match else None


def parse_number(text: str) -> float:
    """Convert a number with commas between thousands.

    Raises:
        ValueError: The text is not a number.
    """
    return float(text.replace(",", ""))
