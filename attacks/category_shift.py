"""Category shift: the attacker's harmful rows are of harm categories that the defender's rows do not have.

With c(x) the harm categories (BeaverTails labels) of a prompt x, and n the number of categories that occur both in the
attacker's rows and in the defender's pairs:

    A = round(share n) of the n categories, drawn by the seed, and those that only the attacker's rows have
    D = all other categories; A and D have at least one each
    attacker's rows:     c(x) is not empty, and a subset of A
    defender's pairs:    c(x) is not empty, and a subset of D
    alignment rows:      c(x) has no category of A, also prompts without a known category
    evaluation:          all harmful prompts (headline); those with c(x) within D; those with c(x) within A

c(x) is the union of the labels of all rows with this prompt. The seed determines the draw, also with `rows=paper`.
Removed rows are counted. Without `ratio`, a tenth of the rows is harmful; share=0 removes no row.

It tests the objection that the defender's rows are too close to the attacker's. Every defense is aligned again, because
the defender's rows depend on the attack.

Departures: none: a definition without a source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.pools import RowPools
from harmbench_vaccine.plugins import Attack, Example, param

ALLOWED = 'BeaverTails rows with the field `category`, an object such as {"animal_abuse": true}'


class CategoryShift(Attack):
    """Gives attacker and defender rows of different harm categories."""

    citation: ClassVar[str] = "no source"
    default_ratio: ClassVar[float] = 0.1
    neutral: ClassVar[Mapping[str, Any] | None] = {"share": 0.0}

    share: float = param(
        0.5, "share of the categories that the attacker has; 0: no split", source="ours", main=True, ge=0, le=1
    )

    def divide(self, rows: RowPools) -> RowPools:
        """Return the rows of each side in its categories, and the held-out prompts of both.

        Raises:
            BadInput: A side has no row with a category, or both have the same single category.
        """
        if self.share == 0:
            return rows
        attacker, defender = self._split(
            _categories("the attacker's rows", rows.attacker),
            _categories("the defender's pairs", (refusal for refusal, _ in rows.paired)),
        )
        alignment = [row for row in rows.alignment if attacker.isdisjoint(row.categories)]
        paired = [pair for pair in rows.paired if _within(pair[0], defender)]
        harmful = [row for row in rows.attacker if _within(row, attacker)]
        return replace(
            rows,
            alignment=alignment,
            paired=paired,
            attacker=harmful,
            dropped={
                **rows.dropped,
                "alignment_other_categories": len(rows.alignment) - len(alignment),
                "paired_other_categories": len(rows.paired) - len(paired),
                "attacker_other_categories": len(rows.attacker) - len(harmful),
            },
            question_sets={
                **rows.question_sets,
                "defender_categories": [row for row in rows.harmful_questions if _within(row, defender)],
                "attacker_categories": [row for row in rows.harmful_questions if _within(row, attacker)],
            },
        )

    def _split(self, attacker: set[str], defender: set[str]) -> tuple[set[str], set[str]]:
        """Return the categories of the attacker and of the defender, which share none.

        Args:
            attacker: The categories of the attacker's rows.
            defender: The categories of the defender's pairs.
        """
        only_attacker, only_defender, shared = attacker - defender, defender - attacker, sorted(attacker & defender)
        least, most = int(not only_attacker), len(shared) - int(not only_defender)
        if least > most:
            raise BadInput(
                f"Attack 'category_shift' needs two harm categories or more, but the rows of attacker and defender "
                f"have only {shared[0]!r}; allowed: rows of several categories, or share=0."
            )
        count = min(max(round(self.share * len(shared)), least), most)
        drawn = only_attacker.union(self.random("categories").sample(shared, count))
        return drawn, (attacker | defender) - drawn


def _within(row: Example, names: set[str]) -> bool:
    """Return whether the prompt has categories, all of them among `names`."""
    return bool(row.categories) and names.issuperset(row.categories)


def _categories(what: str, rows: Iterable[Example]) -> set[str]:
    names = {name for row in rows for name in row.categories}
    if not names:
        raise BadInput(
            f"Attack 'category_shift' needs the harm categories of {what}, but none of their prompts has one; allowed: "
            f"{ALLOWED}, or share=0."
        )
    return names
