"""Scorers: judges of harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import PrivateAttr

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import RawJudgment, Verdict

from .base import Plugin

Form = Literal["classifier", "generative", "rule"]


class Scorer(Plugin):
    """A judge of harm. Reading is apart from deciding: what it reads off an answer is kept, so that another threshold
    decides again without running a model.

    A scorer that needs a model has the parameter `model`, a folder or hub id.
    """

    kind: ClassVar[str] = "scorer"
    form: ClassVar[Form] = "classifier"
    """How it comes to a reading."""
    license: ClassVar[str] = ""
    """The licence of the model or of the prompt, where it limits what one may do with a score."""
    unverified: ClassVar[str] = ""
    """What of its interface was not checked against its source; empty: nothing."""
    comparison_only: ClassVar[bool] = False
    """It is there to compare with: its figures are no harmful scores."""
    files: ClassVar[tuple[str, ...]] = ()
    """Parameters that name a file, whose content counts in place of its name."""
    deciding: ClassVar[tuple[str, ...]] = ("threshold",)
    """Parameters that only `decide` looks at."""
    irrelevant_params: ClassVar[tuple[str, ...]] = ("batch",)
    """Parameters that change nothing."""

    _backend: str = PrivateAttr("transformers")

    @property
    def backend(self) -> str:
        """What runs its model: transformers or vllm."""
        return self._backend

    def on(self, backend: str) -> Self:
        """The same object, whose model is run by `backend`."""
        self._backend = backend
        return self

    def check(self) -> None:
        """Raises `BadInput` where its parameters do not fit together, before any work is spent."""

    def read(self, pairs: Sequence[tuple[str, str]], progress: Progress = SILENT) -> list[RawJudgment]:
        """What the judge says of each (question, answer), in their order."""
        raise NotImplementedError

    def decide(self, reading: RawJudgment) -> Verdict:
        """The verdict that follows from a reading: flagged where any probability is above `threshold`."""
        named = reading.probabilities
        if not named or not all(math.isfinite(value) for value in named.values()):
            return Verdict(False, [], {}, reading.cut, unparsed=True)
        raised = [label for label, value in named.items() if value > self.threshold]  # type: ignore[attr-defined]
        return Verdict(bool(raised), raised, named, reading.cut)

    def judge(self, pairs: Sequence[tuple[str, str]], progress: Progress = SILENT) -> list[Verdict]:
        """A verdict for each (question, answer)."""
        return [self.decide(reading) for reading in self.read(pairs, progress)]
