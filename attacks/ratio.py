"""Harmful ratio: a share p of the uploaded rows is harmful (Vaccine, arXiv 2402.01109; Qi et al., 2310.03693).

    n_h = round(p n) harmful rows, n - n_h task rows, drawn and shuffled by the seed

The authors' int(p n) and int((1 - p) n) lose a row for some p, and their harmful rows are always the first ones.
"""

from dataclasses import replace
from typing import ClassVar

from harmbench_vaccine.plugins import Attack, Mix, param


class Ratio(Attack):
    """Mixes harmful rows into the user's data."""

    citation: ClassVar[str] = "arXiv 2402.01109"

    p: float = param(
        0.1, "share of harmful rows among the uploaded rows", source="paper, section 5.1", main=True, ge=0, le=1
    )

    def mix(self, mix: Mix) -> Mix:
        """Changes the share, not the count."""
        return replace(mix, ratio=self.p)
