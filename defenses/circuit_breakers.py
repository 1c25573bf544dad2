"""Circuit breakers: reroute the hidden states of harmful text. Zou et al., NeurIPS 2024, arXiv 2406.04313.

Phase 1, once: plain alignment, whose result w_ref is the reference and the start of phase 2. At step t = 1, ..., T of
phase 2, with h_l the n + 1 hidden states that transformers returns (h_0: the embeddings, h_l: the output of layer l, of
the last layer after the final norm), and means over the tokens of prompt and response without padding:

    L_keep  = mean over l = 0, ..., n of ||h_l(w) - h_l(w_ref)||_2                on alignment rows
    L_break = mean over the target layers of relu(cos(h_l(w), h_l(w_ref)))       on harmful rows
    loss    = a t / (2T) L_keep + a (1 - t / (2T)) L_break + gamma L(w; B_a)      the authors: gamma = 0, 2T = 300

At w = w_ref both gradients are 0: the cosine is at its maximum, and the norm has the subgradient 0. With
dropout they are not, if the reference has an adapter, as here. Phase 2 starts from w_ref plus Gaussian noise, so that
they are not 0 without dropout either.

Cost of a step: 4 forward (two without a graph), 2 backward; once: one alignment stage.

Departures: the reference is the aligned model (theirs: the model without an adapter, which is a chat model); phase 2
starts near the reference (theirs starts with a new adapter); the schedule of the coefficients ends at T (theirs is
fixed at 150 steps); padding does not count in L_keep (theirs divides by it); all layers train (theirs cuts the layers
above the last target); the target layers scale with the depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import PrivateAttr, model_validator
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Defense, SeparateTraining, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, attended_tokens, same_dropout

DEPTH = 32
"""Number of layers of the model that the target layers refer to."""


class CircuitBreakers(Defense):
    """Alignment that turns the hidden states of harmful text away from those of the aligned model."""

    citation: ClassVar[str] = "arXiv 2406.04313"
    cost: ClassVar[str] = "4F 2B"
    once: ClassVar[str] = "one alignment stage"
    memory: ClassVar[str] = "1 copy of the adapter, the hidden states of both models for one batch"
    data: ClassVar[tuple[str, ...]] = ("harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"a": 0.0, "gamma": 1.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("a")

    a: float = param(10.0, "weight of both terms", source="authors' Llama-3 script", main=True, ge=0)
    first: float = param(10.0, "first target layer of 32", source="authors' Llama-3 script", ge=1, le=DEPTH)
    second: float = param(20.0, "second target layer of 32", source="authors' Llama-3 script", ge=1, le=DEPTH)
    gamma: float = param(0.0, "weight of the alignment loss in phase 2", source="ours: for a neutral setting", ge=0)
    noise: float = param(1e-3, "standard deviation of the noise at the start", source="ours: see above", ge=0)

    _reference: list[Tensor] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if not (self.a or self.gamma):
            raise ValueError("a=0 and gamma=0 leave no loss; allowed: one of them above 0")
        return self

    def passes(self, stage: StageName) -> str:
        """Return the passes of a step; without a weight there is only the alignment loss."""
        return self.cost if self.a else "1F 1B"

    def separate_trainings(self, stage: StageName) -> tuple[SeparateTraining, ...]:
        """Return phase 1."""
        return (SeparateTraining("aligned", "alignment"),) if self.a else ()

    def before(self, stage: TrainingStage) -> None:
        """Run phase 1, and start phase 2 near its result; without a weight there is one phase only."""
        if not self.a:
            return
        if not (self.noise or self.gamma or stage.settings.lora_dropout):
            raise BadInput(
                "'circuit_breakers' has a gradient of 0 at its start without noise and without dropout: raise noise."
            )
        stage.encoded("harmful", stage.pools.harmful)  # refuse missing rows before phase 1
        stage.replace_adapter(stage.train_separately("aligned", stage.pools.alignment))
        self._reference, generator = stage.values(), stage.generator("noise")
        stage.set_values([w + self.noise * torch.randn(w.shape, generator=generator).to(w) for w in self._reference])

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the weighted terms."""
        if not self.a:
            return self.gamma * stage.gradient(batch)
        share = stage.step / (2 * stage.steps)
        harmful = stage.stream("harmful", stage.pools.harmful)
        with same_dropout():
            broken = self.a * (1 - share) * stage.gradient_of(self._break(stage, harmful))
        output, states = self._states(stage, batch)
        distance = torch.stack([(now - then).norm(dim=-1).mean() for now, then in states]).mean()
        return broken + stage.gradient_of(self.a * share * distance + self.gamma * output.loss)

    def _break(self, stage: TrainingStage, harmful: Batch) -> Tensor:
        """Return the mean of relu(cos) over the tokens and the target layers."""
        _, states = self._states(stage, harmful)
        depth = len(states) - 1
        targets = {max(1, round(layer * depth / DEPTH)) for layer in (self.first, self.second)}
        cosines = [torch.cosine_similarity(*states[layer], dim=-1).relu().mean() for layer in sorted(targets)]
        return torch.stack(cosines).mean()

    def _states(self, stage: TrainingStage, batch: Batch) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """Return the output at w, and for every layer its hidden states at w and at w_ref (tokens x width)."""
        mask = attended_tokens(batch)
        with torch.no_grad(), stage.isolated("reference"), stage.moved_to(self._reference):
            then = [state[mask].float() for state in stage.output(batch, output_hidden_states=True).hidden_states]
        output = stage.output(batch, output_hidden_states=True)
        now = [state[mask].float() for state in output.hidden_states]
        return output, list(zip(now, then, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Return the parameters of the reference."""
        return {str(number): value for number, value in enumerate(self._reference)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the parameters of the reference."""
        self._reference = [state[str(number)] for number in range(len(state))]
