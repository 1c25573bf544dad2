"""Measure a stored run a second time: its models answer again, and the new answers are judged again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Artifact, Store, intact_description
from harmbench_vaccine.evaluation.agreement import AnswerRow
from harmbench_vaccine.evaluation.environment import current_environment
from harmbench_vaccine.evaluation.measure import answer_engines, answer_rows
from harmbench_vaccine.evaluation.noise_floor import RepeatedRun, RepeatedScore, RepeatedSet, save_repeat
from harmbench_vaccine.evaluation.records import load_run, require_keys
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.run_comparison import SCORES, Score, compare_values, score_values
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.inference.engine import Backend, choose_backend
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.pipeline import measure, train_models

from .models import stored_experiment

_REPEATED = ("answer", "score", "grade")
"""The stages of the second measurement."""


class _RepeatStore(Store):
    """A store that creates answers and verdicts below a folder of its own, and returns everything else as stored."""

    def __init__(self, root: Path, stored: Store, run: str, progress: Progress) -> None:
        """Create the store.

        Args:
            root: An empty folder.
            stored: The store with the models of the run.
            run: The id of the run.
            progress: Receives a note where another process creates an artifact.
        """
        super().__init__(root, progress)
        self._stored, self._run = stored, run

    def get_or_create(
        self, stage: str, inputs: Mapping[str, Any], create: Callable[[Path, Path], None], *, all_ranks: bool = False
    ) -> Artifact:
        """Create an artifact of answers, verdicts or grades, or return a stored one of another stage.

        Raises:
            BadInput: The stored artifact was deleted or is damaged.
        """
        if stage in _REPEATED:
            return super().get_or_create(stage, inputs, create, all_ranks=all_ranks)
        path = self._stored.path_of(stage, inputs)
        self._stored.use.mark(f"{stage}/{path.name}")
        try:
            description = intact_description(stage, path)
        except FileNotFoundError:
            description = None
        if description is None:
            raise BadInput(
                f"The {stage} artifact of run {self._run} was deleted from the store or is damaged, so it "
                "cannot be measured again: repeat the run's command."
            )
        return Artifact(stage, path.name, path, float(description["seconds"]), cached=True)


def repeat_run(folder: Path, backend: Backend | None = None, progress: Progress = SILENT) -> RepeatedRun:
    """Measure a stored run a second time, and store the outcome in its folder.

    The aligned and the final model answer every question again, and every judge of the run judges the new answers.
    Nothing is trained, and no stored answer or judgment is used.

    Args:
        folder: The folder of the run.
        backend: The engine that generates answers; None: that of the run.
        progress: Where progress is reported.

    Raises:
        BadInput: An artifact of the run was deleted or is damaged, an earlier version stored the run, or the backend
            is not installed.
        HbvError: The data, the protocol or the plug-ins of the run have changed, or the disk is full.
    """
    result, stored = load_run(folder)
    require_keys(result)
    experiment = stored_experiment(result)
    again = replace(experiment, backend=choose_backend(backend or experiment.backend))
    with TemporaryDirectory() as scratch, closing(ModelPool(progress)) as models:
        store = _RepeatStore(Path(scratch), Store(home() / "store"), result.run, progress)
        context = RunContext(store, models, progress)
        measurements = measure(again, context, *train_models(experiment, context))
        rows, engines = answer_rows(measurements), answer_engines(measurements)
    changes = {score: _compare_score(score, result, stored, rows) for score in SCORES}
    repeat = RepeatedRun(
        run=result.run,
        backend=again.backend,
        answered_by=engines,
        environment=current_environment(vllm=again.backend == "vllm"),
        answers=_compare_texts(stored, rows),
        scores={score: change for score, change in changes.items() if change},
    )
    save_repeat(folder, repeat)
    return repeat


def _compare_score(
    score: Score, result: Result, first: Sequence[AnswerRow], second: Sequence[AnswerRow]
) -> RepeatedScore | None:
    """Compare a score of two measurements; None if fewer than two questions have a value both times."""
    values, new_values = ({result.seed: score_values(score, result, rows)} for rows in (first, second))
    difference = compare_values(score, values, new_values)
    if difference is None:
        return None
    changes = [abs(flip.second - flip.first) for flip in difference.flips]
    return RepeatedScore(
        first=difference.first,
        second=difference.second,
        n=difference.questions,
        flips=tuple(flip.number for flip in difference.flips),
        floor=100 * sum(changes) / difference.questions,
    )


def _compare_texts(first: Sequence[AnswerRow], second: Sequence[AnswerRow]) -> dict[str, RepeatedSet]:
    """Count the answers of each model and evaluation set that have another text the second time."""
    sets: dict[str, list[bool]] = {}
    for earlier, later in zip(first, second, strict=True):
        sets.setdefault(f"{later['when']}/{later['set']}", []).append(earlier["answer"] != later["answer"])
    return {name: RepeatedSet(answers=len(changes), changed=sum(changes)) for name, changes in sets.items()}
