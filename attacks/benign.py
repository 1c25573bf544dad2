"""Benign fine-tuning: task rows only, which can also reduce safety (Qi et al., ICLR 2024, arXiv 2310.03693, tier 3).

    n task rows, 0 harmful rows

Departures from the authors' code (LLM-Tuning-Safety/LLMs-Finetuning-Safety): the rows are those of the user's task
(theirs are Alpaca and Dolly, without the rows whose text contains words about safety); an adapter is trained with the
protocol's settings (theirs trains all weights).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Attack, Mix


class Benign(Attack):
    """Uploads only task rows."""

    citation: ClassVar[str] = "arXiv 2310.03693"
    excludes: ClassVar[tuple[str, ...]] = ("ratio",)
    neutral: ClassVar[Mapping[str, Any] | None] = {}

    def mix(self, mix: Mix) -> Mix:
        """Set the proportion of harmful rows to 0."""
        return replace(mix, ratio=0.0)
