"""Rich tables and notes for the terminal, in one plain style.

Texts are never parsed as markup, so that `[` in a name, a question or an interval is printed as it is. Characters that
act on a terminal or hide text are escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich.box import HEAVY_HEAD
from rich.style import Style
from rich.table import Table
from rich.text import Text

from harmbench_vaccine.core.visible import visible


class VisibleText(Text):
    """A text with styles. Everything that a view shows is one, so that nothing that it shows acts on the terminal."""

    def __init__(self, text: str = "", style: str | Style = "", **options: Any) -> None:
        super().__init__(visible(text), style, **options)  # `Text` removes some characters that are not visible

    def append(self, text: Text | str, style: str | Style | None = None) -> Self:
        """Add a text with a style."""
        super().append(visible(text) if isinstance(text, str) else text, style)
        return self


Cell = str | VisibleText


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    right: bool = False
    """Align to the right, as numbers are."""
    wrap: bool = True
    """Fold long cells; False keeps them on one line."""
    ratio: int | None = None
    """Share of the terminal's width; None fits the column to its cells."""


def numbers(*titles: str, wrap: bool = True) -> list[Column]:
    """Return one right-aligned column per title."""
    return [Column(title, right=True, wrap=wrap) for title in titles]


def render_table(
    columns: Sequence[Column | str],
    rows: Iterable[Sequence[Cell]],
    *,
    gap: int = 2,
    styles: Sequence[str | None] = (),
    lines: bool = False,
) -> Table:
    """Build a table.

    Args:
        columns: Headings; a plain string is a left-aligned text column.
        rows: One sequence of cells per row, a cell per column.
        gap: Spaces between two columns.
        styles: A rich style for each row, or None; empty for no styles.
        lines: Draw lines between rows and columns, for cells that are paragraphs.
    """
    plain = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
    table = Table(box=HEAVY_HEAD, show_lines=True) if lines else plain
    for column in columns:
        column = Column(column) if isinstance(column, str) else column
        table.add_column(
            VisibleText(column.title),
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not column.wrap,
            ratio=column.ratio,
        )
    for number, row in enumerate(rows):
        cells = [cell if isinstance(cell, VisibleText) else VisibleText(cell) for cell in row]
        table.add_row(*cells, style=styles[number] if styles else None)
    return table


def render_fields(fields: Iterable[tuple[str, str]]) -> Table:
    """Build a list of names and values, without headings."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in fields:
        table.add_row(VisibleText(name, style="bold"), VisibleText(value))
    return table


def dim_notes(notes: Iterable[str]) -> list[VisibleText]:
    """Return notes as dim lines, to print below a table."""
    return [VisibleText(note, style="dim") for note in notes]
