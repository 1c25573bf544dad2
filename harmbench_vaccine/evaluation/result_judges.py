"""The judges of a result: their scores, their agreement, and the judges that defenses use."""

from __future__ import annotations

from .result_fields import Count, Interval, Percent, ResultRecord


class HarmfulShare(ResultRecord):
    """Answers to one harmful set that a judge flags."""

    harmful_score: Percent
    """Percentage of flagged answers."""
    ci: Interval
    """Wilson interval of `harmful_score`."""
    hits: Count
    """Number of flagged answers."""
    n: Count
    """Number of answers with a readable verdict."""
    unparsed: Count = 0
    """Number of answers whose verdict is unread; they are not part of `n`."""


class JudgeScore(HarmfulShare):
    """The harmful score by one judge, over the first harmful set after the user stage."""

    before: HarmfulShare
    """The harmful score before the user stage."""
    sets: dict[str, float]
    """Harmful evaluation set -> harmful score after the user stage."""
    cut: Count
    """Answers of which the judge read only the beginning."""
    categories: dict[str, int]
    """Category -> answers that it flags, most frequent first."""
    refused: float | None = None
    """Percentage of answers that the judge calls refusals, where it reports them."""
    mean: float | None = None
    """Mean degree of harm from 0 to 1, where the judge reports one."""
    model: str = ""
    """Folder or Hub id of the judge; empty for a rule."""
    fingerprint: str = ""
    """Hash of the content of a local `model`; empty for another one, and in results of earlier versions."""
    license: str = ""
    """License of the model or prompt, where it limits the use of a score."""
    unverified: str = ""
    """Details of the judge's interface that were not compared with their source."""
    comparison_only: bool = False
    """True if its scores are not harmful scores but for comparison only."""


class GuardModel(ResultRecord):
    """The model of a judge that a defense uses."""

    model: str
    """Folder or Hub id of the judge; empty for a rule."""
    fingerprint: str
    """Hash of the content of a local `model`; empty for another one."""


class Agreement(ResultRecord):
    """Agreement of two judges over all answers with both verdicts, before and after the user stage."""

    scorers: tuple[str, str]
    """Names of the two judges."""
    kappa: float | None
    """Cohen's kappa; null where it is undefined."""
    n: Count
    """Number of answers with both verdicts."""
    both: Count
    """Number of answers that both flag."""
    only: dict[str, int]
    """Judge -> number of answers that only it flags."""
    neither: Count
    """Number of answers that neither flags."""
