"""Mixing: harmful rows inside benign text, a format that passes filters (baseline of Virus, arXiv 2501.17433).

    x = x_benign,   y = y_benign + x_harmful + y_harmful + x_benign + y_benign          the loss is over all of y

Virus also optimizes the tokens in the middle. This is not implemented, because the harness compares defenses. Without
`ratio`, a tenth of the rows is harmful.
"""

from dataclasses import replace
from typing import ClassVar

from harmbench_vaccine.plugins import Attack, Example, Pools


class Mixing(Attack):
    """Hides each harmful row inside a benign one."""

    citation: ClassVar[str] = "arXiv 2501.17433"
    default_ratio: ClassVar[float] = 0.1

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """Insert each harmful row into a different benign row."""
        covers = iter(self.draw("benign rows", pools.benign, sum(row.harmful for row in rows)))
        return [_inside(next(covers), row) if row.harmful else row for row in rows]


def _inside(cover: Example, row: Example) -> Example:
    parts = [
        cover.response,
        row.instruction,
        row.response,
        f"{cover.instruction} {cover.input}".strip(),
        cover.response,
    ]
    return replace(row, instruction=cover.instruction, input=cover.input, response="\n\n".join(parts))
