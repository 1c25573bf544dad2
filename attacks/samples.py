"""Sample count: the user uploads n rows (Vaccine, arXiv 2402.01109, table 2).

Departures from the authors' code (git-disl/Vaccine): the rows are drawn by the seed (theirs are always the first ones).
"""

from dataclasses import replace
from typing import ClassVar

from harmbench_vaccine.plugins import Attack, Mix, param


class Samples(Attack):
    """Changes the number of uploaded rows."""

    citation: ClassVar[str] = "arXiv 2402.01109"

    n: int = param(
        1000, "number of uploaded rows, including harmful ones", source="paper, section 5.1", main=True, ge=1
    )

    def mix(self, mix: Mix) -> Mix:
        """Set the number of rows, not the proportion of harmful ones."""
        return replace(mix, samples=self.n)
