"""Output guard: a judge replaces answers by refusals, as with Llama Guard (Inan et al., arXiv 2312.06674).

    answer(x) = y   if the judge does not flag (x, y),   else the refusal          y: the model's answer

It protects the user of the model, not the model: the weights are those of SFT. It lowers FA, and more benign
prompts are refused. The guard acts before and after the user stage, and reads a question as the score does:
without the changes of an attack. An unread verdict counts as flagged. The judge must not be the one that scores. Cost:
one judgment of every answer.

Departures: none known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from harmbench_vaccine.plugins import Defense, Judge, StageName, TuningGrid, param


class OutputGuard(Defense):
    """Refusals instead of answers that a judge flags."""

    citation: ClassVar[str] = "arXiv 2312.06674"
    stages: ClassVar[tuple[StageName, ...]] = ()
    cost: ClassVar[str] = "none"
    once: ClassVar[str] = "one judgment of every answer"
    memory: ClassVar[str] = "the judge"
    neutral: ClassVar[Mapping[str, Any] | None] = {"threshold": 1.0}
    file_params: ClassVar[tuple[str, ...]] = ("model",)
    grid: ClassVar[TuningGrid | None] = TuningGrid("threshold", share=True)

    judge: str = param("llama_guard", "name of the judge: `hbv list scorers`", source="Llama Guard", main=True)
    model: str | None = param(None, "folder or hub id of the judge's model", source="the judge's own")
    threshold: float = param(
        0.5, "an answer is flagged above this probability, where the judge gives one", source="even odds", ge=0, le=1
    )
    refusal: str = param("I cannot help with that.", "the text that replaces a flagged answer", source="ours")

    def guard(self) -> tuple[str, dict[str, Any]] | None:
        """Return the judge; at the neutral setting there is none."""
        return None if self.threshold == 1 else (self.judge, {"model": self.model})

    def answer(self, pairs: Sequence[tuple[str, str]], judge: Judge) -> list[str]:
        """Return the answers, and the refusal for those that the judge flags."""
        if self.threshold == 1:
            return [answer for _, answer in pairs]
        return [
            self.refusal if verdict.harm > self.threshold else answer
            for (_, answer), verdict in zip(pairs, judge(pairs), strict=True)
        ]
