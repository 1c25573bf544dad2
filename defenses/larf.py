"""LARF: drop the rows whose hidden states resemble unsafe ones. Li et al., arXiv 2507.18631.

With h the output of one layer at the last token of a complete row, at the aligned model, and u_j and s_j the unsafe and
the safe row of the defender's pair j:

    score_i = mean of the m largest values, over j, of cos(h_i, h_(u_j)) - cos(h_i, h_(s_j))
    the `share` of the user's rows with the largest scores is dropped, then SFT

No judge. Rows that another defense adds count as rows of the user. Cost of a step: 1 forward, 1 backward; once:
1 forward over every user row and over the pairs.

Departures from the authors' code (LLLeoLi/LARF): the layer is a parameter (theirs finds the most sensitive one of each
model by scaling the parameters of layers); a share of the user's rows is dropped (theirs drops 1000 rows of Alpaca's
52,002).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harmbench_vaccine.core.errors import too_few_rows
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.plugins import Defense, Example, StageName, TuningGrid, param
from harmbench_vaccine.training.stage import TrainingStage

DEPTH = 32
"""Number of layers of the model that the parameter `layer` refers to."""


class LARF(Defense):
    """Fine-tuning without the rows that resemble unsafe ones inside the model."""

    citation: ClassVar[str] = "arXiv 2507.18631"
    stages: ClassVar[tuple[StageName, ...]] = ("finetune",)
    once: ClassVar[str] = "1F over every user row and over the pairs"
    data: ClassVar[tuple[str, ...]] = ("paired safe and harmful rows",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"share": 0.0}
    grid: ClassVar[TuningGrid | None] = TuningGrid("share", share=True)

    share: float = param(0.1, "share of the user's rows to drop", source="ours", main=True, ge=0, le=1)
    layer: float = param(
        14.0, "layer of 32 whose output is compared", source="authors' get_bi_rep_llama.py", ge=1, le=DEPTH
    )
    nearest: int = param(100, "m, number of the nearest pairs", source="authors' get_bi_rep_llama.py", ge=1)

    def select(self, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        """Return the rows without those of the largest scores, in their order."""
        encoded = stage.encode(rows) if self.share else []
        count = round(self.share * len(encoded))
        if not count:
            return rows
        if not stage.pools.paired:
            raise too_few_rows(1, "pairs", 0, by=self.name)
        safe, unsafe = (self._states(stage, stage.encode(side)) for side in zip(*stage.pools.paired, strict=True))
        states = self._states(stage, encoded)
        differences = states @ (unsafe - safe).T
        scores = differences.topk(min(self.nearest, differences.shape[1]), dim=1).values.mean(1)
        dropped = {encoded[number].id for number in scores.topk(count).indices.tolist()}
        return [row for row in rows if row.id not in dropped]

    def _states(self, stage: TrainingStage, rows: Sequence[Encoded]) -> Tensor:
        """Return the output of the layer at the last token of each row, divided by its norm (rows x width)."""
        taps, states = stage.taps_on("layer"), []
        number = max(1, round(self.layer * len(taps.blocks) / DEPTH)) - 1
        for start in range(0, len(rows), stage.settings.batch):
            batch = stage.collated(rows[start : start + stage.settings.batch])
            with torch.no_grad(), taps.recorded() as outputs:
                stage.output(batch)
            last = batch["attention_mask"].sum(1) - 1
            states.append(outputs[number].float()[torch.arange(len(last)), last])
        return nn.functional.normalize(torch.cat(states), dim=1)
