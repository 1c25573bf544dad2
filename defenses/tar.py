"""TAR: tamper-resistant training against a simulated attacker. Tamirisa et al., ICLR 2025, arXiv 2408.00761.

At each step a new attacker takes K AdamW steps on half of the harmful rows, without dropout; phi_k is its state after
step k. With H_k the mean entropy of the predictions at w and phi_k, at the response positions of a batch of the other
half:

    c_k = exp(slope (k - K))
    w <- w - lr * [lam_r grad L(w; B_a) - lam * sum over each k divisible by `every` of c_k grad_w H_k]

adversary=second: phi is a second adapter on top of w, as in the user stage, and grad_w is exact at (w, phi_k).
adversary=same: the attacker moves w itself; the gradient at the moved w is applied at w, as in the authors' code.
Neither differentiates through the steps of the attacker (first order), nor does the authors' code.

Cost of a step: K + K / every + 1 forward and backward, 81 with the authors' values; `tar:inner=8,every=2` needs 13.
T-Vaccine's baseline of this name is another method: its code computes plain SFT.

Departures from the authors' code (rishub-tamirisa/tamper-resistance): an adapter is trained (theirs: all weights), so
the attacker's rates are ours; every attacker trains on the defender's harmful rows (theirs draws one of three data
sets, and with the third begins on harmless rows); entropy is over response positions (theirs also over prompt and
padding); with accumulation each micro-batch has an attacker; there is no initial random mapping; there is no term on
hidden states of retained rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.second_adapter import second_adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage

RATES = 0.05, 0.5, 1.0
"""The learning rates as multiples of `rate`, in the authors' proportion; each attacker draws one."""


class TAR(Defense):
    """Alignment that keeps the predictions of a simulated attacker's model uncertain."""

    citation: ClassVar[str] = "arXiv 2408.00761"
    cost: ClassVar[str] = "81F 81B"
    memory: ClassVar[str] = "2 gradients, a second adapter and its optimizer"
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam")

    lam: float = param(4.0, "weight of the tamper resistance", source="authors' script", main=True, ge=0)
    lam_r: float = param(1.0, "weight of the alignment loss", source="authors' script", ge=0)
    inner: int = param(64, "K, the attacker's steps", source="authors' script", ge=1)
    every: int = param(4, "steps of the attacker between two terms of the sum", source="authors' script", ge=1)
    slope: float = param(0.0625, "slope of the weights c_k", source="authors' script", ge=0)
    rate: float = param(1e-3, "largest learning rate of the attacker", source="ours, for adapters", gt=0)
    adversary: Literal["second", "same"] = param(
        "second", "adapter that the attacker trains", source="ours; same: paper"
    )

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if self.inner < self.every:  # the sum has no term: plain supervised fine-tuning
            raise ValueError(f"inner={self.inner} is less than every={self.every}; allowed: inner at least every")
        return self

    def passes(self, stage: StageName) -> str:
        """Return the passes of a step."""
        count = self.inner + self.inner // self.every + 1 if self.lam else 1
        return f"{count}F {count}B"

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the alignment gradient plus the weighted resistance along the attacker's path."""
        gradient = self.lam_r * stage.gradient(batch)
        if self.lam:
            with stage.isolated("attacker"), stage.restored():
                for term in self._terms(stage):
                    gradient = gradient + self.lam * term
        return gradient

    def _terms(self, stage: TrainingStage) -> Iterator[Gradient]:
        """Yield the gradients of the terms c_k (-H) while the attacker trains."""
        pool, generator = stage.encoded("attacker", stage.pools.harmful), stage.generator("attacker")
        if len(pool) < 2:
            raise BadInput(f"'tar' needs at least 2 harmful rows of the defender; available: {len(pool)}.")
        order = torch.randperm(len(pool), generator=generator).tolist()
        half = (len(order) + 1) // 2
        rows, held_out = order[:half], order[half:][: stage.settings.batch]
        test = stage.collated([pool[number] for number in held_out])
        rate = self.rate * RATES[int(torch.randint(len(RATES), (), generator=generator))]
        with self._attacker(stage) as attacker:
            optimizer = torch.optim.AdamW(attacker, lr=rate)
            for k in range(1, self.inner + 1):
                chosen = torch.randperm(len(rows), generator=generator)[: stage.settings.batch].tolist()
                step(optimizer, attacker, stage.loss(stage.collated([pool[rows[number]] for number in chosen])))
                if k % self.every == 0:
                    weight = math.exp(self.slope * (k - self.inner))
                    yield weight * stage.gradient_of(-mean_entropy(stage.output(test).logits))

    def _attacker(self, stage: TrainingStage) -> AbstractContextManager[Sequence[Tensor]]:
        """Return the parameters that the attacker trains inside the block."""
        if self.adversary == "second":
            return second_adapter(stage, "second adapter")
        return nullcontext([parameter for parameter in stage.trainable.values() if parameter.requires_grad])


def step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], loss: Tensor) -> None:
    """Take an optimizer step on a loss; the `.grad` of the parameters, which the trainer uses, does not change."""
    earlier = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter, value in zip(parameters, earlier, strict=True):
        parameter.grad = value


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the predictions (positions x vocabulary), a scalar."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()
