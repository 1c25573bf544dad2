"""Numbers of a result as text, and tables as HTML, which a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

from harmbench_vaccine.core.visible import visible

_MOST_DIGITS = 6


def percent_text(score: float, interval: Sequence[float]) -> str:
    """Return a score with its interval, such as "12.0 [8.5, 16.6]"."""
    return f"{score:.1f} {interval_text(interval[0], interval[1])}"


def interval_text(low: float, high: float, sign: Literal["", "+"] = "") -> str:
    """Return an interval such as "[8.5, 16.6]", with the decimals that make its ends differ.

    Args:
        low: Lower end.
        high: Upper end.
        sign: Whether positive numbers have a sign.
    """
    return f"[{', '.join(interval_ends(low, high, sign))}]"


def interval_ends(low: float, high: float, sign: Literal["", "+"] = "") -> tuple[str, str]:
    """Return the ends of an interval as texts, as `interval_text` prints them."""
    for digits in range(1, _MOST_DIGITS):
        ends = f"{low:{sign}z.{digits}f}", f"{high:{sign}z.{digits}f}"
        if ends[0] != ends[1]:
            return ends
    return ends


def number_text(value: float | None, form: str) -> str:
    """Return a number in this format; None is not a number."""
    return "not a number" if value is None else format(value, form)


def html_table(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return a table with escaped texts.

    Args:
        title: A line above the table.
        rows: The cells; the first row is the header.
        notes: Lines below the table.
    """
    lines = "".join(f"<div><small>{_text(note)}</small></div>" for note in notes)
    table = "".join(_row("td" if index else "th", row) for index, row in enumerate(rows))
    return f"<div><strong>{_text(title)}</strong><table>{table}</table>{lines}</div>"


def _row(element: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{element}>{_text(cell)}</{element}>" for cell in cells) + "</tr>"


def _text(text: str) -> str:
    return escape(visible(text))
