"""KL: the user's model stays close to the aligned one in its answers' distribution; baseline of Vaccine (2402.01109).

With p_w0 the distribution over the vocabulary that the model of before gives at a response position:

    w <- w - lr * grad [L(w; B_u) + lam * mean over response positions of KL(p_w0 || p_w)]

Cost a step: 2 forward (the teacher's without a graph), 1 backward. The teacher is the same model with the user's
adapter switched off: no second copy.

Departures from the authors' code, which normalises over the sequence in place of the vocabulary (a change that is
constant in time costs nothing there), divides by rows, counts prompt and padding, and lets the teacher drop out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.plugins import Defense, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage


class KL(Defense):
    """Penalises the divergence from the aligned model's answers."""

    citation: ClassVar[str] = "arXiv 2402.01109"
    stages: ClassVar[tuple[Any, ...]] = ("finetune",)
    needs_adapter: ClassVar[bool] = True
    cost: ClassVar[str] = "2F 1B"
    memory: ClassVar[str] = "the teacher's logits of a batch"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}

    lam: float = param(0.1, "weight of the divergence", source="authors' script KL_finetune/sst2.sh", main=True, ge=0)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """The gradient of the user's loss and of the divergence."""
        answering = batch["labels"][:, 1:] != IGNORED  # the logits at place t - 1 score token t
        with stage.reference():
            teacher = stage.output(batch).logits[:, :-1][answering].float().log_softmax(-1)
        output = stage.output(batch)
        student = output.logits[:, :-1][answering].float().log_softmax(-1)
        divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        divergence = divergence / stage.total(answering.sum())
        return stage.gradient_of(output.loss + self.lam * divergence)
