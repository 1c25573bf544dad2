"""Refusal steering: add the refusal direction while the model answers. Arditi et al., NeurIPS 2024, arXiv 2406.11717.

With h_l(x) the output of decoder layer l at the last token of a prompt, of the aligned model:

    r = mean over harmful prompts of h_l(x) - mean over benign prompts of h_l(x)
    h_l <- h_l + alpha r                          at every position, of the prompt and of the answer

The paper adds r to show that it makes a model refuse harmless prompts; here it is a defense that needs no training. It
lowers FA, and the model refuses more benign prompts. It acts before and after the user stage. vLLM cannot add
vectors to hidden states: with it, the defense is refused. A user who has the weights can leave it out.

Cost: one forward pass of the prompts, once; an addition for each token.

Departures: the layer is a parameter, the paper's for Llama-2-7B scaled by depth (theirs: chosen on held-out prompts
among layers and positions); prompts are the defender's pairs and benign rows (theirs: the harmful prompts of
AdvBench and others that the model refuses, and the benign ones of Alpaca that it answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmbench_vaccine.core.errors import too_few_rows
from harmbench_vaccine.plugins import Defense, Example, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.taps import decoder_layers

DEPTH = 32
"""Number of layers of the model that the parameter `layer` refers to."""


class RefusalSteering(Defense):
    """Answers with the refusal direction added to the hidden states."""

    citation: ClassVar[str] = "arXiv 2406.11717"
    stages: ClassVar[tuple[StageName, ...]] = ()
    needs_alignment: ClassVar[bool] = True
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "1F over the prompts"
    data: ClassVar[tuple[str, ...]] = ("paired safe and harmful rows", "benign rows")
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("alpha")

    alpha: float = param(1.0, "weight of the direction", source="paper, section 2.4", main=True)
    layer: float = param(14.0, "layer of 32 whose output is changed", source="paper, table 5", ge=1, le=DEPTH)
    prompts: int = param(128, "number of harmful and of benign prompts", source="paper, section 2.3", ge=1)

    def steering(self, stage: TrainingStage) -> dict[int, Tensor]:
        """Return the direction for its layer."""
        pools = stage.pools
        harmful = self.draw("harmful prompts", pools.harmful, min(self.prompts, len(pools.harmful)))
        benign = self.draw("benign prompts", pools.benign, min(self.prompts, len(pools.benign)))
        if not harmful or not benign:
            raise too_few_rows(1, "harmful prompts" if not harmful else "benign prompts", 0, by=self.name)
        layer = max(1, round(self.layer * len(decoder_layers(stage.model)) / DEPTH)) - 1
        direction = self._mean_state(stage, harmful, layer) - self._mean_state(stage, benign, layer)
        return {layer: self.alpha * direction}

    def _mean_state(self, stage: TrainingStage, rows: Sequence[Example], layer: int) -> Tensor:
        """Return the mean output of the layer at the last prompt token (width), float32."""
        encoded, states, taps = stage.encode(rows), [], stage.taps_on("layer")
        for start in range(0, len(encoded), stage.settings.batch):
            part = encoded[start : start + stage.settings.batch]
            with torch.no_grad(), taps.recorded() as outputs:
                stage.output(stage.collated(part))
            states += [outputs[layer][number, row.response_start - 1] for number, row in enumerate(part)]
        return torch.stack(states).double().mean(0).float()
