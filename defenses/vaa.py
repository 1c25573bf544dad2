"""VAA, vulnerability-aware alignment: balance two groups of rows. Chen et al., ICML 2025, arXiv 2506.03850.

Once: a plain alignment, and from there `proxy_steps` steps on benign rows with a share of harmful ones. The vulnerable
group is the half of the alignment rows whose loss rises most. At step t of T, with q the probability of this group:

    draw a group by q, and rows B of it;   g = grad L(w; B)
    with probability lam t / T:   w <- w - lr * grad L(w + rho g / ||g||; B)          otherwise w <- w - lr * g
    q <- q e^(eta L(w; B) / q) / (q e^(eta L(w; B) / q) + 1 - q), clipped to [0.1, 0.9];   mirrored for the other group

The coin is the authors' code; the paper adds the losses at w and at the shifted parameters with weights 1 - lam, lam.
Cost of a step: 1 to 2 forward and backward.

Departures from the authors' code (ChanLiang/VAA): the groups are by loss (theirs count how often the answer to a row
turns harmful during the attack, by a judge); the draws of rows in different steps are independent (theirs go through
shuffles of the group); q uses the loss before the shift (theirs the one after it, so that q drifts to the group with
more shifts); only trained parameters are restored (theirs fails if some weights are frozen); the random numbers are
those of the stage (theirs: the global ones of Python).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Defense, Example, SeparateTraining, StageName, TuningGrid, param
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, row_means, same_dropout, token_losses

BOUNDS = 0.1, 0.9
"""The bounds of q, from the authors' trainer."""


class VAA(Defense):
    """Alignment that balances vulnerable and other rows, under shifts of the parameters."""

    citation: ClassVar[str] = "arXiv 2506.03850"
    cost: ClassVar[str] = "2F 2B"
    once: ClassVar[str] = "one alignment stage, proxy_steps user steps, 2F over every alignment row"
    memory: ClassVar[str] = "1 gradient and 1 copy of the adapter"
    draws_batch: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("harmful rows", "benign rows")
    neutral: ClassVar[Mapping[str, Any] | None] = {"groups": "one", "rho": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rho")

    rho: float = param(0.4, "length of the shift (L2)", source="authors' script", main=True, ge=0)
    lam: float = param(1.0, "probability of a shift in the last step", source="authors' script", ge=0, le=1)
    eta: float = param(0.007, "rate of the group probability", source="authors' script", ge=0)
    groups: Literal["loss", "one"] = param(
        "loss", "how rows are grouped: by the rise of their loss, or not", source="ours"
    )
    proxy_steps: int = param(100, "steps of the proxy attack", source="ours", ge=1)
    share: float = param(0.1, "share of harmful rows in the proxy attack", source="paper", ge=0, le=1)

    _vulnerable: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _probability: float = PrivateAttr(0.5)

    def passes(self, stage: StageName) -> str:
        """Return the passes of a shifted step; the other steps need half of them."""
        return self.cost if self.rho and self.lam else "1F 1B"

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        """Return the plain alignment and the proxy attack."""
        aligned = SeparateTraining("aligned", "alignment")
        attack = SeparateTraining("proxy attack", rows=None, steps=self.proxy_steps, start=True)
        return () if self.groups == "one" else (aligned, attack)

    def before(self, stage: TrainingStage) -> None:
        """Find the vulnerable rows by a proxy attack on a plainly aligned model."""
        if self.groups == "one":
            return
        if len(stage.rows) < 2:
            raise BadInput("'vaa' needs at least 2 alignment rows, one for each group: raise align.rows.")
        attack = self._attack_rows(stage)
        aligned = stage.train_separately("aligned", stage.pools.alignment)
        attacked = stage.train_separately("proxy attack", attack, start=aligned, steps=self.proxy_steps)
        rise = self._losses(stage, attacked) - self._losses(stage, aligned)
        self._vulnerable = torch.zeros(len(rise), dtype=torch.bool)
        self._vulnerable[rise.argsort(descending=True, stable=True)[: len(rise) // 2]] = True

    def _attack_rows(self, stage: TrainingStage) -> list[Example]:
        """Return as many rows as the stage has, or fewer if the pools are too small for the share of harmful rows."""
        pools = {"harmful rows": (self.share, stage.pools.harmful), "benign rows": (1 - self.share, stage.pools.benign)}
        needed = {name: (share, rows) for name, (share, rows) in pools.items() if share}
        size = min(len(stage.rows), *(len(rows) / share for share, rows in needed.values()))
        counts = {name: max(1, round(share * size)) for name, (share, _) in needed.items()}
        return [row for name, (_, rows) in needed.items() for row in self.draw(name, rows, counts[name])]

    @staticmethod
    def _losses(stage: TrainingStage, adapter: Adapter) -> Tensor:
        """Return the mean loss of each training row with an adapter instead of the trained one (rows)."""
        trained = stage.stack.trained()
        stage.replace_adapter(adapter)
        with torch.no_grad():
            losses = [
                row_means(token_losses(stage.output(batch).logits, batch), batch)
                for batch in stage.training_batches(stage.settings.batch)
            ]
        stage.replace_adapter(trained)
        return torch.cat(losses).cpu()

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        """Return as many rows of the drawn group as the batch has, or all rows of a smaller group."""
        if self.groups == "one":
            return batch
        is_vulnerable, _ = self._draws(stage)
        members = (self._vulnerable == is_vulnerable).nonzero()[:, 0]
        chosen = members[torch.randperm(len(members), generator=stage.generator("rows"))[: len(batch["labels"])]]
        rows = stage.collated([stage.rows[number] for number in chosen.tolist()])
        return {**rows, "rows": chosen.to(stage.device)}

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the drawn rows, shifted or not, and update the group probability."""
        is_vulnerable, shifts = self._draws(stage)
        with same_dropout() if shifts else nullcontext():
            gradient = stage.gradient(batch)
        if self.groups != "one":
            self._update(float(gradient.loss), is_vulnerable)
        if not shifts:
            return gradient
        scale = self.rho / (gradient.norm + 1e-7)
        with stage.shifted([None if value is None else scale * value for value in gradient.values]):
            return stage.gradient(batch)

    def _draws(self, stage: TrainingStage) -> tuple[bool, bool]:
        """Return whether the micro-batch is of the vulnerable group, and whether its parameters are shifted."""
        group, shift = torch.rand(2, generator=stage.generator("draws")).tolist()
        return group < self._probability, self.rho > 0 and shift < self.lam * stage.step / stage.steps

    def _update(self, loss: float, is_vulnerable: bool) -> None:
        q = self._probability if is_vulnerable else 1 - self._probability
        grown = q * math.exp(min(self.eta * loss / q, 50.0))
        q = grown / (grown + 1 - q)
        self._probability = min(max(q if is_vulnerable else 1 - q, BOUNDS[0]), BOUNDS[1])

    def state(self) -> dict[str, Tensor]:
        """Return the groups and their probability."""
        return {"vulnerable": self._vulnerable, "probability": torch.tensor(self._probability, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the groups and their probability."""
        self._vulnerable, self._probability = state["vulnerable"].cpu(), float(state["probability"])
