"""The smallest differences that planned runs can show, before they are run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.experiment.experiment import Experiment

from .dispersion import Dispersion, SeedShares, pool_dispersion
from .run_overview import RESULT, RunOverview, read_overview

ASSUMED_RATIO = 3.0
"""phi n where no stored runs show it: the harmful score of the testbed has 3.1 at p = 0.1."""
_BASELINE = "sft"
_LARGEST_VARIANCE = 0.5
"""The share with the largest variance."""


@dataclass(frozen=True)
class DetectableDifference:
    """The smallest difference in harmful score between two defenses that one table of planned runs can show."""

    protocol: str
    model: str
    task: str
    attack: str
    defenses: int
    seeds: int
    """The smallest number of seeds of a defense."""
    questions: int
    """Number of harmful prompts."""
    dispersion: float
    """phi n: variance between seeds relative to independent questions."""
    stored_runs: int
    """Number of stored runs of the protocol that the dispersion is estimated from; 0: it is assumed."""
    harmful_score: float
    """The harmful score of the baseline, in percent: that of stored runs, or 50, where the variance is largest."""
    difference: float
    """In points, at 80% power and a two-sided level of 5%."""


def detectable_text(points: float) -> str:
    """Return a detectable difference in points as text; above 100, no difference of two percentages is detected."""
    return f"{points:.1f}" if points <= 100 else "over 100"


def detectable_differences(experiments: Iterable[Experiment], runs: Path) -> list[DetectableDifference]:
    """Compute the smallest detectable difference of each table: protocol, model, task and attack.

    (t_.975 + t_.8) sqrt(2 phi v / S) with the degrees of freedom of the planned table, its S seeds, and v = m (1 - m).

    Args:
        experiments: The planned runs.
        runs: Folder of stored runs; those of the same protocol and model show the dispersion.
    """
    tables: dict[tuple[str, str, str, str], list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        key = (experiment.protocol_hash, experiment.model, experiment.task_name, experiment.attack)
        tables[key].append(experiment)
    stored = _read_stored({key[0] for key in tables}, runs)
    return [_plan_table(table, stored) for table in tables.values()]


def _plan_table(table: Sequence[Experiment], stored: Sequence[RunOverview]) -> DetectableDifference:
    first = table[0]
    questions = first.protocol.answer.harmful.prompts
    seeds: dict[str, set[int]] = defaultdict(set)
    for experiment in table:
        seeds[experiment.defense].add(experiment.spec.seed)
    least = min(map(len, seeds.values()))
    alike = [run for run in stored if (run.protocol_hash, run.model) == (first.protocol_hash, first.model)]
    cells = _cells(alike, questions)
    pooled = pool_dispersion(cells.values()) if cells else None
    is_known = pooled is not None and pooled.df > 0
    phi = pooled.phi if pooled and is_known else ASSUMED_RATIO / questions
    planned = Dispersion(phi, sum(len(numbers) - 1 for numbers in seeds.values()), questions)
    baseline = cells.get((first.task_name, first.attack, _BASELINE))
    share = baseline.mean if baseline else _LARGEST_VARIANCE
    cell = SeedShares((share,) * least, questions)
    return DetectableDifference(
        protocol=first.protocol.name,
        model=first.model,
        task=first.task_name,
        attack=first.attack,
        defenses=len(seeds),
        seeds=least,
        questions=questions,
        dispersion=planned.ratio,
        stored_runs=sum(cell.seeds for cell in cells.values()) if is_known else 0,
        harmful_score=100 * share,
        difference=100 * planned.detectable_difference(cell, cell),
    )


def _read_stored(protocols: set[str], runs: Path) -> list[RunOverview]:
    """Read the valid runs of some protocols, by their hashes; damaged runs are skipped."""
    stored = []
    for path in sorted(runs.glob(f"*/{RESULT}")):
        try:
            overview = read_overview(path.parent)
        except HbvError:
            continue
        if overview.protocol_hash in protocols and overview.harmful_score is not None and not overview.collapsed:
            stored.append(overview)
    return stored


def _cells(runs: Iterable[RunOverview], questions: int) -> dict[tuple[str | None, str, str], SeedShares]:
    """Return task, attack and defense -> harmful score of each seed."""
    shares: dict[tuple[str | None, str, str], dict[int | None, float]] = defaultdict(dict)
    for run in runs:
        if run.harmful_score is not None:
            shares[run.task, run.attack, run.defense][run.seed] = run.harmful_score / 100
    return {key: SeedShares(tuple(by_seed.values()), questions) for key, by_seed in shares.items()}
