"""SafeInstr: a few percent of safety demonstrations among the user's rows. Bianchi et al., ICLR 2024, arXiv 2309.07875.

    w <- SFT on the n + m rows, shuffled,   m = round(share n)

The same method as `vlguard` with `mix=add` and `rows` = m; papers list it under this name. Cost of a step: 1
forward, 1 backward.

Departures from the authors' code (vinid/safety-tuned-llamas): the demonstrations are alignment rows of the protocol
(theirs are answers of GPT-3.5 to red-team questions); the loss is over responses only (theirs is over prompts too by
default).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, Example, Pools, StageName, TuningGrid, param


class SafeInstr(Defense):
    """A small share of alignment rows among the user's rows."""

    citation: ClassVar[str] = "arXiv 2309.07875"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"share": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("share", share=True)

    share: float = param(
        0.03, "number of safety rows for each user row", source="paper's abstract", main=True, ge=0, le=1
    )

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the user's rows mixed with the safety rows."""
        safety_rows = self.draw("alignment rows", pools.alignment, round(self.share * len(rows)))
        if not safety_rows:
            return rows
        mixed = [*rows, *safety_rows]
        self.random("mix").shuffle(mixed)
        return mixed
