"""T-Vaccine: Vaccine on the most important layers. Liu et al., arXiv 2410.09760.

With g_l as in Vaccine and p_l the share of layer l in the sum of ||dL(w; B_h)/dh_l|| over layers, computed every
`refresh` steps on harmful rows. Every `interval` steps a set S of gamma layers is drawn without replacement with the
weights p:

    eps_l = rho * g_l / (||(g_l : l in S)|| + 1e-7),  l in S          one norm over S only
    w_S  <- w_S - lr * grad L(w; B_a) with h_l replaced by h_l + eps_l; the parameters of other layers are frozen

Cost of a step: 2 forward, 2 backward, which stop at the lowest layer of S. gamma = all layers is Vaccine.

Departures from the authors' code (Lslland/T-Vaccine): the full layer is frozen, as in the paper (theirs freezes the
attention of the other layers but trains the adapters of their MLPs); the importance is computed on a micro-batch
(theirs uses one harmful row).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.plugins import Defense, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class TVaccine(Defense):
    """Alignment of a few layers at a time under the worst-case shift of their hidden embeddings."""

    citation: ClassVar[str] = "arXiv 2410.09760"
    cost: ClassVar[str] = "2F 2B"
    once: ClassVar[str] = "1F 1B every `refresh` steps"
    memory: ClassVar[str] = "less than SFT: frozen layers take no optimizer step"
    ranks: ClassVar[bool] = True
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0, "gamma": 1000}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rho")

    rho: float = param(
        3.0, "radius: the L2 norm of the shift over the sampled layers", source="authors' README", main=True, ge=0
    )
    gamma: int = param(8, "number of layers to sample, at most all", source="authors' script", ge=1)
    interval: int = param(20, "steps between two samples of layers", source="authors' script", ge=1)
    refresh: int = param(200, "steps between two updates of the importance", source="authors' script", ge=1)

    _importance: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))
    _chosen: list[int] = PrivateAttr(default_factory=list)

    def before_step(self, stage: TrainingStage) -> None:
        """Update the importance and sample the layers when due; freeze the parameters of the other layers."""
        if (stage.step - 1) % self.refresh == 0:
            with stage.isolated("importance"):
                self._importance = self.importance(stage)
        if (stage.step - 1) % self.interval == 0:
            count = min(self.gamma, len(self._importance))
            sample = torch.multinomial(self._importance, count, generator=stage.generator("layers"))
            self._chosen = sorted(sample.tolist())
        trained_layers = {stage.taps.layers[block] for block in self._chosen}
        for parameter, layer in zip(stage.trainable.values(), stage.layers, strict=True):
            parameter.requires_grad_(layer is None or layer in trained_layers)

    @staticmethod
    def importance(stage: TrainingStage) -> Tensor:
        """Compute p, the share of each layer in the gradient norms of the harmful loss.

        Returns:
            One number for each layer, on the CPU; they sum to 1.
        """
        harmful = stage.stream("harmful", stage.pools.harmful)
        mask = harmful["attention_mask"].unsqueeze(-1)
        with stage.taps.probed() as probes:
            gradients = torch.autograd.grad(stage.loss(harmful), probes)
        norms = torch.stack([stage.norm([gradient * mask]) for gradient in gradients]).cpu()
        return norms / norms.sum()

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient at the perturbed embeddings of the sampled layers."""
        mask = batch["attention_mask"].unsqueeze(-1)
        with same_dropout(), stage.taps.probed() as probes:
            loss = stage.loss(batch)
            gradients = [g * mask for g in torch.autograd.grad(loss, [probes[layer] for layer in self._chosen])]
        scale = self.rho / (stage.norm(gradients) + 1e-7)
        shifts = {layer: gradient.mul_(scale) for layer, gradient in zip(self._chosen, gradients, strict=True)}

        def shift(layer: int, output: Tensor) -> Tensor | None:
            return output + shifts[layer].to(output.dtype) if layer in shifts else None

        with stage.taps.changed(shift):
            return stage.gradient(batch)

    def state(self) -> dict[str, Tensor]:
        """Return the importance and the sampled layers."""
        return {"importance": self._importance, "chosen": torch.tensor(self._chosen)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the importance and the sampled layers."""
        self._importance, self._chosen = state["importance"].cpu(), state["chosen"].tolist()
