"""T-Vaccine: Vaccine on the layers that matter. Liu et al., arXiv 2410.09760.

With g_l as in Vaccine and p_l the share of ||dL(w; B_h)/dh_l|| in the sum over layers, taken anew every `refresh` steps
on harmful rows; every `interval` steps gamma layers S are drawn without replacement by the weights p:

    eps_l = rho * g_l / (||(g_l : l in S)|| + 1e-7),  l in S          one norm over S only
    w_S  <- w_S - lr * grad L(w; B_a) with h_l + eps_l in place of h_l; the parameters of other layers stay frozen

Cost a step: 2 forward, 2 backward, which stop at the lowest layer of S. gamma = all layers is Vaccine.

Departures from the authors' code: it freezes the attention of the other layers but trains their MLP's adapter; here the
whole layer is frozen, as the paper has it. Its importance comes from a single harmful row; here from a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class TVaccine(Defense):
    """Aligns a few layers at a time under the worst-case shift of their hidden embeddings."""

    citation: ClassVar[str] = "arXiv 2410.09760"
    cost: ClassVar[str] = "2F 2B"
    once: ClassVar[str] = "1F 1B every `refresh` steps"
    memory: ClassVar[str] = "less than SFT: frozen layers keep no optimizer step"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0, "gamma": 1000}

    rho: float = param(
        3.0, "radius of the shift over the chosen layers (L2)", source="authors' README", main=True, ge=0
    )
    gamma: int = param(8, "layers drawn at a time, at most all", source="authors' script", ge=1)
    interval: int = param(20, "steps between two draws", source="authors' script", ge=1)
    refresh: int = param(200, "steps between two looks at the importance", source="authors' script", ge=1)

    _importance: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))
    _chosen: list[int] = PrivateAttr(default_factory=list)

    def before_step(self, stage: TrainingStage) -> None:
        """Looks at the importance, draws the layers, freezes the others, each when it is time."""
        if (stage.step - 1) % self.refresh == 0:
            with stage.isolated("importance"):
                self._importance = self.importance(stage)
        if (stage.step - 1) % self.interval == 0:
            count = min(self.gamma, len(self._importance))
            drawn = torch.multinomial(self._importance, count, generator=stage.generator("layers"))
            self._chosen = sorted(drawn.tolist())
        free = {stage.taps.layers[block] for block in self._chosen}
        for parameter, layer in zip(stage.trainable.values(), stage.layers, strict=True):
            parameter.requires_grad_(layer is None or layer in free)

    @staticmethod
    def importance(stage: TrainingStage) -> Tensor:
        """p: the share of each layer in the gradient norms of the harmful loss (one number a layer, on the CPU)."""
        harmful = stage.stream("harmful", stage.pools.harmful)
        mask = harmful["attention_mask"].unsqueeze(-1)
        with stage.taps.probed() as probes:
            gradients = torch.autograd.grad(stage.loss(harmful), probes)
        norms = torch.stack([stage.norm([gradient * mask]) for gradient in gradients]).cpu()
        return norms / norms.sum()

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """The gradient at the perturbed embeddings of the chosen layers."""
        mask = batch["attention_mask"].unsqueeze(-1)
        with same_dropout(), stage.taps.probed() as probes:  # the next pass draws the same dropout masks
            loss = stage.loss(batch)
            gradients = [g * mask for g in torch.autograd.grad(loss, [probes[layer] for layer in self._chosen])]
        scale = self.rho / (stage.norm(gradients) + 1e-7)
        shifts = {layer: scale * gradient for layer, gradient in zip(self._chosen, gradients, strict=True)}

        def shift(layer: int, output: Tensor) -> Tensor | None:
            return output + shifts[layer].to(output.dtype) if layer in shifts else None

        with stage.taps.changed(shift):
            return stage.gradient(batch)

    def state(self) -> dict[str, Tensor]:
        """The importance and the layers drawn."""
        return {"importance": self._importance, "chosen": torch.tensor(self._chosen)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
        self._importance, self._chosen = state["importance"].cpu(), state["chosen"].tolist()
