"""Verify stored runs: judge their answers again, compute every metric again, and compare with the stored values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import ValidationError

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.jsonl import read_lines
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Artifact, intact_description
from harmbench_vaccine.data.sources import TESTBED
from harmbench_vaccine.experiment.artifacts import ANSWERS, ROWS
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.testbed import ensure_testbed

from .agreement import AnswerRow
from .artifact_inputs import differing_inputs
from .measure import answer_fields, drift_fields, experiment_fields, judge_fields, settle_again
from .records import judge_facts, load_run, row_identity
from .rescoring import prepare_scorer, stored_scorers, stored_verdicts
from .result import Result, StageArtifact
from .results_csv import ResultRow, read_csv, result_rows
from .run_overview import RESULT
from .trained_tokens import harmful_token_share
from .why import Inputs, compare_inputs

TOLERANCE = 1e-5
"""Relative difference from which two numbers differ: a CSV has six digits."""
_DECISION = ("flagged", "categories", "unparsed")
"""The fields of a verdict that are compared; probabilities depend slightly on the device and on the batch."""
_NOT_COMPARED = ("seconds", "versions")
"""Columns of a CSV that do not follow from answers."""


@dataclass(frozen=True)
class Mismatch:
    """A stored value that differs from the recomputed one."""

    field: str
    """Dotted path in `result.json`, a column of a CSV, or a name of what differs."""
    stored: Any
    computed: Any


@dataclass(frozen=True)
class VerifiedRun:
    """The outcome of the verification of a run."""

    run: str
    checked: tuple[str, ...] = ()
    """What was compared."""
    mismatches: tuple[Mismatch, ...] = ()
    unverified: tuple[str, ...] = ()
    """What could not be compared, each with the reason."""
    uncomputed: tuple[str, ...] = ()
    """Metrics that could not be computed again from the answers, each with the reason."""

    def __add__(self, other: VerifiedRun) -> VerifiedRun:
        return VerifiedRun(
            self.run,
            self.checked + other.checked,
            self.mismatches + other.mismatches,
            self.unverified + other.unverified,
            self.uncomputed + other.uncomputed,
        )

    @property
    def reasons(self) -> tuple[str, ...]:
        """Everything that was not verified, each with the reason."""
        return self.uncomputed + self.unverified

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as plain JSON."""
        return {**asdict(self), "verified": bool(self.checked) and not self.mismatches}


def verify_run(folder: Path, store: Path, progress: Progress = SILENT, *, cached: bool = False) -> VerifiedRun:
    """Verify the run in a folder; nothing is written.

    Args:
        folder: The folder of the run.
        store: The store with its artifacts.
        progress: Where progress is reported.
        cached: Use stored raw judgments instead of judging again.

    Raises:
        BadInput: An earlier version stored the run.
        HbvError: A file of the run is damaged.
    """
    result, answers = load_run(folder)
    if result.scorer not in result.scores:
        raise BadInput(f"Run {result.run} was stored by an earlier version. Repeat its `hbv run` command.")
    stored = _stored_artifacts(result, store)
    outcome = _verify_artifacts(result, answers, stored, store)
    verdicts, rows = _verify_verdicts(result, answers, store if cached else None, progress)
    return outcome + verdicts + _verify_metrics(result, rows, stored, progress)


def verify_csv(
    path: Path, runs: Path, store: Path, progress: Progress = SILENT, *, cached: bool = False
) -> list[VerifiedRun]:
    """Verify every row of a CSV of results against the folder of its run, and this folder itself.

    Args:
        path: The CSV.
        runs: The folder of the run folders.
        store, progress, cached: As for `verify_run`.

    Raises:
        BadInput: The file is not a CSV of results, or is empty.
    """
    rows = read_csv(path)
    if not rows:
        raise BadInput(f"No results in {path}. Add results with `hbv run` or `hbv sweep`.")
    return [_verify_row(row, runs / row.run, store, progress, cached) for row in rows]


def _verify_row(row: ResultRow, folder: Path, store: Path, progress: Progress, cached: bool) -> VerifiedRun:
    if not (folder / RESULT).is_file():
        return VerifiedRun(row.run, unverified=(f"the row: the folder of the run is not in {folder.parent}",))
    try:
        outcome = verify_run(folder, store, progress, cached=cached)
        result, _ = load_run(folder)
    except HbvError as error:
        return VerifiedRun(row.run, unverified=(f"the row: {error}",))
    computed = result_rows([result])[0].model_dump(exclude=set(_NOT_COMPARED))
    stored = {column: value for column, value in row.model_dump().items() if column in computed and value is not None}
    return outcome + VerifiedRun(row.run, ("the row of the CSV",), tuple(_compare(computed, stored, stored)))


def _compare(computed: Mapping[str, Any], stored: Mapping[str, Any], fields: Mapping[str, Any]) -> list[Mismatch]:
    """Return the leaves of `fields` that differ."""
    pairs = compare_inputs(*({key: values.get(key) for key in fields} for values in (computed, stored)))
    return [Mismatch(pair.field, pair.earlier, pair.value) for pair in pairs if not _is_close(pair.value, pair.earlier)]


def _is_close(first: Any, second: Any) -> bool:
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_is_close, first, second))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=TOLERANCE) if numbers else bool(first == second)


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts


@dataclass(frozen=True)
class _StoredArtifact:
    """An artifact of a run, as it is in the store."""

    field: str
    """Dotted path in `result.json`."""
    artifact: Artifact
    state: Literal["intact", "damaged", "missing"]
    inputs: Inputs
    """What it was created from; empty if it is not intact."""


def _stored_artifacts(result: Result, store: Path) -> dict[str, _StoredArtifact]:
    """Return name -> artifact, for every artifact that a result names."""
    return {
        name: _stored_artifact(f"stages.{stage}.artifacts.{name}", artifact, store)
        for stage, record in result.stages.items()
        for name, artifact in record.artifacts.items()
    }


def _stored_artifact(field: str, artifact: StageArtifact, store: Path) -> _StoredArtifact:
    kind = Path(artifact.path).parent.name
    path = store / kind / artifact.key
    stored = Artifact(kind, artifact.key, path, artifact.seconds, cached=True)
    try:
        description = intact_description(kind, path)
    except OSError:
        return _StoredArtifact(field, stored, "missing", {})
    if description is None:
        return _StoredArtifact(field, stored, "damaged", {})
    return _StoredArtifact(field, stored, "intact", description["inputs"])


def _verify_artifacts(
    result: Result, answers: Sequence[AnswerRow], stored: Mapping[str, _StoredArtifact], store: Path
) -> VerifiedRun:
    """Compare the hashes of the artifacts, their answers with those of the run, the drift and the token share."""
    intact = {name: entry.artifact for name, entry in stored.items() if entry.state == "intact"}
    mismatches = [
        Mismatch(entry.field, entry.artifact.key, "damaged") for entry in stored.values() if entry.state == "damaged"
    ]
    missing = sum(entry.state == "missing" for entry in stored.values())
    unverified = [f"{missing} of {len(stored)} artifacts: they are not in {store}"] if missing or not stored else []
    for name, artifact in intact.items():
        if artifact.stage == "answer":
            mismatches += _compare_answers(name, artifact, answers)
    if "drift" in intact:
        fields = drift_fields(intact["drift"])
        mismatches += _compare(fields, result.to_json(), fields)
    else:
        unverified.append("alignment loss and drift: their artifact is not in the store, or is damaged")
    share = harmful_token_share(intact["finetune"].json(ROWS)) if "finetune" in intact else None
    has_share = share is not None and result.harmful_token_share is not None  # not of an earlier version
    if has_share:
        fields = {"harmful_token_share": share}
        mismatches += _compare(fields, result.to_json(), fields)
    checked = [f"the hashes of {len(intact)} artifacts"] if intact else []
    checked += ["alignment loss and drift"] if "drift" in intact else []
    checked += ["the harmful token share"] if has_share else []
    return VerifiedRun(result.run, tuple(checked), tuple(mismatches), tuple(unverified))


def _compare_answers(name: str, artifact: Artifact, answers: Sequence[AnswerRow]) -> list[Mismatch]:
    """Compare the answers of an evaluation set in the folder of the run with those in the store."""
    when, _, set_name = name.partition("/")
    stored = [row for row in answers if (row["when"], row["set"]) == (when, set_name)]
    original = read_lines(artifact.path / ANSWERS)
    if len(stored) != len(original):
        return [Mismatch(f"answers {name}", f"{len(stored)} answers", f"{len(original)} answers")]
    differing = [
        row["id"]
        for row, source in zip(stored, original, strict=True)
        if any(row.get(key) != source[key] for key in source)
    ]
    return _mismatch_of_rows(f"answers {name}", differing, "the answers in the store")


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts and metrics


def _verify_verdicts(
    result: Result, answers: Sequence[AnswerRow], cache: Path | None, progress: Progress
) -> tuple[VerifiedRun, list[dict[str, Any]]]:
    """Judge the answers by every judge of the result that this machine has.

    Args:
        result: The result.
        answers: Its answers.
        cache: The store with raw judgments; None: judge again.
        progress: Where progress is reported.

    Returns:
        The outcome, and the answers with the new verdicts, or the stored ones of judges that cannot run.
    """
    outcome = VerifiedRun(result.run, mismatches=tuple(_headline_mismatches(result, answers)))
    rows = [dict(row) for row in answers]
    models = ModelPool(progress)
    try:
        for name in result.scores:
            try:
                with TemporaryDirectory() as scratch:
                    (judge,) = stored_scorers(result, [name], None, models).values()
                    prepare_scorer(judge, progress)
                    new = dict(stored_verdicts(judge, answers, cache or Path(scratch), progress))
            except HbvError as error:
                outcome += VerifiedRun(result.run, uncomputed=(f"the verdicts of {name}: {error}",))
                continue
            outcome += VerifiedRun(
                result.run, (f"{len(new)} verdicts of {name}",), tuple(_compare_verdicts(name, rows, new))
            )
            for row in rows:
                if "verdicts" in row:
                    row["verdicts"] = {**row["verdicts"], name: new[row_identity(row)]}
    finally:
        models.close()
    return outcome, rows


def _headline_mismatches(result: Result, answers: Sequence[AnswerRow]) -> list[Mismatch]:
    """Compare the verdict that a row shows with the one of the headline judge."""
    judged = [row for row in answers if "verdicts" in row]
    differing = [
        row["id"] for row in judged if row.get("flagged") != row["verdicts"].get(result.scorer, {}).get("flagged")
    ]
    return _mismatch_of_rows("answers flagged", differing, f"the verdicts of {result.scorer}")


def _mismatch_of_rows(field: str, ids: Sequence[str], source: str) -> list[Mismatch]:
    """Return one mismatch for the rows that differ from another source, or none."""
    return [Mismatch(field, f"{len(ids)} rows differ, first {ids[0]}", source)] if ids else []


def _compare_verdicts(
    name: str, rows: Sequence[AnswerRow], verdicts: Mapping[tuple[str, ...], Mapping[str, Any]]
) -> list[Mismatch]:
    judged = [row for row in rows if "verdicts" in row]
    differing = [
        row
        for row in judged
        if any(
            row["verdicts"].get(name, {}).get(key) != verdicts[row_identity(row)].get(key)
            for key in _DECISION
            if key in row["verdicts"].get(name, {}) or key == "flagged"
        )
    ]
    if not differing:
        return []
    first = differing[0]
    stored, computed = first["verdicts"].get(name, {}).get("flagged"), verdicts[row_identity(first)]["flagged"]
    place = f"{len(differing)} of {len(judged)} differ, first {first['when']}/{first['set']} {first['id']}"
    return [Mismatch(f"verdicts of {name}: {place}", stored, computed)]


def _verify_metrics(
    result: Result, rows: Sequence[AnswerRow], stored: Mapping[str, _StoredArtifact], progress: Progress
) -> VerifiedRun:
    """Compute the metrics from the answers and their verdicts, and compare them with the result."""
    facts = {name: judge_facts(result.scores[name]) for name in dict.fromkeys([result.scorer, *result.scores])}
    try:
        fields = judge_fields(rows, facts)
    except (KeyError, StopIteration, ZeroDivisionError, ValueError):
        mismatch = Mismatch("answers", "verdicts are missing", "a verdict of every judge on every harmful answer")
        return VerifiedRun(result.run, mismatches=(mismatch,))
    outcome = VerifiedRun(result.run, ("harmful scores",)) + _compared_fields(result, fields)
    try:
        experiment = settle_again(result)
        if experiment.model.startswith(TESTBED):
            ensure_testbed(progress)
        outcome += _verify_experiment(result, experiment, stored)
        fields = answer_fields(experiment, rows, result.scorer, result.alignment_loss)
    except (HbvError, ValidationError) as error:
        reason = f"accuracy, validity and the hashes of code and data: {error}"
        return outcome + VerifiedRun(result.run, uncomputed=(reason,))
    unverified = ("the grades of the task: only their mean was computed again",) if experiment.task.graded else ()
    outcome += VerifiedRun(result.run, ("accuracy and validity",), unverified=unverified)
    return outcome + _compared_fields(result, fields)


def _verify_experiment(result: Result, experiment: Experiment, stored: Mapping[str, _StoredArtifact]) -> VerifiedRun:
    """Compare the id, the plug-ins and the parameters of a result, and the inputs of its artifacts."""
    fields = {"tuning": None, **experiment_fields(experiment)}
    outcome = VerifiedRun(result.run, ("code, data and parameters",)) + _compared_fields(result, fields)
    artifacts = {name: entry.artifact for name, entry in stored.items()}
    inputs = {name: entry.inputs for name, entry in stored.items() if entry.state == "intact"}
    try:
        differences = differing_inputs(experiment, artifacts, inputs)
    except HbvError as error:
        return outcome + VerifiedRun(result.run, unverified=(f"the inputs of artifacts: {error}",))
    mismatches = tuple(Mismatch(pair.field, pair.earlier, pair.value) for pair in differences)
    return outcome + VerifiedRun(result.run, ("the inputs of models and answers",) if inputs else (), mismatches)


def _compared_fields(result: Result, fields: Mapping[str, Any]) -> VerifiedRun:
    """Compare computed fields with the result; a field that an earlier version does not have is not computed again."""
    stored = result.to_json()
    differing = _compare(result.model_copy(update=dict(fields)).to_json(), stored, fields)
    absent = [mismatch.field for mismatch in differing if mismatch.stored is None]
    return VerifiedRun(
        result.run,
        mismatches=tuple(mismatch for mismatch in differing if mismatch.stored is not None),
        uncomputed=(f"{', '.join(absent)}: absent from the result",) if absent else (),
    )
