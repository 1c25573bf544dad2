"""Terminal views of the quality of a judge on labeled pairs."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.judge_card import JudgeCard
from harmbench_vaccine.evaluation.judge_report import (
    NO_ROWS,
    Calibration,
    JudgeReport,
    LabelReport,
    Measure,
    ReliabilityBin,
    SecondJudge,
)
from harmbench_vaccine.evaluation.result_text import interval_text, percent_text

from .render import Cell, TableGroup, VisibleText, dim_notes, number_column, numbers, render_table, score_column


def judge_card_view(card: JudgeCard) -> RenderableType:
    """Show the training of a judge, and its quality on the held-out pairs."""
    rows, losses = card.training, ", ".join(f"{loss:.3f}" for loss in card.losses)
    training = f"{rows.rows} pairs, {rows.unsafe} of them unsafe; {card.steps} steps, loss by epoch {losses}"
    notes = dim_notes([f"Trained on {training}."])
    return Group(*notes, judge_report_view("held-out pairs", card.report, card.contradictory, card.second_judges))


def judge_report_view(
    title: str, report: JudgeReport, contradictory: int, second_judges: Mapping[str, SecondJudge]
) -> RenderableType:
    """Show precision, recall, F1 and calibration by label, the reliability of the flag, and other judges.

    Args:
        title: The pairs, as a plural.
        report: The report of the judge.
        contradictory: Number of rows that were left out because their labels contradict each other.
        second_judges: Further judges on the same pairs.
    """
    labels = {"unsafe (any category)": report.flag}
    labels |= {name: label for name, label in report.categories.items() if isinstance(label, LabelReport)}
    judges = {"this judge": report, **{name: second.report for name, second in second_judges.items()}}
    tables: list[RenderableType] = [
        render_table(
            [
                "label",
                number_column("rows", legend="pairs with this label"),
                number_column("flagged", drop=1, legend="pairs that the judge flags"),
                score_column("precision %"),
                score_column("recall %"),
                score_column("F1 %"),
                number_column("Brier", drop=2, legend="mean squared difference of probability and label; 0 is best"),
                number_column("ECE", drop=3, legend="expected calibration error over 10 bins; 0 is best"),
            ],
            [_label_row(name, label) for name, label in labels.items()],
        )
    ]
    if report.flag.calibration:
        tables += [VisibleText(), _reliability_table(report.flag.calibration)]
    if second_judges:
        tables += [
            VisibleText(),
            render_table(
                [
                    "judge",
                    *map(score_column, ("precision %", "recall %", "F1 %")),
                    number_column("kappa", legend="Cohen's kappa with this judge"),
                    *numbers("both flag", "only this judge", "only the other", "neither"),
                ],
                [_judge_row(name, judge, second_judges.get(name)) for name, judge in judges.items()],
            ),
        ]
    heading = f"{report.rows} {title}, {report.flag.rows} of them unsafe, with 95% intervals"
    absent = [name for name, label in report.categories.items() if label == NO_ROWS]
    notes = [f"No rows: {', '.join(absent)}."] if absent else []
    for count, what in (
        (report.unread, "Pairs without a readable verdict, which are left out"),
        (report.cut, "Pairs of which the judge read only the beginning"),
        (contradictory, "Rows that were left out because is_safe and the categories contradict each other"),
    ):
        notes += [f"{what}: {count}."] if count else []
    return Group(VisibleText(heading, style="bold"), TableGroup(*tables), *dim_notes(notes))


def _label_row(name: str, label: LabelReport) -> list[Cell]:
    calibration = label.calibration
    return [
        name,
        str(label.rows),
        str(label.flagged),
        *map(_measure, (label.precision, label.recall, label.f1)),
        f"{calibration.brier:.3f} {interval_text(*calibration.brier_ci)}" if calibration else "",
        f"{calibration.ece:.3f}" if calibration else "",
    ]


def _reliability_table(calibration: Calibration) -> RenderableType:
    return render_table(
        [
            "probability of unsafe",
            *numbers("pairs"),
            number_column("mean"),
            score_column("unsafe %", legend="share of these pairs that are unsafe; the mean, of a calibrated judge"),
        ],
        [_bin_row(part) for part in calibration.bins if part.probability is not None],
    )


def _bin_row(part: ReliabilityBin) -> list[Cell]:
    assert part.probability is not None  # the caller leaves out empty bins
    assert part.positives is not None
    ends = f"{part.low:.1f} to {part.high:.1f}"
    return [ends, str(part.n), f"{part.probability:.3f}", percent_text(part.positives, part.ci)]


def _judge_row(name: str, report: JudgeReport, second: SecondJudge | None) -> list[Cell]:
    cells: list[Cell] = [name, *map(_measure, (report.flag.precision, report.flag.recall, report.flag.f1))]
    if second is None:
        return [*cells, *[""] * 5]
    agreement = second.agreement
    kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
    return [*cells, kappa, *map(str, (agreement.both, *agreement.only.values(), agreement.neither))]


def _measure(measure: Measure) -> str:
    return "undefined" if measure.value is None else percent_text(measure.value, measure.ci)
