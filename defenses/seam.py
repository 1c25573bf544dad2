"""SEAM: couple harmful and benign learning, so that harmful training destroys the model. Wang et al., arXiv 2505.12186.

With g_h the gradient of the loss on harmful answers B_h at the tokens at which they differ from the safe ones,
g_b = grad L(w; B_b) on benign rows, u = g / ||g||, c = <u_h, u_b>, and A the mean loss of the LM head on the
hidden states of all layers at these tokens of B_h (as in RepNoise):

    w <- w - lr * grad [L(w; B_a) - unlearn * log(1 + A) + beta * c]
    grad c = 1/eps [(g_h(w + eps (u_b - c u_h)) - g_h) / ||g_h|| + (g_b(w + eps (u_h - c u_b)) - g_b) / ||g_b||]

The last line is exact for quadratic losses, otherwise its error is O(eps). Where c is near -1, a harmful step unlearns
benign behavior: HS and FA fall together, and such a run is marked *self-destruct*. A micro-batch of pairs
without a token that differs gives the gradient of SFT. Cost of a step: 6 forward, 6 backward.

A bfloat16 model rounds its activations, so that the last line is noise at eps = 0.001: in a model of 2 layers its
relative error is 11, and 0.2 at eps = 0.1 (in float32: 0.002 and 0.15).

Departures from the authors' code (ZJUWYH/seam): weights and shifts are float32 (theirs are bfloat16, where most of the
shift is rounded off); the alignment rows are the protocol's; the mask and A are those of `repnoise`; the benign loss is
over the response (theirs also over the prompt); `unlearn` is a parameter (1 in theirs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.plugins import Defense, TuningGrid, param
from harmbench_vaccine.training.layer_losses import differing, layerwise_loss
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class SEAM(Defense):
    """Alignment in which harmful and benign gradients point in opposite directions."""

    citation: ClassVar[str] = "arXiv 2505.12186"
    self_destructs: ClassVar[bool] = True
    cost: ClassVar[str] = "6F 6B"
    memory: ClassVar[str] = "5 gradients and 1 copy of the adapter, n + 1 logits of the harmful tokens"
    data: ClassVar[tuple[str, ...]] = ("paired safe and harmful rows", "benign rows")
    neutral: ClassVar[Mapping[str, Any] | None] = {"beta": 0.0, "unlearn": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("beta")

    beta: float = param(0.01, "weight of the cosine of the gradients", source="authors' train.sh", main=True, ge=0)
    unlearn: float = param(1.0, "weight of the ascent on the harmful loss", source="authors' trainer.py", ge=0)
    eps: float = param(1e-3, "length of the finite difference", source="authors' train.sh", gt=0)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the three terms."""
        safe, harmful = stage.paired_stream("pairs", stage.pools.paired)
        mask = differing(safe, harmful)
        if not mask.any():  # no token for the harmful loss
            return stage.gradient(batch)
        harmful = {**harmful, "labels": harmful["labels"].masked_fill(~mask, IGNORED)}
        with same_dropout():
            output = stage.output(harmful, output_hidden_states=True)
            unlearning = stage.gradient_of(-torch.log1p(layerwise_loss(stage, output, harmful, mask)))
        coupling = self._coupling(stage, harmful, stage.stream("benign", stage.pools.benign))
        return stage.gradient(batch) + self.unlearn * unlearning + self.beta * coupling

    def _coupling(self, stage: TrainingStage, harmful: Batch, benign: Batch) -> Gradient:
        """Return the cosine of both gradients, with its gradient by finite differences."""
        gradients = []
        for rows in (harmful, benign):
            with same_dropout():
                gradients.append(stage.gradient(rows))
        product = gradients[0].dot(gradients[1])
        norms = [float(gradient.norm + 1e-12) for gradient in gradients]
        cosine = product / (norms[0] * norms[1])
        total = []
        for rows, number in ((harmful, 0), (benign, 1)):
            gradient, other = gradients[number], gradients[1 - number]
            shift = self.eps / norms[1 - number] * other - self.eps * float(cosine) / norms[number] * gradient
            with same_dropout(), stage.shifted(shift.values):
                total.append(1 / (self.eps * norms[number]) * (stage.gradient(rows) - gradient))
        return Gradient(cosine, (total[0] + total[1]).values)
