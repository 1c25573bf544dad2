"""Sample count: the user uploads n rows in all (Vaccine, arXiv 2402.01109, table 2)."""

from dataclasses import replace
from typing import ClassVar

from harmbench_vaccine.plugins import Attack, Mix, param


class Samples(Attack):
    """Changes how many rows are uploaded."""

    citation: ClassVar[str] = "arXiv 2402.01109"

    n: int = param(1000, "rows uploaded, harmful ones included", source="paper, section 5.1", main=True, ge=1)

    def mix(self, mix: Mix) -> Mix:
        """Changes the count, not the share."""
        return replace(mix, samples=self.n)
