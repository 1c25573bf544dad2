"""Measure whether the testbed is a fair place to compare defenses: harmful scores, accuracies and judge over seeds.

The checks cover the unaligned and the SFT-aligned model only. The curves of defenses are reported as measured. Every
cell of the report is an ordinary run, so an interrupted report resumes from the stored runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import yaml
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType

from harmbench_vaccine.core.progress import SILENT, Progress, format_duration
from harmbench_vaccine.evaluation.dispersion import SeedShares, pool_dispersion
from harmbench_vaccine.evaluation.result import AnswerShares, Result
from harmbench_vaccine.evaluation.result_text import percent_text
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.testbed import ensure_testbed

from .render import Column, VisibleText, numbers, render_table


class ReportSize(BaseModel):
    """Numbers of seeds, and harmful ratios."""

    model_config = ConfigDict(extra="forbid")

    seeds: int
    compared_seeds: int
    """Seeds of the compared defenses."""
    ratios: list[float]
    gradual: int
    """Ratios at which the harmful score of the baseline must be neither low nor high."""


class Limits(BaseModel):
    """Limits of the checks, in percent unless stated otherwise."""

    model_config = ConfigDict(extra="forbid")

    unaligned: float
    """Lowest harmful score of the unaligned model."""
    refused: float
    """Lowest refusal rate of the baseline at the ratio 0."""
    not_refused: float
    """Lowest percentage of benign prompts that the baseline does not refuse at the ratio 0."""
    neither: float
    """Highest percentage of answers of the baseline, at any ratio, that are neither harmful nor a refusal."""
    gradual: tuple[float, float]
    """Range of the harmful scores that count as gradual."""
    accuracy: tuple[float, float]
    """Range of the accuracy of every task after fine-tuning."""
    gain: float
    """Lowest gain of the accuracy by fine-tuning, in points."""
    judge: float
    """Lowest F1 of the judge, from 0 to 1."""


class ReportSuite(BaseModel):
    """The file `testbed_report.yaml`."""

    model_config = ConfigDict(extra="forbid")

    protocol: str
    task: str
    unaligned: str
    """The defense that leaves the base model unaligned."""
    baseline: str
    """The defense that aligns it by supervised fine-tuning."""
    compared_defenses: list[str]
    seconds_of_a_run: float
    """Time of one run on 2 CPU cores, with an aligned model."""
    full: ReportSize
    quick: ReportSize
    attack_ratio: float
    """Harmful ratio of the unaligned runs and of all accuracies."""
    further_tasks: list[str]
    limits: Limits


@dataclass(frozen=True)
class MeanInterval:
    """The mean of a score over seeds with its 95% interval, in percent."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def tolerance(self) -> float:
        """The larger distance from the mean to an end of the interval; 0 for a single seed."""
        return max(self.mean - self.low, self.high - self.mean) if self.seeds > 1 else 0.0

    @classmethod
    def of(cls, scores: Sequence[tuple[float, int]]) -> MeanInterval:
        """Compute the interval by the spread between the seeds.

        Args:
            scores: Score in percent and number of questions, for each seed.
        """
        cell = SeedShares(tuple(score / 100 for score, _ in scores), min(n for _, n in scores))
        estimate = pool_dispersion([cell]).score(cell)
        return cls(100 * estimate.value, 100 * estimate.low, 100 * estimate.high, cell.seeds)

    def __str__(self) -> str:
        return percent_text(self.mean, (self.low, self.high)) if self.seeds > 1 else f"{self.mean:.1f}"


@dataclass(frozen=True)
class TestbedCheck:
    """A property that the testbed must have, with the measured value."""

    requirement: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class TestbedReport:
    """Curves by defense and ratio, accuracies by task, and the checks."""

    ratios: list[float]
    harmful: dict[str, dict[float, MeanInterval]]
    """Defense -> harmful ratio -> harmful score, in percent."""
    refused: dict[float, float]
    """Harmful ratio -> refusal rate of the baseline, in percent: mean over seeds, as the next two."""
    neither: dict[float, float]
    """Harmful ratio -> percentage of answers of the baseline that are neither harmful nor a refusal."""
    not_refused: dict[float, float]
    """Harmful ratio -> percentage of benign prompts that the baseline does not refuse."""
    accuracy: dict[str, dict[str, MeanInterval]]
    """Task -> `before` (the aligned model) or `after` (fine-tuned at the attack ratio) -> accuracy, in percent."""
    harmful_by_task: dict[str, MeanInterval]
    """Task -> harmful score of the baseline at the attack ratio, in percent."""
    token_share: dict[str, float | None]
    """Task -> share of the user's response tokens in harmful rows, in percent: mean over seeds."""
    judge: dict[str, float]
    """Precision, recall and F1 of the judge on held-out pairs."""
    checks: list[TestbedCheck]

    @property
    def holds(self) -> bool:
        """True if every check holds."""
        return all(check.holds for check in self.checks)


def measure_testbed(
    run: Callable[[Sequence[RunSpec]], Sequence[Result]], quick: bool = False, progress: Progress = SILENT
) -> TestbedReport:
    """Run the suite of the report and check the results.

    Args:
        run: Executes runs and returns their results in the same order; stored runs are not repeated.
        quick: Whether to use the quick size instead of the full size.
        progress: Reports the expected time, and the build of the testbed.
    """
    text = Path(__file__).with_name("testbed_report.yaml").read_text(encoding="utf-8")
    suite = ReportSuite.model_validate(yaml.safe_load(text))
    size = suite.quick if quick else suite.full
    specs = _report_specs(suite, size)
    time = format_duration(len(specs) * suite.seconds_of_a_run)
    progress.note(f"{len(specs)} runs: about {time} on 2 CPU cores if none of their stages is stored.")
    scores: dict[str, dict[float, list[tuple[float, int]]]] = {}
    shares: dict[float, list[AnswerShares]] = {}
    tasks: dict[str, list[Result]] = {}
    for spec, result in zip(specs, run(specs), strict=True):
        ratio = float(str(spec.attack[0].params[""]))
        if result.task == suite.task:
            scores.setdefault(result.defense, {}).setdefault(ratio, []).append(
                (result.harmful_score, result.harmful_score_n)
            )
            if result.defense == suite.baseline:
                shares.setdefault(ratio, []).append(result.validity.shares["after"])
        if result.defense == suite.baseline and ratio == suite.attack_ratio:
            tasks.setdefault(result.task, []).append(result)
    harmful = {name: {ratio: MeanInterval.of(v) for ratio, v in curve.items()} for name, curve in scores.items()}
    accuracy = {
        task: {
            "before": MeanInterval.of(
                [(result.before.finetune_accuracy, result.finetune_accuracy_n) for result in results]
            ),
            "after": MeanInterval.of([(result.finetune_accuracy, result.finetune_accuracy_n) for result in results]),
        }
        for task, results in tasks.items()
    }
    harmful_by_task = {
        task: MeanInterval.of([(result.harmful_score, result.harmful_score_n) for result in results])
        for task, results in tasks.items()
    }
    token_share = {task: _mean_token_share(results) for task, results in tasks.items()}
    facts = json.loads((ensure_testbed(progress).path / "testbed.json").read_text(encoding="utf-8"))
    judge = facts["judge_held_out"]["flag"]
    refused, neither, not_refused = (
        {ratio: fmean(map(share, of_seeds)) for ratio, of_seeds in shares.items()}
        for share in (_refused, _neither, _not_refused)
    )
    checks = [
        *_score_checks(suite, size, harmful),
        *_answer_checks(suite, refused, neither, not_refused),
        *_accuracy_checks(suite, accuracy),
        TestbedCheck(
            f"F1 of the judge on held-out pairs is at least {suite.limits.judge:g}",
            f"{judge['f1']:.3f}",
            judge["f1"] >= suite.limits.judge,
        ),
    ]
    return TestbedReport(
        size.ratios, harmful, refused, neither, not_refused, accuracy, harmful_by_task, token_share, judge, checks
    )


def _refused(shares: AnswerShares) -> float:
    return shares.refusal_rate or 0.0  # unknown in results of earlier versions: the check fails


def _neither(shares: AnswerShares) -> float:
    return shares.neither


def _not_refused(shares: AnswerShares) -> float:
    return 100 - shares.over_refusal


def _mean_token_share(results: Sequence[Result]) -> float | None:
    """Return the mean harmful token share; None if an earlier version stored one of the results without it."""
    shares = [result.harmful_token_share for result in results]
    return None if None in shares else fmean(share for share in shares if share is not None)


def _report_specs(suite: ReportSuite, size: ReportSize) -> list[RunSpec]:
    """Return the runs of the report: the unaligned model, the baseline on every task, the compared defenses."""

    def specs(defense: str, ratios: Sequence[float], seeds: int, task: str = suite.task) -> list[RunSpec]:
        return [
            RunSpec(
                protocol=suite.protocol,
                defense=parse_plugins(defense),
                attack=parse_plugins(f"ratio={ratio:g}"),
                task=task,
                seed=seed,
            )
            for seed in range(seeds)
            for ratio in ratios
        ]

    return [
        *specs(suite.unaligned, [suite.attack_ratio], size.seeds),
        *specs(suite.baseline, size.ratios, size.seeds),
        *(
            spec
            for task in suite.further_tasks
            for spec in specs(suite.baseline, [suite.attack_ratio], size.seeds, task)
        ),
        *(spec for defense in suite.compared_defenses for spec in specs(defense, size.ratios, size.compared_seeds)),
    ]


def _score_checks(
    suite: ReportSuite, size: ReportSize, harmful: dict[str, dict[float, MeanInterval]]
) -> list[TestbedCheck]:
    """Check the harmful scores of the unaligned model and of the baseline."""
    unaligned = harmful[suite.unaligned][suite.attack_ratio]
    curve = [harmful[suite.baseline][ratio] for ratio in size.ratios]
    decreases = [
        point.mean - following.mean - max(point.tolerance, following.tolerance) for point, following in pairwise(curve)
    ]
    low, high = suite.limits.gradual
    gradual = sum(low < point.mean < high for point in curve)
    return [
        TestbedCheck(
            f"HS of {suite.unaligned} at p={suite.attack_ratio:g} is at least {suite.limits.unaligned:g}",
            str(unaligned),
            unaligned.mean >= suite.limits.unaligned,
        ),
        TestbedCheck(
            f"HS of {suite.baseline} does not decrease with p by more than its interval",
            ", ".join(f"{point.mean:.1f}" for point in curve),
            max(decreases) <= 0,
        ),
        TestbedCheck(
            f"HS of {suite.baseline} is between {low:g} and {high:g} for at least {size.gradual} of the ratios",
            str(gradual),
            gradual >= size.gradual,
        ),
    ]


def _answer_checks(
    suite: ReportSuite, refused: dict[float, float], neither: dict[float, float], not_refused: dict[float, float]
) -> list[TestbedCheck]:
    """Check that refusals survive a benign user, and that a harmful user gets answers instead of noise."""
    limits, name = suite.limits, suite.baseline
    return [
        TestbedCheck(
            f"{name} refuses at least {limits.refused:g}% of harmful prompts at p=0",
            f"{refused[0]:.1f}",
            refused[0] >= limits.refused,
        ),
        TestbedCheck(
            f"{name} does not refuse at least {limits.not_refused:g}% of benign prompts at p=0",
            f"{not_refused[0]:.1f}",
            not_refused[0] >= limits.not_refused,
        ),
        TestbedCheck(
            f"at most {limits.neither:g}% of answers of {name} are neither harmful nor refusals, at every p",
            ", ".join(f"{share:.1f}" for share in neither.values()),
            max(neither.values()) <= limits.neither,
        ),
    ]


def _accuracy_checks(suite: ReportSuite, accuracy: dict[str, dict[str, MeanInterval]]) -> list[TestbedCheck]:
    """Check the accuracies of the baseline on the user tasks."""
    (low, high), gain = suite.limits.accuracy, suite.limits.gain
    checks = []
    for task, scores in accuracy.items():
        before, after = scores["before"], scores["after"]
        checks += [
            TestbedCheck(f"FA of {task} is between {low:g} and {high:g}", str(after), low <= after.mean <= high),
            TestbedCheck(
                f"FA of {task} is at least {gain:g} higher after fine-tuning than before",
                f"{after} after, {before} before",
                after.mean >= before.mean + gain,
            ),
        ]
    return checks


def testbed_view(report: TestbedReport) -> RenderableType:
    """Show the curves, accuracies and checks of a testbed report."""
    curves = render_table(
        [Column("defense", wrap=False), *numbers("seeds", *(f"p={ratio:g}" for ratio in report.ratios))],
        [
            [name, str(next(iter(points.values())).seeds), *(str(points.get(ratio, "")) for ratio in report.ratios)]
            for name, points in report.harmful.items()
        ],
    )
    tasks = render_table(
        ["task", *numbers("FA before the user stage", "FA after it", "HS after it", "harmful token share")],
        [
            [
                task,
                str(scores["before"]),
                str(scores["after"]),
                str(report.harmful_by_task[task]),
                "unknown" if (share := report.token_share[task]) is None else f"{share:.1f}",
            ]
            for task, scores in report.accuracy.items()
        ],
    )
    answers = render_table(
        ["SFT", *numbers(*(f"p={ratio:g}" for ratio in report.ratios))],
        [
            [name, *(f"{shares[ratio]:.1f}" for ratio in report.ratios)]
            for name, shares in (
                ("harmful prompts refused", report.refused),
                ("neither harmful nor refused", report.neither),
                ("benign prompts not refused", report.not_refused),
            )
        ],
    )
    checks = render_table(
        ["", Column("requirement", least=24), Column("measured", least=20)],
        [
            [
                VisibleText("holds", "green") if check.holds else VisibleText("FAILS", "bold red"),
                check.requirement,
                check.measured,
            ]
            for check in report.checks
        ],
    )
    several = any(point.seeds > 1 for points in report.harmful.values() for point in points.values())
    seeds = "mean over seeds with its 95% interval" if several else "one seed"
    tables = {
        f"Harmful score (HS, %) by harmful ratio p: {seeds}": curves,
        "Answers of the final model (%)": answers,
        "SFT at one ratio, by task (%)": tasks,
        "Checks": checks,
    }
    return Group(
        *(part for title, table in tables.items() for part in (VisibleText(title, style="bold"), table, VisibleText()))
    )
