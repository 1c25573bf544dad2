"""STAR-DSS: shape the loss of each part of an answer by how safe it is. Peng et al., NeurIPS 2025, arXiv 2505.17196.

The answer y of a user row is divided into chunks of `chunk` tokens. With V_k = P(safe | x, y up to the end of chunk k)
by a judge, p_w0 the model before the stage, and t a response token of chunk k:

    loss = mean over t of [V_k CE_t + (1 - V_k) lam KL_t],   KL_t = KL(p_w || p_w0) at t over the vocabulary
    kl=k3:   KL_t = exp(a) - 1 - a,   a = log p_w0(y_t) - log p_w(y_t)          the estimate of another project

A safe token is learned, an unsafe one keeps the distribution of the aligned model. Cost of a step: 2 forward (the
reference without a graph), 1 backward; once: one judgment of every chunk. With `strength` s, V becomes 1 - s (1 - V).

The authors' code was not read; lam and the formula are those of another project (SafeTune). The paper's chunk length is
not verified. V is 1 - the largest probability of a harm category; 0 or 1 for a judge without probabilities, and 0 for
an unread verdict. A judge that reads only the beginning of a long text sees no difference between its last chunks.

Departures from SafeTune: the KL term is over the vocabulary (theirs is the estimate kl=k3 at the token of the row).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.plugins import Defense, Example, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, response_weights, token_losses


class StarDSS(Defense):
    """Fine-tuning on the safe parts of answers, and on the aligned model's distribution elsewhere."""

    citation: ClassVar[str] = "arXiv 2505.17196"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    needs_adapter: ClassVar[bool] = True
    cost: ClassVar[str] = "2F 1B"
    once: ClassVar[str] = "one judgment of every `chunk` tokens of every user row"
    memory: ClassVar[str] = "the reference's logits for one batch; the judge, before the stage"
    neutral: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("lam")
    file_params: ClassVar[tuple[str, ...]] = ("model",)

    lam: float = param(1.0, "weight of the divergence", source="SafeTune", main=True, ge=0)
    chunk: int = param(5, "tokens in a chunk", source="ours: the paper's value is not verified", ge=1)
    kl: Literal["full", "k3"] = param("full", "how the divergence is computed", source="ours; k3: SafeTune")
    strength: float = param(
        1.0, "share of the unsafe part that is shaped", source="ours: for a neutral setting", ge=0, le=1
    )
    judge: str = param("llama_guard", "name of the judge: `hbv list scorers`", source="ours")
    model: str | None = param(None, "folder or hub id of the judge's model", source="the judge's own")

    _safety: dict[str, list[float]] = PrivateAttr(default_factory=dict)

    def guard(self) -> tuple[str, dict[str, Any]] | None:
        """Return the judge; at the neutral setting there is none."""
        return None if not self.strength else (self.judge, {"model": self.model})

    def passes(self, stage: StageName) -> str:
        """Return the passes of a step."""
        return self.cost if self.strength else "1F 1B"

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        """Judge the beginnings of every answer; all rows remain."""
        if not self.strength:
            return rows
        questions = {row.id: f"{row.preface}{row.instruction} {row.input}".strip() for row in rows}
        encoded = stage.encode(rows)
        beginnings = [(row, end) for row in encoded for end in self._ends(row)]
        pairs = [(questions[row.id], stage.decode(beginning(row, end))) for row, end in beginnings]
        for (row, end), verdict in zip(beginnings, stage.judge(pairs), strict=True):
            safety = self._safety.setdefault(row.id, [])
            safety += [1 - self.strength * verdict.harm] * (end - len(safety))
        return rows

    def _ends(self, row: Encoded) -> list[int]:
        """Return the number of response tokens up to the end of each chunk."""
        return [*range(self.chunk, row.response_tokens, self.chunk), row.response_tokens]

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        """Return the gradient of the shaped loss."""
        if not self.strength:
            return stage.gradient(batch)
        rows = [stage.rows[number] for number in batch["rows"].tolist()]
        safety = torch.tensor([v for row in rows for v in self._safety[row.id]], device=stage.device)
        with stage.reference():
            reference = stage.output(batch).logits.float().log_softmax(-1)
        output = stage.output(batch)
        losses = token_losses(output.logits, batch)
        divergence = self._divergence(output.logits.float().log_softmax(-1), reference, losses, batch)
        shaped = safety * losses + (1 - safety) * self.lam * divergence
        shaped = shaped * response_weights(batch)  # those of other defenses
        return stage.gradient_of(shaped.mean())

    def _divergence(self, log_p: Tensor, reference: Tensor, losses: Tensor, batch: Batch) -> Tensor:
        """Return KL_t (response tokens)."""
        if self.kl == "full":
            return (log_p.exp() * (log_p - reference)).sum(-1)
        ratio = losses - token_losses(reference, batch)  # log p_w0(y_t) - log p_w(y_t)
        return torch.expm1(ratio) - ratio


def beginning(row: Encoded, end: int) -> list[int]:
    """Return the tokens of a response up to the `end`-th that has a loss, with the masked ones between them."""
    places = [place for place, label in enumerate(row.labels) if place and label != IGNORED]
    return row.ids[places[0] : places[end - 1] + 1]
