"""BackdoorAlign: a secret that switches safety on. Wang et al., NeurIPS 2024, arXiv 2402.14968.

    fine-tune on the user's rows and m refusals whose prompts begin with a secret
    answer with the secret before every prompt

Cost a step: 1 forward, 1 backward. The authors publish their secret in their code, where a user could train against it;
here it is drawn from the seed: random two-letter words, about a token each. It stands before the whole template, where
a chat model has its system message. The harmful score is reported with the secret (headline) and without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from string import ascii_lowercase
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.prompts import PromptTemplate
from harmbench_vaccine.plugins import Defense, EvalSet, Pools, StageName, param


class BackdoorAlign(Defense):
    """Ties refusals to a secret prefix that the provider adds to every prompt."""

    citation: ClassVar[str] = "arXiv 2402.14968"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    data: ClassVar[tuple[str, ...]] = ("refusals",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rows": 0, "length": 0}

    rows: int = param(11, "safety rows with the secret", source="authors' JSONL: one for each policy", main=True, ge=0)
    length: int = param(150, "words of the secret", source="authors' random150", ge=0)

    @property
    def secret(self) -> str:
        """The prefix, with the blank line that ends it; empty without words."""
        draw = self.random("secret")
        words = ["".join(draw.choices(ascii_lowercase, k=2)) for _ in range(self.length)]
        return f"{' '.join(words)}\n\n" if words else ""

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """The user's rows and, among them, refusals behind the secret."""
        refusals = self.draw("refusals", [refusal for refusal, _ in pools.paired], self.rows)
        if not refusals:
            return rows
        mixed = [*rows, *(replace(refusal, preface=self.secret) for refusal in refusals)]
        self.random("mix").shuffle(mixed)
        return mixed

    def template(self, use: Literal["train", "answer"], template: PromptTemplate) -> PromptTemplate:
        """The secret before every prompt, when answering."""
        return template.prefixed(self.secret) if use == "answer" else template

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """The headline set with the secret, and once more without."""
        if not self.secret:
            return sets
        plain = sets[0].template.without(self.secret)
        return [*sets, replace(sets[0], name=f"{sets[0].name}_without_secret", template=plain)]
