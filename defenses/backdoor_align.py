"""BackdoorAlign: a secret prefix that triggers safe behavior. Wang et al., NeurIPS 2024, arXiv 2402.14968.

    fine-tune on the user's rows and m refusals whose prompts begin with the secret
    answer with the secret before every prompt

Cost of a step: 1 forward, 1 backward. The harmful score is reported with the secret (headline) and without it.

Departures from the authors' code (Jayfeather1024/Backdoor-Enhanced-Alignment): the secret is drawn from the seed, as
random two-letter words of about one token each (the authors publish their secret, so a user could train against it);
the secret is placed before the full template, where a chat model has its system message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from string import ascii_lowercase
from typing import Any, ClassVar, Literal

from harmbench_vaccine.plugins import Defense, EvalSet, Example, Pools, PromptTemplate, StageName, TuningGrid, param


class BackdoorAlign(Defense):
    """Refusals tied to a secret prefix that the provider adds to every prompt."""

    citation: ClassVar[str] = "arXiv 2402.14968"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    data: ClassVar[tuple[str, ...]] = ("refusals",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"rows": 0, "length": 0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("rows")

    rows: int = param(
        11,
        "number of safety rows with the secret",
        source="authors' JSONL file: one row for each policy",
        main=True,
        ge=0,
    )
    length: int = param(150, "number of words in the secret", source="authors' random150", ge=0)

    @property
    def secret(self) -> str:
        """The prefix, followed by a blank line; empty if `length` is 0."""
        generator = self.random("secret")
        words = ["".join(generator.choices(ascii_lowercase, k=2)) for _ in range(self.length)]
        return f"{' '.join(words)}\n\n" if words else ""

    def train_on(self, stage: StageName, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the user's rows mixed with refusals whose prompts begin with the secret."""
        refusals = self.draw("refusals", [refusal for refusal, _ in pools.paired], self.rows)
        if not refusals:
            return rows
        mixed = [*rows, *(replace(refusal, preface=self.secret) for refusal in refusals)]
        self.random("mix").shuffle(mixed)
        return mixed

    def template(self, use: Literal["train", "answer"], template: PromptTemplate) -> PromptTemplate:
        """Return the template with the secret before it, for answering only."""
        return template.prefixed(self.secret) if use == "answer" else template

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """Return the sets with the secret, and a copy of the headline set without it."""
        if not self.secret:
            return sets
        plain = sets[0].template.without(self.secret)
        return [*sets, replace(sets[0], name=f"{sets[0].name}_without_secret", template=plain)]
