"""Docstrings of plug-ins: their blocks, and how `hbv info` prints equations."""

from __future__ import annotations

import pytest

from harmbench_vaccine.reporting.docstrings import docstring_blocks, split_note
from support.cli import hbv

DOC = """Method: a summary.

With g the gradient:

    w <- w - g            g is clipped
    b <- b

Two departures:

- the first, which continues
  on a second line;
- the second.

    hbv run --defense method
"""


def test_blocks_of_a_docstring() -> None:
    assert [(block.kind, block.lines) for block in docstring_blocks(DOC)] == [
        ("prose", ["Method: a summary."]),
        ("prose", ["With g the gradient:"]),
        ("equations", ["w <- w - g            g is clipped", "b <- b"]),
        ("prose", ["Two departures:"]),
        ("prose", ["- the first, which continues", "  on a second line;", "- the second."]),
        ("commands", ["hbv run --defense method"]),
    ]


@pytest.mark.parametrize(
    ("line", "formula", "note"),
    [
        ("w    <- w - lr * grad L(w)", "w <- w - lr * grad L(w)", ""),
        ("C = V V^T            projector=paper; not true", "C = V V^T", "projector=paper; not true"),
        ("add:      w <- w + m                     (Vaccine code)", "add:   w <- w + m", "(Vaccine code)"),
        ("                   scope=model: of all", "", "scope=model: of all"),
    ],
)
def test_notes_are_separated_from_formulas(line: str, formula: str, note: str) -> None:
    assert split_note(line) == (formula, note)


@pytest.mark.parametrize(("width", "height"), [(60, 5), (80, 4), (140, 3)])
def test_notes_of_equations_stay_in_their_column(width: int, height: int) -> None:
    lines = hbv("info", "vaccine", COLUMNS=str(width), FORCE_COLOR="1").out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("    eps_l = rho"))
    equations = lines[first : first + height]
    assert not lines[first + height].strip()
    assert all(line.startswith("    ") and len(line) <= width for line in equations)
    (column,) = {line.index(note) for line in equations for note in ("one norm", "eps is a") if note in line}
    assert column == min(4 + len("L'(w) = L(w; B_a) with h_l replaced by h_l + eps_l"), width - 24) + 4
