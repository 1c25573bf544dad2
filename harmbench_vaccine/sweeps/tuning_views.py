"""The grids and the choices of a tuning, for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.core.progress import format_duration
from harmbench_vaccine.reporting.render import Column, TableGroup, dim_notes, number_column, render_table

from .tuning import MOST_ACCURACY_LOST, Candidate, Choice, DefenseGrid


def grids_view(grids: Sequence[DefenseGrid], untuned: Sequence[str]) -> RenderableType:
    """Show the values that would be compared."""
    rows = [
        [grid.defense, grid.parameter, f"{grid.default:g}", ", ".join(f"{value:g}" for value in grid.values)]
        for grid in grids
    ]
    columns = [Column("defense"), Column("parameter", wrap=False), number_column("default"), Column("values")]
    return TableGroup(render_table(columns, rows), *dim_notes(_untuned_note(untuned)))


def grids_json(grids: Sequence[DefenseGrid], untuned: Sequence[str]) -> dict[str, Any]:
    """Return the values that would be compared as plain JSON."""
    return {
        "grids": [
            {"defense": grid.defense, "parameter": grid.parameter, "default": grid.default, "values": list(grid.values)}
            for grid in grids
        ],
        "without_parameter": list(untuned),
    }


def choices_view(choices: Sequence[Choice], untuned: Sequence[str]) -> RenderableType:
    """Show every value with its scores, and which one is chosen."""
    rows = [
        [
            choice.grid.defense if number == 0 else "",
            choice.grid.parameter if number == 0 else "",
            f"{candidate.value:g}",
            *(
                f"{score:.1f}"
                for score in (candidate.refusal_rate, candidate.harmful_score, candidate.finetune_accuracy)
            ),
            _remark(choice, candidate),
        ]
        for choice in choices
        for number, candidate in enumerate(choice.candidates)
    ]
    columns = [
        Column("defense"),
        Column("parameter", wrap=False),
        *map(number_column, ("value", "refused %", "HS %", "FA %")),
        Column("remark", least=16),
    ]
    seconds = sum(choice.cost.seconds for choice in choices)
    notes = [
        f"Chosen: the highest refusal rate, then the lowest HS, among the values whose FA is at most "
        f"{MOST_ACCURACY_LOST:g} points below that of SFT and that are neither collapsed nor hollow.",
        "Scores are means over the tuning seeds, on validation prompts that no result uses. FA of SFT: "
        f"{choices[0].baseline_accuracy:.1f}%.",
        f"Budget: {choices[0].cost.runs} runs for each defense; {format_duration(seconds)} for all, where a stage that "
        "defenses share counts for each of them.",
    ]
    defaults = [choice.grid.defense for choice in choices if choice.is_fallback]
    notes += [f"{defense}: no value qualifies, so the default is used." for defense in defaults]
    return TableGroup(render_table(columns, rows), *dim_notes([*notes, *_untuned_note(untuned)]))


def choices_json(choices: Sequence[Choice], untuned: Sequence[str]) -> dict[str, Any]:
    """Return the choices as plain JSON."""
    return {
        "defenses": [
            {
                "defense": choice.grid.defense,
                "parameter": choice.grid.parameter,
                "default": choice.grid.default,
                "chosen": choice.chosen.value,
                "qualified": not choice.is_fallback,
                "baseline_accuracy": choice.baseline_accuracy,
                **choice.cost.model_dump(),
                "candidates": [{**vars(candidate), "runs": list(candidate.runs)} for candidate in choice.candidates],
            }
            for choice in choices
        ],
        "without_parameter": list(untuned),
    }


def _remark(choice: Choice, candidate: Candidate) -> str:
    parts = ["chosen" if candidate is choice.chosen else "", candidate.obstacle]
    parts.insert(0, "default" if candidate.value == choice.grid.default else "")
    return ", ".join(filter(None, parts))


def _untuned_note(untuned: Sequence[str]) -> list[str]:
    return [f"Without a parameter to tune: {', '.join(untuned)}."] if untuned else []
