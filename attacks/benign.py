"""Benign fine-tuning: task rows only, which erode alignment too (Qi et al., ICLR 2024, arXiv 2310.03693, tier 3).

n task rows, no harmful one
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Attack, Mix


class Benign(Attack):
    """Uploads the task's rows alone."""

    citation: ClassVar[str] = "arXiv 2310.03693"
    excludes: ClassVar[tuple[str, ...]] = ("ratio",)
    neutral: ClassVar[Mapping[str, Any] | None] = {}

    def mix(self, mix: Mix) -> Mix:
        """No harmful row."""
        return replace(mix, ratio=0.0)
