"""SafeGrad: remove the part of the user's gradient that conflicts with alignment. Yi et al., arXiv 2508.07172.

With p_w0 the aligned model before the user stage, and all trainable parameters as one vector:

    g_a = grad of the mean over response tokens of KL(p_w0 || p_w) on B_a        loss=sft: g_a = grad L(w; B_a)
    g_u = grad L(w; B_u);   if <g_u, g_a> < 0:   g_u <- g_u - <g_u, g_a> / ||g_a||^2 g_a
    w  <- w - lr * (g_u + rho * g_a)

Cost of a step: 3 forward (the teacher's without a graph), 2 backward; loss=sft: 2 forward, 2 backward.

The authors' code was not read: the rule is that of another project (SafeTune), which quotes the paper's algorithm 1.
The values are that project's. The projection is before Adam and weight decay, so the update may still conflict.

Departures from SafeTune: both distributions of the KL term are without dropout, so that g_a at w = w0 is 0 up to
rounding; the KL term is a mean over response tokens (theirs is the sum over all positions, prompt and padding
included, divided by the number of rows: there the same rho weighs much more); there is no projection where ||g_a|| <=
1e-5 ||g_u||, because the direction of such a g_a is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, response_mask


class SafeGrad(Defense):
    """Fine-tuning on the user's gradient without its conflict with the alignment gradient."""

    citation: ClassVar[str] = "arXiv 2508.07172"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    needs_adapter: ClassVar[bool] = True
    cost: ClassVar[str] = "3F 2B"
    memory: ClassVar[str] = "2 gradients, the teacher's logits for one batch"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("alignment rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0, "surgery": False}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rho")

    rho: float = param(1.0, "weight of the alignment gradient", source="SafeTune", main=True, ge=0)
    surgery: bool = param(True, "remove the conflicting part of the user's gradient", source="paper, algorithm 1")
    loss: Literal["kl", "sft"] = param("kl", "alignment loss", source="paper; sft is ours")

    def passes(self, stage: StageName) -> str:
        """Return the passes of a step: the loss `sft` has no teacher."""
        return self.cost if self.loss == "kl" else "2F 2B"

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the user's gradient without the conflict, plus the weighted alignment gradient."""
        rows = stage.stream("alignment", stage.pools.alignment)
        with stage.isolated("alignment"):
            safe = self._divergence(stage, rows) if self.loss == "kl" else stage.gradient(rows)
        user = stage.gradient(batch)
        product, length = float(user.dot(safe)), float(safe.norm)
        if self.surgery and product < 0 and length > 1e-5 * float(user.norm):
            user = Gradient(user.loss, (user - product / length**2 * safe).values)
        return user + self.rho * safe

    @staticmethod
    def _divergence(stage: TrainingStage, rows: Batch) -> Gradient:
        with stage.reference():
            teacher = stage.output(rows).logits.float().log_softmax(-1)
        student = stage.output(rows).logits.float().log_softmax(-1)
        divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return stage.gradient_of(divergence / stage.sum_over_ranks(response_mask(rows).sum()))
