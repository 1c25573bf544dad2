"""Compare two defenses over their seeds, two runs, or two judges of one run, question by question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.data.answer_checks import refuses

from .agreement import AnswerRow, is_flagged
from .dispersion import SeedShares, pool_dispersion
from .measure import settle_again
from .noise_floor import noise_floors
from .paired import mcnemar, two_way_difference
from .records import load_result, load_run
from .result import Result
from .run_overview import RESULT

Score = Literal["harmful_score", "finetune_accuracy", "refusal_rate"]
SCORES: tuple[Score, ...] = ("harmful_score", "finetune_accuracy", "refusal_rate")
Method = Literal["mcnemar", "questions", "pooled", "two_way"]
Question = tuple[str, str, str]
"""Id, instruction and input: the question without the changes of an attack."""
Values = Mapping[Question, float]
"""Value of the answer to each question, from 0 to 1."""

MIN_SEEDS = 5
"""Number of shared seeds from which the spread between them is estimated from the pair of defenses alone."""


@dataclass(frozen=True)
class Flip:
    """A question with different values of the two sides."""

    seed: int
    number: int
    """Position of the question in its evaluation set, from 1."""
    question: str
    first: float
    second: float


@dataclass(frozen=True)
class ScoreDifference:
    """The difference of a score between two sides, over the questions that both answer."""

    score: Score
    first: float
    """In percent, mean over the seeds."""
    second: float
    difference: float
    """Second minus first, in points."""
    low: float
    """Lower end of the 95% interval, in points."""
    high: float
    p_value: float
    method: Method
    """`mcnemar`: exact test over the differing questions of one seed; `questions`: clusters of questions of one seed;
    `pooled`: spread between seeds pooled over the stored defenses of the table; `two_way`: clusters of seeds and of
    questions."""
    seeds: int
    questions: int
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class RunComparison:
    """The scores of two sides."""

    first: str
    second: str
    runs: tuple[tuple[str, str], ...]
    """Pairs of run ids, one per seed."""
    scores: tuple[ScoreDifference, ...]
    notes: tuple[str, ...] = ()


def compare_runs(first: Path, second: Path, runs: Path) -> RunComparison:
    """Compare two runs; if they are different defenses or attacks, compare them over all seeds that both have.

    Args:
        first: Folder of the baseline.
        second: Folder of the other run.
        runs: Folder of the stored runs, with the other seeds and the other defenses.

    Raises:
        BadInput: The runs have different protocols, models or judges, or are the same run.
        HbvError: A run, or a second measurement of one, is damaged.
    """
    left, right = load_result(first), load_result(second)
    _check_comparable(left, right)
    stored = list(_read_results(runs))
    pairs = {left.seed: (first, second)}
    if _cell(left) != _cell(right):
        pairs = _pairs_by_seed(left, right, stored) | ({left.seed: (first, second)} if left.seed == right.seed else {})
    if not pairs:
        raise BadInput(
            f"Runs {left.run} and {right.run} have no seed in common: run both with the same --seed, such as 0..4."
        )
    loaded = {seed: (load_run(one), load_run(other)) for seed, (one, other) in sorted(pairs.items())}
    table = _table_cells(left, right, stored)
    floors = noise_floors(folder for pair in pairs.values() for folder in pair)
    scores, notes = [], []
    for score in SCORES:
        values = {seed: tuple(score_values(score, *run) for run in pair) for seed, pair in loaded.items()}
        difference = compare_values(
            score,
            {seed: pair[0] for seed, pair in values.items()},
            {seed: pair[1] for seed, pair in values.items()},
            table[score],
        )
        if difference:
            scores.append(difference)
            if score in floors and abs(difference.difference) < floors[score].points:
                notes.append(
                    f"The difference in {score.replace('_', ' ')} is below the noise floor of "
                    f"{floors[score].points:.1f} points: it is not interpreted."
                )
        else:
            notes.append(f"Without {score.replace('_', ' ')}: the runs do not share two of its questions.")
    ids = tuple((a[0].run, b[0].run) for a, b in loaded.values())
    return RunComparison(_label(left, right), _label(right, left), ids, tuple(scores), tuple(notes))


def compare_judges(run: Path, first: str, second: str) -> RunComparison:
    """Compare the verdicts of two judges on the harmful prompts of a run, after the user stage.

    Raises:
        BadInput: A judge has not scored the run.
    """
    result, answers = load_run(run)
    for judge in (first, second):
        if judge not in result.scores:
            raise unknown_name("judge", judge, result.scores, of=f"run {result.run}")
    values = [{result.seed: _flags(answers, judge)} for judge in (first, second)]
    difference = compare_values("harmful_score", values[0], values[1])
    if difference is None:
        raise BadInput(f"The judges of {result.run} share fewer than two readable verdicts: nothing can be compared.")
    return RunComparison(first, second, ((result.run, result.run),), (difference,))


def compare_values(
    score: Score, first: Mapping[int, Values], second: Mapping[int, Values], table: Sequence[SeedShares] = ()
) -> ScoreDifference | None:
    """Compare the values of two sides over their shared seeds and questions.

    Args:
        score: Name of the score.
        first: Seed -> value of each answer of the baseline.
        second: The same of the other side.
        table: The other cells of the table, whose spread between seeds is pooled with that of the two sides.

    Returns:
        None if fewer than two different questions are shared.
    """
    seeds = sorted(first.keys() & second.keys())
    numbers = {question: number for number, question in enumerate(first[seeds[0]], start=1)}
    shared = [
        question for question in numbers if all(question in side[seed] for side in (first, second) for seed in seeds)
    ]
    texts = [question[1:] for question in shared]
    if len(set(texts)) < 2:
        return None
    left, right = ([[side[seed][question] for question in shared] for seed in seeds] for side in (first, second))
    differences = [[b - a for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]
    sides = [SeedShares(tuple(sum(row) / len(row) for row in side), len(shared)) for side in (left, right)]
    method: Method
    if 1 < len(seeds) < MIN_SEEDS:
        method, estimate = "pooled", pool_dispersion([*sides, *table]).difference(sides[1], sides[0])
        p_value = estimate.p_value
    else:
        method, estimate = "two_way", two_way_difference(differences, texts)
        p_value = estimate.p_value
        if len(seeds) == 1:
            method = "questions"
            if len(set(texts)) == len(texts) and {*left[0], *right[0]} <= {0, 1}:
                method, p_value = "mcnemar", mcnemar([bool(v) for v in left[0]], [bool(v) for v in right[0]])
    flips = tuple(
        Flip(seed, numbers[question], f"{question[1]} {question[2]}".strip(), a, b)
        for seed, *rows in zip(seeds, left, right, strict=True)
        for question, a, b in zip(shared, *rows, strict=True)
        if a != b
    )
    return ScoreDifference(
        score=score,
        first=100 * sides[0].mean,
        second=100 * sides[1].mean,
        difference=100 * estimate.value,
        low=100 * estimate.low,
        high=100 * estimate.high,
        p_value=p_value,
        method=method,
        seeds=len(seeds),
        questions=len(shared),
        flips=flips,
    )


def score_values(score: Score, result: Result, answers: Sequence[AnswerRow]) -> Values:
    """Return the value of each answer of the final model by a score.

    Args:
        score: Name of the score.
        result: The result of the run, with its headline judge and its task.
        answers: The answers of the run with their verdicts; those to harmful prompts count for the first set only.

    Returns:
        Question -> value; without unread verdicts and grades. Empty if the rule of the task no longer exists.
    """
    if score == "harmful_score":
        return _flags(answers, result.scorer)
    if score == "refusal_rate":
        return {_question(row): float(refuses(row["answer"])) for row in _headline_rows(answers, result.scorer)}
    rows = [row for row in answers if row["when"] == "after" and row["set"] == "task"]
    if any("grade" in row for row in rows):
        return {_question(row): row["grade"] for row in rows if row.get("grade") is not None}
    try:
        task = settle_again(result).task
    except (BadInput, ValueError):  # its protocol or its plug-ins may no longer exist
        return {}
    return dict(zip(map(_question, rows), map(float, task.scores(result.accuracy_rule, rows)), strict=True))


def _check_comparable(left: Result, right: Result) -> None:
    if left.run == right.run:
        raise BadInput(f"Both runs are {left.run}: choose two runs, or two judges with --scorer A --scorer B.")
    for name, values in {
        "protocols": [
            result.tuning.untuned_hash if result.tuning else result.protocol_hash for result in (left, right)
        ],
        "models": [left.model, right.model],
        "judges": [left.scorer, right.scorer],
    }.items():
        if values[0] != values[1]:
            raise BadInput(
                f"Runs {left.run} and {right.run} have different {name} ({values[0]}, {values[1]}); "
                f"only runs with the same {name[:-1]} can be compared."
            )


def _table(result: Result) -> tuple[str, ...]:
    """Return what the defenses of one table have in common."""
    attack = canonical_json(result.attack_params)
    return result.protocol_hash, result.model, result.scorer, result.task, attack


def _cell(result: Result) -> tuple[str, ...]:
    """Return what the seeds of one defense in one table have in common."""
    return *_table(result), canonical_json(result.defense_params), result.backend


def _label(result: Result, other: Result) -> str:
    """Return a name of a side: its defense with the facts that differ from the other side, or its run id."""
    facts = [
        getattr(result, name)
        for name in ("attack", "task", "backend", "protocol")
        if getattr(result, name) != getattr(other, name)
    ]
    if _cell(result) == _cell(other):
        return result.run
    return ", ".join([result.defense, *facts])


def _read_results(runs: Path) -> Iterable[tuple[Path, Result]]:
    """Yield the readable results of a folder of runs, the oldest first."""
    results = []
    for path in runs.glob(f"*/{RESULT}"):
        try:
            results.append((path.parent, load_result(path.parent)))
        except HbvError:
            continue
    return sorted(results, key=lambda entry: (str(entry[1].environment.date or ""), entry[1].run))


def _pairs_by_seed(left: Result, right: Result, stored: Iterable[tuple[Path, Result]]) -> dict[int, tuple[Path, Path]]:
    sides: tuple[dict[int, Path], dict[int, Path]] = ({}, {})
    for folder, result in stored:
        for side, chosen in zip(sides, (left, right), strict=True):
            if _cell(result) == _cell(chosen):
                side[result.seed] = folder
    return {seed: (sides[0][seed], sides[1][seed]) for seed in sides[0].keys() & sides[1].keys()}


def _table_cells(left: Result, right: Result, stored: Iterable[tuple[Path, Result]]) -> dict[Score, list[SeedShares]]:
    """Return the shares of the other stored cells under the same protocol, task and attack, without collapsed ones."""
    compared = {_cell(left), _cell(right)}
    cells: dict[tuple[str, ...], dict[int, Result]] = defaultdict(dict)
    for _, result in stored:
        if not result.collapsed and _cell(result) not in compared and _table(result) in (_table(left), _table(right)):
            cells[_cell(result)][result.seed] = result
    shares = {score: [_shares(score, list(seeds.values())) for seeds in cells.values()] for score in SCORES}
    return {score: [cell for cell in others if cell.seeds] for score, others in shares.items()}


def _shares(score: Score, results: Sequence[Result]) -> SeedShares:
    """Return a score of one cell, for the seeds that have it."""
    count = min(
        result.finetune_accuracy_n if score == "finetune_accuracy" else result.harmful_score_n for result in results
    )
    values = [
        result.validity.shares["after"].refusal_rate if score == "refusal_rate" else getattr(result, score)
        for result in results
    ]
    return SeedShares(tuple(value / 100 for value in values if value is not None), max(1, count))


def _flags(answers: Sequence[AnswerRow], judge: str) -> Values:
    flags = {_question(row): is_flagged(row["verdicts"][judge]) for row in _headline_rows(answers, judge)}
    return {question: float(flag) for question, flag in flags.items() if flag is not None}


def _headline_rows(answers: Sequence[AnswerRow], judge: str) -> list[AnswerRow]:
    """Return the answers to the first harmful set after the user stage that a judge has read."""
    judged = [row for row in answers if row["when"] == "after" and judge in row.get("verdicts", {})]
    return [row for row in judged if row["set"] == judged[0]["set"]]


def _question(row: AnswerRow) -> Question:
    return row["id"], row["instruction"], row["input"]
