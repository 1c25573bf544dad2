"""Numbers of a result as text, and tables as HTML, which a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from harmbench_vaccine.core.visible import visible


def percent_text(score: float, interval: Sequence[float]) -> str:
    """Return a score with its interval, such as "12.0 [8.5, 16.6]"."""
    return f"{score:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


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
