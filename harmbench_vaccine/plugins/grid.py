"""Grids: the values of a parameter among which `hbv tune` chooses, as many for each defense."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harmbench_vaccine.core.errors import BadInput

HALF_DECADE = math.sqrt(10)
COUNT = 5
"""Number of values unless `hbv tune --values` states another one."""


@dataclass(frozen=True)
class TuningGrid:
    """A parameter with the spacing of its values around the default, which is the middle one.

    With d the default and k = ..., -2, -1, 0, 1, 2, ...:

        d * step^k                                   a positive number
        p with p / (1 - p) = d / (1 - d) * step^k    a share, which is always between 0 and 1

    Values are rounded to two significant digits, of a share above 1/2 those of 1 - p; whole numbers to whole numbers.
    """

    parameter: str
    step: float = HALF_DECADE
    """Factor between two values: half a decade, as in 1, 3.2, 10, unless the file of the defense gives a reason."""
    share: bool = False
    """True for a share: its odds are spaced instead of its values."""

    def values(self, default: float, count: int) -> list[float]:
        """Return the values around a default, in ascending order; the default itself is not rounded.

        Args:
            default: The default of the class or of the protocol; if it is a whole number, all values are.
            count: Number of values, odd.

        Raises:
            BadInput: The default is not a positive number or a share, or whole numbers are not as dense.
        """
        if not 0 < default < (1 if self.share else math.inf):
            allowed = "between 0 and 1" if self.share else "above 0"
            raise BadInput(f"No values around {self.parameter}={default:g}: the default must be {allowed}.")
        powers = range(-(count // 2), count // 2 + 1)
        values = [default if power == 0 else self._rounded(default, power) for power in powers]
        if min(values) <= 0 or len(set(values)) < count:
            raise BadInput(
                f"{self.parameter} has fewer than {count} whole numbers around {default:g}; allowed: fewer --values."
            )
        return values

    def _rounded(self, default: float, power: int) -> float:
        factor = self.step**power
        if self.share:
            odds = default / (1 - default) * factor
            return _two_digits(odds / (1 + odds)) if odds < 1 else round(1 - _two_digits(1 / (1 + odds)), 12)
        return round(default * factor) if isinstance(default, int) else _two_digits(default * factor)


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
