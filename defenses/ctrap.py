"""CTRAP: plant a collapse that harmful fine-tuning triggers. Yi et al., arXiv 2505.16559.

With B_h harmful rows, B_g benign instructions, e one fixed token, and L_c the mean of -log p(e | ..) over the response
positions of B_g:

    g_h = grad L(w; B_h),   w' = w - alpha * g_h / (||g_h|| + 1e-7)
    w <- w - lr * [grad L(w; B_a) + lam * grad L_c(w'; B_g)]          dw'/dw is replaced by the identity

The paper's step has no norm (normalized=False). The defaults are the values of the authors' code, which divides by it.
After harmful training the model answers everything with e: HS and FA both fall, and such a run is marked
*self-destruct* instead of *collapsed*. Cost of a step: 3 forward, 3 backward.

Departures from the authors' code (clearloveclearlove/CTRAP): both losses have rows of their own (there both are over
alignment rows and benign rows together); the harmful pass and the collapse see the same dropout masks; w is restored
from a copy (theirs adds the step again, which leaves rounding errors).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.plugins import Defense, Example, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class CTRAP(Defense):
    """Alignment after which one harmful step makes the model repeat a single token."""

    citation: ClassVar[str] = "arXiv 2505.16559"
    self_destructs: ClassVar[bool] = True
    cost: ClassVar[str] = "3F 3B"
    memory: ClassVar[str] = "2 gradients and 1 copy of the adapter"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("harmful rows", "benign rows")
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam")

    lam: float = param(0.1, "weight of the collapse", source="authors' CTRAP.sh", main=True, ge=0)
    alpha: float = param(0.1, "length (L2) or rate of the simulated harmful step", source="authors' CTRAP.sh", ge=0)
    normalized: bool = param(True, "alpha is a length: divide by the norm", source="authors' trainer.py")
    text: str = param(
        "an error", "the last token of this text is repeated after the collapse", source="authors' trainer.py"
    )

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the alignment gradient plus that of the collapse after a harmful step."""
        with same_dropout():
            harmful = stage.gradient(stage.stream("harmful", stage.pools.harmful))
        scale = -self.alpha / (harmful.norm + 1e-7) if self.normalized else -self.alpha
        shifts = [None if value is None else scale * value for value in harmful.values]
        with same_dropout(), stage.shifted(shifts):
            collapse = self._collapse(stage, stage.stream("benign", stage.pools.benign))
        return stage.gradient(batch) + self.lam * collapse

    def _collapse(self, stage: TrainingStage, benign: Batch) -> Gradient:
        """Return the gradient of the loss on benign rows whose response tokens all have the label e."""
        (row,) = stage.encoded("collapse", [Example("collapse", "Answer.", self.text)])
        token, labels = row.labels[-2], benign["labels"]  # the last label is the token that ends a response
        return stage.gradient({**benign, "labels": labels.masked_fill(labels != IGNORED, token)})
