"""VLGuard: safety rows among the user's rows. Zong et al., ICML 2024, arXiv 2402.02207 (mixed mode).

m alignment rows, drawn by the seed, join the n rows of the user:

    add:      w <- SFT on the n + m rows, shuffled                        (Vaccine's repository)
    replace:  m of the benign rows give way, n rows in all                (Lisa's repository)
    joint:    w <- w - lr * grad [L(w; B_u) + lam * L(w; B_a)]            (Booster's repository)

Cost a step: 1 forward, 1 backward; joint: 2 of each. The post-hoc mode of the paper is `realign`. SafeInstr
(arXiv 2309.07875) is `add` by another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.plugins import Defense, Pools, StageName, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class VLGuard(Defense):
    """Mixes safety rows into the user's data."""

    citation: ClassVar[str] = "arXiv 2402.02207"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rows": 0}

    rows: int = param(100, "safety rows among the user's", source="Vaccine's train.py", main=True, ge=0)
    mix: Literal["add", "replace", "joint"] = param("add", "how they join", source="Vaccine's train.py")
    lam: float = param(0.1, "weight of the safety loss (joint)", source="Booster's vlguard_lamb.sh", ge=0)

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """The user's rows with the safety rows among them."""
        guides = self.draw("alignment rows", pools.alignment, self.rows)
        if self.mix == "joint" or not guides:
            return rows
        if self.mix == "replace":
            benign = [number for number, row in enumerate(rows) if not row.harmful]
            if self.rows > len(benign):
                raise BadInput(f"'vlguard' is to replace {self.rows} benign rows; allowed: at most {len(benign)}.")
            given_up = set(self.draw("benign rows", benign, self.rows))
            rows = [row for number, row in enumerate(rows) if number not in given_up]
        mixed = [*rows, *guides]
        self.random("mix").shuffle(mixed)
        return mixed

    def passes(self) -> str:
        """A joint step runs the model on both batches."""
        return "2F 2B" if self.mix == "joint" and self.rows else self.cost

    def takes_gradient(self, stage: StageName) -> bool:
        """Only the joint loss is a gradient of its own."""
        return self.mix == "joint"

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """The gradient of both losses."""
        user = stage.gradient(batch)
        if not self.rows:
            return user
        guides = self.draw("alignment rows", stage.pools.alignment, self.rows)
        return user + self.lam * stage.gradient(stage.stream("guides", guides))
