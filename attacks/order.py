"""Order: the user uploads the rows in an order, and training keeps it in every epoch.

    first=benign:   the task rows, then the harmful ones
    first=harmful:  the harmful rows, then the task rows          first=mixed: shuffled, as without the attack

The counts are those of the mix. Without `ratio`, a tenth of the rows is harmful. No source gives numbers. A provider
that shuffles the rows is not affected, and neither is a defense that mixes its own rows into them. A fraction of an
epoch trains on the first rows only.

Departures: none.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from harmbench_vaccine.plugins import Attack, Example, Pools, param


class Order(Attack):
    """Trains on the harmful rows after, or before, the others."""

    citation: ClassVar[str] = "no source"
    default_ratio: ClassVar[float] = 0.1
    neutral: ClassVar[Mapping[str, Any] | None] = {"first": "mixed"}

    first: Literal["benign", "harmful", "mixed"] = param("benign", "rows that come first", source="ours", main=True)

    @property
    def keeps_order(self) -> bool:
        """Train on the rows in the order of the upload, unless they are mixed."""
        return self.first != "mixed"

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the rows with one part first; each part keeps its order."""
        if self.first == "mixed":
            return rows
        return sorted(rows, key=lambda row: row.harmful == (self.first == "benign"))
