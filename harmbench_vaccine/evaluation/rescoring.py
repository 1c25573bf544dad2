"""Judge the stored answers of a run again, by another scorer or at another threshold; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.sources import TESTBED, check_testbed_part
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.resolution import scorer_defaults
from harmbench_vaccine.inference.dequantization import check_gguf, ensure_dequantized
from harmbench_vaccine.inference.engine import choose_backend
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins import Scorer
from harmbench_vaccine.plugins.composition import Component, canonical_name, parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import SCORERS
from harmbench_vaccine.testbed import ensure_testbed

from .agreement import AnswerRow, stored_verdict
from .records import add_judges, load_run, row_identity, run_lock, write_run
from .result import Result
from .scorer_facts import scorer_facts, scorer_models
from .verdicts import check_scorer, judge_answers, judged_pair


def rescore(
    run: Path, written: Sequence[str], threshold: float | None, store: Path, progress: Progress = SILENT
) -> Result:
    """Judge the stored answers of a run by scorers, and add the verdicts to its folder.

    The headline harmful score does not change.

    Args:
        run: The folder of the run.
        written: The scorers as the user wrote them; empty: the headline scorer of the run.
        threshold: Threshold that replaces those of the scorers.
        store: The folder of the store, where raw judgments are cached.
        progress: Where progress is reported.

    Returns:
        The result with the scores of every judge.

    Raises:
        BadInput: An unknown scorer or model, a threshold for a scorer that has none, or a judge that a defense of the
            run used.
        HbvError: A judge cannot run, or nearly all of its verdicts on an evaluation set are unread.
    """
    result, answers = load_run(run)
    if not result.scores:
        raise BadInput(f"Run {result.run} was stored by an earlier version. Repeat its `hbv run` command.")
    models = ModelPool(progress)
    try:
        judges = stored_scorers(result, written or [result.scorer], threshold, models)
        _check_guards(result, judges)
        for judge in judges.values():
            prepare_scorer(judge, progress)
        for name, judge in judges.items():
            if name == result.scorer:
                continue  # the headline stays
            verdicts = {
                identity: {name: verdict} for identity, verdict in stored_verdicts(judge, answers, store, progress)
            }
            with readable_disk_errors(f"the result of {result.run}", run), run_lock(run):
                result, answers = load_run(run)
                if any("verdicts" in row and row_identity(row) not in verdicts for row in answers):
                    raise HbvError(f"The answers of {result.run} changed while they were judged: repeat the command.")
                result, answers = add_judges(result, answers, verdicts, {name: scorer_facts(judge)})
                write_run(run, result, answers)
    finally:
        models.close()
    return result


def _check_guards(result: Result, judges: Mapping[str, Scorer]) -> None:
    """Refuse a judge that a defense of the run used, as `hbv run` does."""
    for name, judge in judges.items():
        facts = scorer_facts(judge)
        identity = facts["fingerprint"] or facts["model"] or judge.name
        for guard, model in result.guards.items():
            if identity == (model.fingerprint or model.model or parse_plugins(guard)[0].name):
                raise BadInput(
                    f"{name!r} is the judge of {result.defense!r}: the harmful score would count only what this judge "
                    "overlooks. Choose another scorer."
                )


def stored_verdicts(
    judge: Scorer, answers: Sequence[AnswerRow], store: Path, progress: Progress
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the identity and the verdict of each judged answer, one evaluation set after the other."""
    sets: dict[tuple[str, str], list[AnswerRow]] = {}
    for row in answers:
        if "verdicts" in row:
            sets.setdefault((row["when"], row["set"]), []).append(row)
    for rows in sets.values():
        verdicts = judge_answers(judge, list(map(judged_pair, rows)), store, progress)
        yield from ((row_identity(row), stored_verdict(vars(v))) for row, v in zip(rows, verdicts, strict=True))


def prepare_scorer(scorer: Scorer, progress: Progress) -> None:
    """Check that a scorer can run; build the testbed or dequantize its model where it needs that.

    Raises:
        BadInput: Its parameters do not fit together, or its model does not exist.
    """
    for model in scorer_models(scorer):
        check_testbed_part(model)
        if model.startswith(TESTBED):
            ensure_testbed(progress)
        check_gguf(model)
    ensure_dequantized(scorer_models(scorer), Store(home() / "store", progress))
    check_scorer(scorer)


def stored_scorers(
    result: Result, written: Sequence[str], threshold: float | None, models: ModelPool
) -> dict[str, Scorer]:
    """Construct scorers, with their models from the protocol of the run or from its result.

    Args:
        result: The result of the run.
        written: The scorers as the user wrote them, or as the result names them.
        threshold: Threshold that replaces those of the scorers.
        models: Where the judges keep their models.

    Raises:
        BadInput: An unknown scorer, or a threshold for a scorer that has none.
    """
    spec = result.spec
    defaults: dict[str, dict[str, Any]] = {}
    with suppress(BadInput):  # the file of the protocol may no longer exist; the result names the judges
        defaults = scorer_defaults(load_protocol(spec["protocol"]).replaced(spec["values"]))
    for name, score in result.scores.items():
        (component,) = parse_plugins(name)
        if score.model and "model" not in component.params:
            defaults[component.name] = {"model": score.model, **defaults.get(component.name, {})}
    components = [_with_threshold(component, threshold) for text in written for component in parse_plugins(text)]
    scorers = [resolve_plugins((component,), SCORERS, defaults, result.protocol)[0] for component in components]
    backend = choose_backend(spec.get("backend"))
    return {canonical_name([scorer]): scorer.plugin.with_models(models, backend) for scorer in scorers}


def _with_threshold(component: Component, threshold: float | None) -> Component:
    """Return a scorer as the user wrote it, with `threshold` instead of its own threshold."""
    if threshold is None:
        return component
    cls = SCORERS.get(component.name)
    if "threshold" not in cls.model_fields:
        raise BadInput(
            f"Scorer {cls.name!r} does not support --threshold; "
            "allowed: scorers that give a probability or a score, such as beaver_dam."
        )
    replaced = {"threshold", "" if cls.main_parameter() == "threshold" else "threshold"}
    params = {key: value for key, value in component.params.items() if key not in replaced}
    return component.model_copy(update={"params": {**params, "threshold": str(threshold)}})
