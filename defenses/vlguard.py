"""VLGuard: mix safety rows into the user's rows. Zong et al., ICML 2024, arXiv 2402.02207 (mixed mode).

m alignment rows, drawn by the seed, join the n rows of the user:

    add:      w <- SFT on the n + m rows, shuffled                        (Vaccine code)
    replace:  w <- SFT on n rows: m of the benign rows are replaced       (Lisa code)
    joint:    w <- w - lr * grad [L(w; B_u) + lam * L(w; B_a)]            (Booster code)

Cost of a step: 1 forward, 1 backward; joint: 2 forward, 2 backward. The post-hoc mode of the paper is `realign`.
SafeInstr (arXiv 2309.07875) is equal to `add`.

Departures: the rows are alignment rows of the protocol (the paper's are instructions about images, with their answers);
the m rows are drawn by the seed (the Vaccine code takes the first ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Defense, Example, Pools, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class VLGuard(Defense):
    """A mix of safety rows and the user's rows."""

    citation: ClassVar[str] = "arXiv 2402.02207"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rows": 0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rows")

    rows: int = param(100, "number of safety rows", source="train.py of the Vaccine code", main=True, ge=0)
    mix: Literal["add", "replace", "joint"] = param(
        "add", "how safety rows join the user's rows", source="train.py of the Vaccine code"
    )
    lam: float = param(0.1, "weight of the safety loss (joint)", source="vlguard_lamb.sh of the Booster code", ge=0)

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the user's rows mixed with the safety rows."""
        safety_rows = self.draw("alignment rows", pools.alignment, self.rows)
        if self.mix == "joint" or not safety_rows:
            return rows
        if self.mix == "replace":
            benign = [number for number, row in enumerate(rows) if not row.harmful]
            if self.rows > len(benign):
                raise BadInput(
                    f"'vlguard' cannot replace {self.rows} benign rows: the user's data has only {len(benign)}. "
                    f"Set rows to at most {len(benign)}."
                )
            replaced = set(self.draw("benign rows", benign, self.rows))
            rows = [row for number, row in enumerate(rows) if number not in replaced]
        mixed = [*rows, *safety_rows]
        self.random("mix").shuffle(mixed)
        return mixed

    def passes(self, stage: StageName) -> str:
        """Return the passes of a step: a joint step runs the model on both batches."""
        return "2F 2B" if self.mix == "joint" and self.rows else self.cost

    def takes_gradient(self, stage: StageName) -> bool:
        """Return whether `mix` is "joint", the only mode that changes the gradient."""
        return self.mix == "joint"

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of both losses."""
        gradient = stage.gradient(batch)
        if not self.rows:
            return gradient
        safety_rows = self.draw("alignment rows", stage.pools.alignment, self.rows)
        return gradient + self.lam * stage.gradient(stage.stream("guides", safety_rows))
