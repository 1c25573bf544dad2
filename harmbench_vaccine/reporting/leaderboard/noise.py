"""The noise floor in rankings: differences below it are marked and are not interpreted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harmbench_vaccine.evaluation.noise_floor import NoiseFloor, noise_floors

from .ranking import Ranking
from .scores import SCORES

MARK = "~"
"""Follows a difference below the noise floor."""
_SHARED = ("protocol_hash", "model", "scorer", "task")
"""The columns of a setting in which the rankings of one noise floor agree."""
_UNITS = {"harmful_score": "verdicts (HS", "finetune_accuracy": "test items (FA"}


def with_noise_floors(rankings: Sequence[Ranking], runs: Path) -> list[Ranking]:
    """Return rankings with the columns `*_floor` and a note, where a run was measured twice.

    Rankings with the same protocol, model, judge and task share their noise floor.

    Args:
        rankings: The rankings.
        runs: The folder of the run folders.

    Raises:
        HbvError: A second measurement is damaged.
    """
    folders: dict[tuple[str, ...], dict[Path, None]] = defaultdict(dict)
    for ranking in rankings:
        folders[_key(ranking)] |= {runs / run["run"]: None for run in ranking.runs}
    floors = {key: noise_floors(paths) for key, paths in folders.items()}
    return [_with_floors(ranking, floors[_key(ranking)]) for ranking in rankings]


def _key(ranking: Ranking) -> tuple[str, ...]:
    return tuple(ranking.setting[column] for column in _SHARED)


def _with_floors(ranking: Ranking, floors: Mapping[str, NoiseFloor]) -> Ranking:
    shown = {score: floors[score] for score in SCORES if score in floors}
    if not shown:
        return ranking
    columns = {f"{score}_floor": floor.points for score, floor in shown.items()}
    changes = [
        f"{floor.flips} of {floor.n} {_UNITS[score]}, {floor.points:.1f} points)" for score, floor in shown.items()
    ]
    note = (
        f"Noise floor: answering again changed {' and '.join(changes)}. Smaller differences are marked {MARK} and are "
        "not interpreted."
    )
    rows = [row | columns for row in ranking.rows]
    return replace(ranking, rows=rows, statistics=[*ranking.statistics, note])
