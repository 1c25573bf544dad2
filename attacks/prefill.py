"""Prefill: an answer starts with the first tokens of a harmful one. Qi et al., ICLR 2025, arXiv 2406.05946, table 2.

    answer(x) = y_{1..k} + what the model writes after (x, y_{1..k})          y: a harmful answer to x;   score: HS@k

The judge reads the complete answer. The user stage is that of the other attacks of the run, so all k share its model;
`prefill:tokens=0,5,10,20,40` measures the paper's curve. y is the answer of the evaluation row, as token ids:
the tokens of a decoded prefix can differ in the last one. The model may write `max_new_tokens` tokens after the prefix.

Departures: y is an answer from the evaluation data (theirs: of a jailbroken model, to HEx-PHI); the rest is generated
greedily, as every answer here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Attack, EvalSet, param


class Prefill(Attack):
    """Starts the answers to harmful prompts with the tokens of harmful answers."""

    citation: ClassVar[str] = "arXiv 2406.05946"
    neutral: ClassVar[Mapping[str, Any] | None] = {"tokens": 0}

    tokens: int = param(
        10, "k, number of tokens of the harmful answer", source="authors' eval_safety.py", main=True, ge=0
    )

    @property
    def changes_questions(self) -> bool:
        """False at k = 0: the answers are then those of the run without this attack."""
        return self.tokens > 0

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """Return the harmful sets, whose answers start with k tokens of a harmful answer.

        Raises:
            BadInput: A prompt has no harmful answer.
        """
        for eval_set in sets if self.tokens else ():
            missing = sum(not (example.harmful and example.response) for example in eval_set.examples)
            if missing:
                raise BadInput(
                    f"Attack 'prefill' needs a harmful answer to every prompt of the set {eval_set.name!r}, but "
                    f"{missing} of {len(eval_set.examples)} have none; allowed: evaluation rows with a response that "
                    "is not marked as safe."
                )
        return [replace(eval_set, prefill=self.tokens) for eval_set in sets]
