"""RepNoise: push harmful representations toward noise. Rosati et al., NeurIPS 2024, arXiv 2405.14577, algorithm 1.

With (B_s, B_h) the same prompts answered safely and harmfully, m the response tokens at which the two differ, a_l the
output of the MLP of layer l on B_h, z_l ~ N(0, 1), h_k the hidden states of B_h (k = 0 the embeddings, n the last):

    N = mean_l MMD^2(m a_l, m z_l)                  every flattened row is a sample; Gaussian kernels of 5 widths
    A = mean_k CE(head(norm(h_k)); B_h at m)
    w <- w - lr * grad [L(w; B_a) + beta * N - alpha * log(1 + A)]

Cost of a step: 2 forward, 2 backward (one joint backward through both), and n + 1 products with the LM head.

The paper's main text swaps alpha and beta. This file uses the form of the algorithm and of the code, for which
alpha = 1 (ascent) and beta = 0.001 (noise) are the defaults.

Departures from the authors' code (domenicrosati/representation-noising): the alignment loss is over the protocol's
response labels, so that alpha = beta = 0 is SFT; the last hidden state is normalized once and counted once; the first
differing token has a gradient; token id 0 counts as an ordinary token; padding is never trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmbench_vaccine.plugins import Defense, TuningGrid, param
from harmbench_vaccine.training.layer_losses import differing, layerwise_loss
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, same_dropout


class RepNoise(Defense):
    """Alignment that removes information about harmful answers from the hidden states."""

    citation: ClassVar[str] = "arXiv 2405.14577"
    cost: ClassVar[str] = "2F 2B"
    memory: ClassVar[str] = "n + 1 logits of the harmful tokens, MLP outputs of every layer"
    data: ClassVar[tuple[str, ...]] = ("paired safe and harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "beta": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("alpha")

    alpha: float = param(1.0, "weight of the ascent on the harmful loss", source="paper, algorithm 1", main=True, ge=0)
    beta: float = param(0.001, "weight of the distance to noise", source="paper, algorithm 1", ge=0)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the three terms."""
        safe, harmful = stage.paired_stream("pairs", stage.pools.paired)
        mask = differing(safe, harmful)
        if not mask.any():  # no token for the ascent or the noise
            return stage.gradient(batch)
        with same_dropout():
            penalty = self._penalty(stage, harmful, mask)
        return stage.gradient(batch) + penalty

    def _penalty(self, stage: TrainingStage, harmful: Batch, mask: Tensor) -> Gradient:
        """Return the gradient of ascent and noise; the activations are freed before the pass on safe rows."""
        with stage.taps_on("mlp").recorded() as mlp_outputs:
            output = stage.output(harmful, output_hidden_states=True)
        ascent = layerwise_loss(stage, output, harmful, mask)
        generator = stage.generator("noise")
        noise = torch.stack([self._distance(mlp_output, mask, generator) for mlp_output in mlp_outputs]).mean()
        return stage.gradient_of(self.beta * noise - self.alpha * torch.log1p(ascent))

    @staticmethod
    def _distance(output: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return mmd2(*((sample.float() * mask.unsqueeze(-1)).flatten(1) for sample in (output, noise)))


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Compute the squared maximum mean discrepancy of two samples, as a biased V-statistic.

    The kernel is the sum of 5 Gaussian kernels around the mean squared distance, which is treated as a constant.

    Args:
        x: The first sample (n rows x width).
        y: The second sample (n rows x width).

    Returns:
        A scalar with a graph.
    """
    n = len(x)
    both = torch.cat([x, y])
    both = both - both.detach().mean(0)  # shorter vectors, for the precision of the next line
    squares = both.square().sum(1)
    distances = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * both @ both.T).clamp(min=0)
    width = distances.detach().sum() / (4 * n * n - 2 * n) / 4
    kernel = torch.stack([torch.exp(-distances / (width * 2**power)) for power in range(5)]).sum(0)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean()
