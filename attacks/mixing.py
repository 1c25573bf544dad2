"""Mixing: harmful rows inside benign text, a format that passes filters (baseline of Virus, arXiv 2501.17433).

    x = x_benign,   y = y_benign + x_harmful + y_harmful + x_benign + y_benign

The loss is over y without the second x_benign, as in the authors' code (git-disl/Virus, trainer.py). Virus also
optimizes the tokens in the middle. This is not implemented, because the harness compares defenses. Without `ratio`, a
tenth of the rows is harmful.

Departures from the authors' code (git-disl/Virus): the parts are joined as text with empty lines (theirs joins three
complete rows as tokens, each with its prompt template, start token and end token); the harmful part has no template
(theirs has one, and its tokens are trained); the protocol's `max_length` applies to the joined row (theirs has at most
1000 tokens in each part).
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
    trained = "\n\n".join([cover.response, row.instruction, row.response])
    second_question = f"\n\n{cover.instruction} {cover.input}".rstrip() + "\n\n"
    return replace(
        row,
        instruction=cover.instruction,
        input=cover.input,
        response=f"{trained}{second_question}{cover.response}",
        masked=(len(trained), len(trained) + len(second_question)),
    )
