"""KL: keep the answer distribution close to the aligned model's; a baseline of the Vaccine code (arXiv 2402.01109).

With p_w0 the distribution over the vocabulary that the model before the user stage predicts at a response position:

    w <- w - lr * grad [L(w; B_u) + lam * mean over response positions of KL(p_w0 || p_w)]

Cost of a step: 2 forward (the teacher's without a graph), 1 backward. The teacher is the same model with the user's
adapter disabled, so no second copy is stored.

Departures from the authors' code (git-disl/Vaccine): the softmax is over the vocabulary (theirs is over the sequence,
so that a change that is constant over the positions is not penalized); the mean is over response positions (theirs
divides by rows and counts prompt and padding); the teacher runs without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, response_mask


class KL(Defense):
    """Fine-tuning with a penalty on the divergence from the aligned model's answers."""

    citation: ClassVar[str] = "arXiv 2402.01109"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    needs_adapter: ClassVar[bool] = True
    cost: ClassVar[str] = "2F 1B"
    memory: ClassVar[str] = "the teacher's logits for one batch"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam")

    lam: float = param(0.1, "weight of the divergence", source="authors' script KL_finetune/sst2.sh", main=True, ge=0)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the user's loss plus the weighted divergence."""
        with stage.reference():
            teacher = stage.output(batch).logits.float().log_softmax(-1)
        output = stage.output(batch)
        student = output.logits.float().log_softmax(-1)
        divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        divergence = divergence / stage.sum_over_ranks(response_mask(batch).sum())
        return stage.gradient_of(output.loss + self.lam * divergence)
