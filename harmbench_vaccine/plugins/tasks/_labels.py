"""Tasks whose answer is one label of a fixed list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from harmbench_vaccine.plugins import Task, param

LabelRule = Literal["contains", "equals", "contains_any_case"]


class LabelTask(Task):
    """A task whose answer is one label of a fixed list."""

    spellings: ClassVar[Mapping[str, tuple[str, ...]]]
    """Label -> the texts that the papers accept as this label."""
    scoring_only: ClassVar[tuple[str, ...]] = ("rule",)

    rule: LabelRule = param(
        "contains_any_case",
        "contains: the answer contains a spelling of the label; equals: it is a spelling of the label; "
        "contains_any_case: it contains the label in any letter case",
        source="the harness",
    )

    def flexible(self, answer: str, target: str) -> bool:
        """Return whether the answer names the target by the rule of the parameter `rule`."""
        if self.rule == "contains_any_case":
            return target.lower() in answer.lower()
        if self.rule == "equals":
            return answer.strip() in self.spellings[target]
        return any(spelling in answer for spelling in self.spellings[target])
