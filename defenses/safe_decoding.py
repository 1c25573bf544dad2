"""SafeDecoding: mix with an aligned expert while the first tokens are generated. Xu et al., ACL 2024, arXiv 2402.08983.

For each of the first m tokens of an answer, with p the next-token probabilities of the model that answers, p_e those of
the expert, and V^k the k most likely tokens of a model:

    V = V^k & V_e^k,  the smallest k for which V has at least c tokens
    next token = argmax over V of p + alpha (p_e - p)

The rest of the answer is written by the model alone, so any backend generates it: transformers computes the mixed
tokens, and vLLM continues them. The expert is the aligned model before the user stage; it costs no training here. The
defense acts before and after the user stage; before it, the expert is the model itself. A user who has the weights can
leave the defense out.

Cost: 2 m forward passes of every prompt.

Departures: the expert is the aligned model (theirs: a LoRA trained on the model's answers that refuse); decoding is
greedy, so that the sum is not normalized; a token of V with a negative sum stays (theirs: floored at 1e-8); of tokens
with the same probability, the smaller id is first (theirs: an order that sorting leaves open).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmbench_vaccine.inference.answer_models import AnswerModels
from harmbench_vaccine.plugins import Defense, StageName, TuningGrid, param

TEXTS = 64
"""Texts whose vocabularies are sorted at a time, which takes eight times the memory of their probabilities."""


class SafeDecoding(Defense):
    """Answers whose first tokens an aligned expert makes safer."""

    citation: ClassVar[str] = "arXiv 2402.08983"
    stages: ClassVar[tuple[StageName, ...]] = ()
    needs_alignment: ClassVar[bool] = True
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "2F for each of the first m tokens of every answer"
    memory: ClassVar[str] = "none: both models share the base"
    neutral: ClassVar[Mapping[str, Any] | None] = {"first": 0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("alpha")

    alpha: float = param(3.0, "weight of the expert", source="paper, section 5.1", main=True, ge=0)
    first: int = param(2, "m, number of tokens that are mixed", source="paper, section 5.1", ge=0)
    common: int = param(5, "c, least number of common tokens", source="paper, section 5.1", ge=1)

    def first_tokens(self, models: AnswerModels, prompts: list[list[int]]) -> list[list[int]]:
        """Return the mixed tokens of each answer; an answer that ends has fewer."""
        tokens: list[list[int]] = [[] for _ in prompts]
        for _ in range(self.first):
            rows = [row for row in range(len(prompts)) if not set(tokens[row]) & set(models.ends)]
            texts = [[*prompts[row], *tokens[row]] for row in rows]
            if not texts:
                break
            model, expert = models.probabilities("answering", texts), models.probabilities("aligned", texts)
            parts = zip(model.split(TEXTS), expert.split(TEXTS), strict=True)
            chosen = [token for part in parts for token in self._mixed(*part)]
            for row, token in zip(rows, chosen, strict=True):
                tokens[row].append(token)
        return tokens

    def _mixed(self, model: Tensor, expert: Tensor) -> list[int]:
        scores = model + self.alpha * (expert - model)
        best = scores.where(common_tokens(model, expert, self.common), -torch.inf).argmax(1)
        return [int(token) for token in best]


def common_tokens(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Return which tokens are among the k most likely ones of both models, for the smallest k that gives `count`.

    Args:
        first: Probabilities of one model (texts x vocabulary).
        second: Those of the other model.
        count: Least number of common tokens; a smaller vocabulary is returned whole.
    """
    ranks = [rows.argsort(dim=1, descending=True, stable=True).argsort(dim=1) for rows in (first, second)]
    worse = torch.maximum(*ranks)  # a token is common from k = worse + 1 on
    return worse <= worse.sort(1).values[:, min(count, worse.shape[1]) - 1 :][:, :1]
