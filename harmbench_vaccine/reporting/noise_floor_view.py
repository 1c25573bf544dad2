"""Terminal view of the second measurement of a run."""

from __future__ import annotations

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.noise_floor import RepeatedRun, RepeatedScore

from .render import Column, VisibleText, dim_notes, number_column, numbers, render_table
from .run_comparison_view import LABELS, position_list

_LEGEND = (
    "floor: mean absolute change, in points; of verdicts, the share that flips. A smaller difference between two "
    "defenses is not interpreted."
)


def repeated_run_view(repeat: RepeatedRun) -> RenderableType:
    """Show both measurements of the final model, and the answers that changed."""
    scores = render_table(
        [Column("score"), *numbers("first %", "second %", "questions", "flips"), number_column("floor")],
        [
            [
                LABELS[name],
                f"{score.first:.1f}",
                f"{score.second:.1f}",
                str(score.n),
                str(len(score.flips)),
                f"{score.floor:.1f}",
            ]
            for name, score in repeat.scores.items()
        ],
    )
    answers = render_table(
        [Column("answers"), *numbers("all", "changed")],
        [[name, str(count.answers), str(count.changed)] for name, count in repeat.answers.items()],
    )
    flips = [
        f"{LABELS[name]} flips: {position_list(score.flips)}." for name, score in repeat.scores.items() if score.flips
    ]
    machine = repeat.environment.gpu or repeat.environment.cpu or "unknown machine"
    engine = f"Second measurement by {', '.join(repeat.answered_by)} on {machine}; it is stored with the run."
    title = VisibleText(f"{repeat.run}, measured twice", style="bold")
    return Group(title, scores, VisibleText(), answers, *dim_notes([*flips, _LEGEND, engine]))


def repeat_note(repeat: RepeatedRun) -> str:
    """Return the outcome of the second measurement as one line."""
    return f"Measured twice: {', '.join(_change(LABELS[name], score) for name, score in repeat.scores.items())}."


def _change(label: str, score: RepeatedScore) -> str:
    flips = f"{len(score.flips)} of {score.n} changed"
    return f"{label} {score.first:.1f} and {score.second:.1f} ({flips}, {score.floor:.1f} points)"
