"""Harmful ratio: a proportion p of the uploaded rows is harmful (Vaccine, arXiv 2402.01109; Qi et al., 2310.03693).

    n_h = round(p n) harmful rows, n - n_h task rows, drawn and shuffled by the seed

Departures from the authors' code (git-disl/Vaccine): n_h is rounded, and the rest are task rows (theirs has int(p n)
and int((1 - p) n) rows, which lose a row for some p); the harmful rows are drawn by the seed (theirs are always the
first ones).
"""

from dataclasses import replace
from typing import ClassVar

from harmbench_vaccine.plugins import Attack, Mix, param


class Ratio(Attack):
    """Adds harmful rows to the data of the user."""

    citation: ClassVar[str] = "arXiv 2402.01109"

    p: float = param(
        0.1, "proportion of harmful rows among the uploaded rows", source="paper, section 5.1", main=True, ge=0, le=1
    )

    def mix(self, mix: Mix) -> Mix:
        """Set the proportion of harmful rows, not the number of rows."""
        return replace(mix, ratio=self.p)
