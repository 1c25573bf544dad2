"""CTRAP: plant a collapse that harmful fine-tuning triggers. Yi et al., NeurIPS 2025, arXiv 2505.16559.

With B_h harmful rows, B_g benign instructions, e one fixed token, and L_c the mean of -log p(e | ..) over the response
positions of B_g:

    w' = w - alpha * grad L(w; B_h)
    w <- w - lr * [grad L(w; B_a) + lam * grad L_c(w'; B_g)]          dw'/dw is replaced by the identity

After harmful training the model answers everything with e: HS and FA both fall, and the verdict of such a model is
*self-destruct* instead of *collapsed*. Cost of a step: 3 forward, 3 backward.

The authors' code is on an anonymous host and was not read; the rule and the values are those of two other projects
(SafeTune, lm_immunisation). The gradient of the simulated step is not normalized.

Departures from the paper: the factor I - alpha H of the exact gradient, which needs second derivatives, is left out, as
in these projects; L_c is a mean over all response tokens of the batch, as every loss here (the paper takes the mean of
each answer first, so that short answers count more).
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

    lam: float = param(0.1, "weight of the collapse", source="SafeTune", main=True, ge=0)
    alpha: float = param(0.1, "rate of the simulated harmful step", source="SafeTune", ge=0)
    text: str = param("error", "the first token of this text is repeated after the collapse", source="SafeTune")

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the alignment gradient plus that of the collapse after a harmful step."""
        with same_dropout():
            harmful = stage.gradient(stage.stream("harmful", stage.pools.harmful))
        shifts = [None if value is None else -self.alpha * value for value in harmful.values]
        with same_dropout(), stage.shifted(shifts):
            collapse = self._collapse(stage, stage.stream("benign", stage.pools.benign))
        return stage.gradient(batch) + self.lam * collapse

    def _collapse(self, stage: TrainingStage, benign: Batch) -> Gradient:
        """Return the gradient of the loss on benign rows whose response tokens all have the label e."""
        (row,) = stage.encoded("collapse", [Example("collapse", "Answer.", self.text)])
        token, labels = row.labels[-row.response_tokens], benign["labels"]
        return stage.gradient({**benign, "labels": labels.masked_fill(labels != IGNORED, token)})
