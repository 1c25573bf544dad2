"""SPPFT: freeze the safety layers during fine-tuning. Li et al., ICLR 2025, arXiv 2408.17003.

    w_S stays, the other parameters: SFT          S: the layers l of n with above < 32 l / n < below

Layers are counted from 0. In a layer of S the user's adapter stays zero (double topology) or keeps its aligned values
(single). The bounds are those of a model of 32 layers and scale with the depth; with the default values, a model of 1
or 2 layers has no safety layer.

Cost of a step: 1 forward, 1 backward, without the gradients of the frozen parameters. These have no gradient at all, so
that momentum and weight decay do not change them either.

Departures: the safety layers are parameters (the paper finds them for each model by comparing hidden states of benign
and harmful prompts); full fine-tuning also freezes the norms of a layer (SPPFT.py, as others report, freezes its
attention and its MLP).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.taps import decoder_layers

DEPTH = 32
"""Number of layers of the model that the bounds refer to."""


class SPPFT(Defense):
    """Fine-tuning with frozen middle layers."""

    citation: ClassVar[str] = "arXiv 2408.17003"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    memory: ClassVar[str] = "less than SFT: frozen layers take no optimizer step"
    ranks: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any] | None] = {"below": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("below", step=1.25)

    above: float = param(
        4.0, "frozen layers are above this layer of 32", source="reported for SPPFT.py, not read", ge=-1, le=DEPTH
    )
    below: float = param(
        15.0,
        "frozen layers are below this layer of 32",
        source="reported for SPPFT.py, not read",
        main=True,
        ge=0,
        le=DEPTH,
    )

    def before_step(self, stage: TrainingStage) -> None:
        """Freeze the parameters of the safety layers: they have no gradient, and the optimizer skips them."""
        depth = len(decoder_layers(stage.model))
        for parameter, layer in zip(stage.trainable.values(), stage.layers, strict=True):
            if layer is not None and self.above < DEPTH * layer / depth < self.below:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in stage.trainable.values()):
            raise BadInput(
                f"sppft freezes every trained parameter of this model with {depth} layers: increase `above`, or "
                "decrease `below`."
            )
