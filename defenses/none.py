"""No alignment: the user's data fine-tunes the base model directly.

Cost: none; the alignment stage is skipped. It has no parameter to tune.

Departures: none.
"""

from typing import ClassVar

from harmbench_vaccine.plugins import Defense


class NoAlignment(Defense):
    """The base model without an alignment stage."""

    trains: ClassVar[bool] = False
    cost: ClassVar[str] = "none"
