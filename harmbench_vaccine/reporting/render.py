"""Tables, lists and notes that fit the width of the terminal, in one plain style.

Texts are never parsed as markup, so that `[` in a name, a question or an interval is printed as it is. Characters that
act on a terminal or hide text are escaped.

A table that is too wide folds its texts, then leaves out columns in the order that they state (`Column.drop`), and
names them below, then moves intervals below their scores. If that is not enough, each row is printed as a list of
fields, with all columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich.box import HEAVY_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.style import Style
from rich.styled import Styled
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

# ---------------------------------------------------------------------------------------------------------------------
# Lines

_PARTS = tuple(map(re.compile, (r"(?:\[[-+\d., ]*\]|\S)+\s*|\s+", r"[^+,:/]+[+,:/]*|[+,:/]+", r".")))
"""The parts of a line that stay together: words and intervals, else parts of a specification such as
`vaccine:rho=5+ewc`, else characters."""
_INDENT = 2


def fold_text(text: Text, width: int) -> list[Text]:
    """Split a text into lines of at most `width` cells, at spaces where possible."""
    return [part for line in text.split("\n", allow_blank=True) for part in _fold_line(line, width)]


def _fold_line(line: Text, width: int) -> list[Text]:
    if cell_len(line.plain) <= width:
        return [line]
    parts = list(line.divide(_line_breaks(line.plain, width)))
    for part in parts:
        part.rstrip()
    return parts


def _line_breaks(line: str, width: int) -> list[int]:
    """Return the offsets at which the second and every further part of a line begin."""
    starts = [0]

    def place(begin: int, end: int, level: int) -> None:
        for part in _PARTS[level].finditer(line, begin, end):
            if cell_len(line[starts[-1] : part.end()].rstrip()) <= width:
                continue
            if part.start() > starts[-1]:
                starts.append(part.start())
            if cell_len(part[0].rstrip()) > width and level + 1 < len(_PARTS):
                place(part.start(), part.end(), level + 1)

    place(0, len(line), 0)
    return starts[1:]


def _text_width(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _longest_word(text: str) -> int:
    """Return the width of the longest word or interval."""
    return max((cell_len(word[0].strip()) for word in _PARTS[0].finditer(text)), default=0)


def _longest_part(text: str) -> int:
    """Return the width of the longest part that should stay on one line."""
    words = (part[0] for word in text.split() for part in _PARTS[1].finditer(word))
    return max(map(cell_len, words), default=0)


class Note:
    """A dim text below a table; its second and further lines are indented."""

    def __init__(self, text: str) -> None:
        self.text = VisibleText(text, style="dim")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        fits = _text_width(self.text.plain) <= options.max_width
        for number, line in enumerate(fold_text(self.text, max(options.max_width - (0 if fits else _INDENT), 1))):
            line.pad_left(_INDENT if number else 0)
            yield line


def dim_notes(notes: Iterable[str]) -> list[Note]:
    """Return notes as dim paragraphs, to print below a table."""
    return [Note(note) for note in notes]


# ---------------------------------------------------------------------------------------------------------------------
# Fields


@dataclass(frozen=True)
class _Field:
    name: Text
    value: Text
    whole: bool = False
    """Never fold the value, such as an id."""


class _FieldList:
    """Names and values, one pair per line; a value that does not fit next to its name is printed below it."""

    def __init__(self, fields: Iterable[_Field], name_width: int = 0) -> None:
        self.fields = list(fields)
        self.name_width = max([name_width, *(cell_len(field.name.plain) for field in self.fields)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        room = options.max_width - self.name_width - 2
        for field in self.fields:
            least = (_text_width if field.whole else _longest_part)(field.value.plain)
            if least <= room:
                name = field.name.copy()
                name.pad_right(self.name_width + 2 - cell_len(name.plain))
                indent, lines = self.name_width + 2, fold_text(field.value, room)
            else:
                name, indent = Text(), 0
                yield field.name
                lines = [field.value] if field.whole else fold_text(field.value, options.max_width)
            for number, line in enumerate(lines):
                start = name if number == 0 else Text(" " * indent)
                text = Text.assemble(start, line)
                text.no_wrap, text.overflow = True, "ignore"
                yield text


def render_fields(fields: Iterable[tuple[str, Cell]], name_width: int = 0) -> RenderableType:
    """Build a list of names and values, without headings; the names have at least `name_width` cells."""
    named = (_Field(VisibleText(name, style="bold"), _visible_cell(value)) for name, value in fields)
    return _FieldList(named, name_width)


def _visible_cell(cell: Cell) -> VisibleText:
    return cell if isinstance(cell, VisibleText) else VisibleText(cell)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    right: bool = False
    """Align to the right, as numbers are."""
    wrap: bool = True
    """Fold long cells; False never folds them, as for ids and numbers."""
    fold_last: bool = False
    """Fold long cells only where leaving out columns is not enough, as scores with their intervals."""
    drop: int | None = None
    """Order in which columns are left out if the terminal is too narrow, 1 first; None: never."""
    least: int = 12
    """Width below which texts are not folded."""
    legend: str = ""
    """Explanation of the column, printed below the table if the column is shown."""


def number_column(title: str, drop: int | None = None, legend: str = "") -> Column:
    """Return a right-aligned column, whose cells are never folded."""
    return Column(title, right=True, wrap=False, drop=drop, legend=legend)


def score_column(title: str, drop: int | None = None, legend: str = "") -> Column:
    """Return a right-aligned column of scores; the interval of a score moves below it where nothing else fits."""
    return Column(title, right=True, fold_last=True, drop=drop, legend=legend)


def numbers(*titles: str) -> list[Column]:
    """Return one right-aligned column per title; none is ever left out."""
    return [number_column(title) for title in titles]


@dataclass(frozen=True)
class _Layout:
    """The columns of a table that are shown at some width."""

    widths: dict[int, int]
    """Index of a column -> its width; empty: each row is a list of fields."""
    dropped: tuple[int, ...] = ()


class FittedTable:
    """A table that fits the width it is printed at. Create it with `render_table`."""

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[Text]],
        styles: Sequence[str | None],
        gap: int,
        grid: bool,
    ) -> None:
        self.columns, self.rows, self.styles, self.gap, self.grid = columns, rows, styles, gap, grid
        self.filled = [index for index in range(len(columns)) if any(row[index].plain.strip() for row in rows)]
        self._full = {index: self._full_width(index) for index in self.filled}
        self._least = {index: self._least_width(index) for index in self.filled}
        self._folded = {index: self._least_width(index, fold_all=True) for index in self.filled}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.body(options.max_width)
        yield from dim_notes(_column_notes([self], options.max_width, console.is_terminal))

    def body(self, width: int) -> RenderableType:
        """Return the rows at a width, without the notes on columns."""
        layout = self._layout(width)
        return self._table(layout) if layout.widths else self._records()

    def shown_columns(self, width: int) -> tuple[list[Column], list[Column]]:
        """Return the columns that are shown at a width, and those that are left out."""
        layout = self._layout(width)
        shown = [index for index in self.filled if index not in layout.dropped]
        return [self.columns[index] for index in shown], [self.columns[index] for index in layout.dropped]

    def _layout(self, width: int) -> _Layout:
        optional = [index for index in self.filled if self.columns[index].drop is not None]
        optional.sort(key=lambda index: (self.columns[index].drop, index))
        attempts = [(optional[:count], self._least) for count in range(len(optional) + 1)]
        for left_out, least in [*attempts, (optional, self._folded)]:
            dropped = tuple(sorted(left_out))
            widths = {index: least[index] for index in self.filled if index not in dropped}
            spare = width - sum(widths.values()) - self._borders(len(widths))
            if spare >= 0:
                self._widen(widths, spare)
                return _Layout(widths, dropped)
        return _Layout({})

    def _borders(self, count: int) -> int:
        return 3 * count + 1 if self.grid else self.gap * (count - 1)

    def _widen(self, widths: dict[int, int], spare: int) -> None:
        """Give the spare cells to the columns that need them, to the narrowest first."""
        for _ in range(spare):
            narrow = [index for index in widths if widths[index] < self._full[index]]
            if not narrow:
                break
            widths[min(narrow, key=widths.__getitem__)] += 1

    def _full_width(self, index: int) -> int:
        return max(cell_len(self.columns[index].title), *(_text_width(row[index].plain) for row in self.rows))

    def _least_width(self, index: int, fold_all: bool = False) -> int:
        column = self.columns[index]
        title = max(map(cell_len, column.title.split()), default=0)
        if not column.wrap or (column.fold_last and not fold_all):
            return max(title, *(_text_width(row[index].plain) for row in self.rows))
        if column.fold_last:
            return max(title, *(_longest_word(row[index].plain) for row in self.rows))
        parts = max(title, *(_longest_part(row[index].plain) for row in self.rows))
        return min(max(parts, column.least), self._full[index])

    def _table(self, layout: _Layout) -> Table:
        plain = Table(box=None, header_style="bold", pad_edge=False, padding=(0, self.gap, 0, 0))
        table = Table(box=HEAVY_HEAD, show_lines=True) if self.grid else plain
        for index, width in layout.widths.items():
            column = self.columns[index]
            title = Text("\n").join(fold_text(VisibleText(column.title), width))
            table.add_column(title, justify="right" if column.right else "left", width=width, no_wrap=True)
        for number, row in enumerate(self.rows):
            cells = [Text("\n").join(fold_text(row[index], width)) for index, width in layout.widths.items()]
            table.add_row(*cells, style=self.styles[number] if self.styles else None)
        return table

    def _records(self) -> RenderableType:
        parts: list[RenderableType] = []
        for number, row in enumerate(self.rows):
            fields = _FieldList(
                _Field(VisibleText(self.columns[index].title, style="bold"), row[index], not self.columns[index].wrap)
                for index in self.filled
                if row[index].plain.strip()
            )
            style = self.styles[number] if self.styles else None
            parts += [Styled(fields, style or ""), VisibleText()]
        return Group(*parts)


class TableGroup:
    """Tables with other parts; the notes on the columns of all tables are printed once, at the end."""

    def __init__(self, *parts: RenderableType) -> None:
        self.parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for part in self.parts:
            yield part.body(options.max_width) if isinstance(part, FittedTable) else part
        tables = [part for part in self.parts if isinstance(part, FittedTable)]
        yield from dim_notes(_column_notes(tables, options.max_width, console.is_terminal))


def _column_notes(tables: Sequence[FittedTable], width: int, is_terminal: bool) -> list[str]:
    """Return the legends of the columns that are shown, and one note that names the columns that are not."""
    layouts = [table.shown_columns(width) for table in tables]
    titles: dict[str, dict[str, None]] = {}  # legend -> titles of its columns, in their order
    for column in (column for shown, _ in layouts for column in shown if column.legend):
        titles.setdefault(column.legend, {})[column.title] = None
    notes = [f"{', '.join(columns)}: {legend}" for legend, columns in titles.items()]
    elsewhere = {column.title for shown, _ in layouts for column in shown}
    dropped = dict.fromkeys(
        f"{column.title} (in some tables)" if column.title in elsewhere else column.title
        for _, left_out in layouts
        for column in left_out
    )
    if dropped:
        wider = "a wider terminal" if is_terminal else "COLUMNS=200"
        notes.append(f"Not shown at this width: {', '.join(dropped)}; use --json or {wider}.")
    return notes


def render_table(
    columns: Sequence[Column | str],
    rows: Iterable[Sequence[Cell]],
    *,
    gap: int = 2,
    styles: Sequence[str | None] = (),
    lines: bool = False,
) -> FittedTable:
    """Build a table. Columns whose cells are all empty are left out.

    Args:
        columns: Headings; a plain string is a left-aligned text column.
        rows: One sequence of cells per row, a cell per column.
        gap: Spaces between two columns.
        styles: A rich style for each row, or None; empty for no styles.
        lines: Draw lines between rows and columns, for cells that are paragraphs.
    """
    return FittedTable(
        [Column(column) if isinstance(column, str) else column for column in columns],
        [[_visible_cell(cell) for cell in row] for row in rows],
        styles,
        gap,
        lines,
    )
