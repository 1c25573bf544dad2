"""Scorers: judges of harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PrivateAttr

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import RawJudgment, Verdict

from .base import Plugin

if TYPE_CHECKING:
    from harmbench_vaccine.inference.model_pool import ModelPool

Form = Literal["classifier", "generative", "rule"]


class Scorer(Plugin):
    """A judge of harm.

    Reading and deciding are two steps. What a judge reads off an answer is stored, so that another threshold decides
    again without running a model. A scorer that needs a model has the parameter `model`, a folder or hub id, and loads
    it through `self.models`.

    Three rules hold for every scorer. An empty answer is judged like any other text. A control token that an answer
    spells is shown to a model with a space inside it (`inference/judge_prompts.py`). A judgment that cannot be read is
    unread (`Verdict.flagged` is None) and counts neither as flagged nor as not flagged.
    """

    kind: ClassVar[str] = "scorer"
    form: ClassVar[Form] = "classifier"
    """How it reads an answer: by a classifier, by generated text, or by a rule without a model."""
    cost: ClassVar[str] = ""
    """Cost of reading one answer, such as "1 forward pass over the question and the answer"."""
    license: ClassVar[str] = ""
    """License of the model or of the prompt, where it limits the use of a score."""
    unverified: ClassVar[str] = ""
    """Parts of its interface that were not compared with their source; empty if all were."""
    comparison_only: ClassVar[bool] = False
    """True if its figures are for comparison and are not harmful scores."""
    decision_params: ClassVar[tuple[str, ...]] = ("threshold",)
    """Parameters that only `decide` uses."""
    irrelevant_params: ClassVar[tuple[str, ...]] = ("batch",)
    """Parameters that change no verdict."""

    _backend: str = PrivateAttr("transformers")

    @property
    def backend(self) -> str:
        """Library that runs its model: transformers or vllm."""
        return self._backend

    def with_models(self, models: ModelPool, backend: str = "transformers") -> Self:
        """Return a copy that loads its model through a pool.

        Args:
            models: The pool.
            backend: Library that runs the model: transformers or vllm.
        """
        copy = super().with_models(models)
        copy._backend = backend
        return copy

    @classmethod
    def required_methods(cls) -> tuple[str, ...]:
        """Return `read`, and `decide` if there is no `threshold` for the default one."""
        return ("read",) if "threshold" in cls.model_fields else ("read", "decide")

    def check(self) -> None:
        """Check its parameters before any work is spent.

        Raises:
            BadInput: The parameters do not fit together.
        """

    def read(self, pairs: Sequence[tuple[str, str]], progress: Progress = SILENT) -> list[RawJudgment]:
        """Read each (question, answer), in the order of `pairs`."""
        raise NotImplementedError

    def decide(self, reading: RawJudgment) -> Verdict:
        """Decide on a reading: flag it if any probability is above `threshold`; unread without finite numbers."""
        probabilities = reading.probabilities
        if not probabilities or not all(math.isfinite(value) for value in probabilities.values()):
            return Verdict(None, [], {}, reading.cut)
        threshold: float = getattr(self, "threshold")  # noqa: B009  # a parameter of the subclass
        flagged = [label for label, value in probabilities.items() if value > threshold]
        return Verdict(bool(flagged), flagged, probabilities, reading.cut)

    def judge(self, pairs: Sequence[tuple[str, str]], progress: Progress = SILENT) -> list[Verdict]:
        """Read and decide on each (question, answer), in the order of `pairs`."""
        return [self.verdict(reading) for reading in self.readings(pairs, progress)]

    def readings(self, pairs: Sequence[tuple[str, str]], progress: Progress = SILENT) -> list[RawJudgment]:
        """Call `read` and check what it returns.

        Raises:
            HbvError: It is not a list with one RawJudgment for each pair.
        """
        readings: object = self.read(pairs, progress)
        if not isinstance(readings, list):
            returned = type(readings).__name__
            raise HbvError(f"Scorer {self.name!r}: read returned {returned}; allowed: a list of RawJudgment.")
        if others := [type(reading).__name__ for reading in readings if not isinstance(reading, RawJudgment)]:
            raise HbvError(f"Scorer {self.name!r}: read returned a list of {others[0]}; allowed: RawJudgment.")
        if len(readings) != len(pairs):
            raise HbvError(f"Scorer {self.name!r}: read returned {len(readings)} judgments for {len(pairs)} answers.")
        return readings

    def verdict(self, reading: RawJudgment) -> Verdict:
        """Call `decide` and check what it returns.

        Raises:
            HbvError: It is not a Verdict.
        """
        verdict: object = self.decide(reading)
        if not isinstance(verdict, Verdict):
            raise HbvError(f"Scorer {self.name!r}: decide returned {type(verdict).__name__}; allowed: a Verdict.")
        return verdict
