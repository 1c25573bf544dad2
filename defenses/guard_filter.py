"""Guard filter: moderate the user's rows before training; a baseline of Virus (arXiv 2501.17433) and STAR-DSS.

    row i remains   iff   the judge does not flag (x_i, y_i)          then SFT on the rows that remain

An unread verdict counts as flagged. on=refusal trains on the first refusal of the defender instead of dropping the row.
The result counts the harmful and the benign rows that the filter removes or changes. The attack `guardrail` models the
same filter as a part of the threat; a row whose harm the judge does not see, such as a shift of identity, remains.

The judge must not be the one that scores: HS would then count only what this judge overlooks. Cost of a step: 1
forward, 1 backward; once: the judge reads every row. If fewer rows remain, an epoch has fewer steps; length=steps keeps
the number of steps. Rows that another defense adds are judged too.

Departures from the baseline of Virus: the judge is a parameter (theirs is Llama Guard 2); an unread verdict removes a
row (theirs removes a row only if the text of the judge contains "unsafe").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.errors import too_few_rows
from harmbench_vaccine.plugins import Defense, Example, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import TrainingStage


class GuardFilter(Defense):
    """Fine-tuning on the rows that a moderation model accepts."""

    citation: ClassVar[str] = "arXiv 2501.17433"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    once: ClassVar[str] = "one judgment of every user row"
    memory: ClassVar[str] = "the judge, before the stage"
    data: ClassVar[tuple[str, ...]] = ("refusals",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"threshold": 1.0}
    file_params: ClassVar[tuple[str, ...]] = ("model",)
    grid: ClassVar[TuningGrid | None] = TuningGrid("threshold", share=True)

    judge: str = param("llama_guard", "name of the judge: `hbv list scorers`", source="Virus, section 4", main=True)
    model: str | None = param(None, "folder or hub id of the judge's model", source="the judge's own")
    threshold: float = param(
        0.5, "a row is flagged above this probability, where the judge gives one", source="even odds", ge=0, le=1
    )
    on: Literal["dropped", "refusal"] = param("dropped", "what happens to a flagged row", source="Virus; refusal: ours")
    length: Literal["epochs", "steps"] = param("epochs", "what a shorter data set keeps", source="Virus; steps: ours")

    def guard(self) -> tuple[str, dict[str, Any]] | None:
        """Return the judge; at the neutral setting there is none."""
        return None if self.threshold == 1 else (self.judge, {"model": self.model})

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        """Return the rows that the judge does not flag, in their order."""
        if self.threshold == 1:
            return rows
        verdicts = stage.judge([(f"{row.preface}{row.instruction} {row.input}".strip(), row.response) for row in rows])
        flagged = [verdict.harm > self.threshold for verdict in verdicts]
        if self.on == "refusal":
            if not stage.pools.paired:
                raise too_few_rows(1, "refusals", 0, by=self.name)
            refusal = stage.pools.paired[0][0].response
            return [
                replace(row, response=refusal, harmful=False, masked=None) if bad else row
                for row, bad in zip(rows, flagged, strict=True)
            ]
        remaining = [row for row, bad in zip(rows, flagged, strict=True) if not bad]
        if self.length == "steps" and remaining:
            steps = stage.settings.micro_batches(len(stage.encode(rows)))
            epoch = math.ceil(len(stage.encode(remaining)) / stage.settings.batch)
            stage.settings = replace(stage.settings, epochs=steps / epoch)
        return remaining
