"""Judging the stored answers of a run again, by another scorer or at another threshold: nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from harmbench_vaccine import testbed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import readable_disk_errors
from harmbench_vaccine.data.sources import TESTBED, check_testbed_part
from harmbench_vaccine.experiment.experiment import scorer_defaults
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.inference.engine import choose_backend
from harmbench_vaccine.pipeline import judged_pair
from harmbench_vaccine.plugins import Scorer
from harmbench_vaccine.plugins.composition import Component, canonical_name, parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import SCORERS

from . import verdicts
from .agreement import scorer_facts, stored_verdict
from .results import identity, load_run, run_lock, side_by_side, write_run


def rescore(
    run: Path, written: Sequence[str], threshold: float | None, store: Path, progress: Progress = SILENT
) -> dict[str, Any]:
    """Lets scorers judge the answers in the folder of a run, and puts their verdicts beside those that are there.

    Without `written` it is the run's own scorer. `threshold` takes the place of each one's own. The run's headline
    stays what it was. Returns the result with the scores of every judge.

    Raises:
        BadInput: an unknown scorer or model, or a threshold for a scorer that has none.
        HbvError: a judge cannot be run.
    """
    values, rows = load_run(run)
    if "scores" not in values:
        raise BadInput(f"Run {values['run']} was made by an earlier version: repeat its hbv run, which trains nothing.")
    judges = _settled(values, written or [values["scorer"]], threshold)
    for each in judges.values():
        for model in verdicts.scorer_models(each):
            check_testbed_part(model)
            if model.startswith(TESTBED):
                testbed.ensure_testbed(progress)
        verdicts.check_scorer(each)
    judged = [row for row in rows if "verdicts" in row]
    pairs = [judged_pair(row) for row in judged]
    for name, each in judges.items():
        if name == values["scorer"]:
            continue  # what the headline is made of stays
        given = verdicts.judge_answers(each, pairs, store, progress)
        said = {identity(row): {name: stored_verdict(vars(one))} for row, one in zip(judged, given, strict=True)}
        with readable_disk_errors(f"the result of {values['run']}"), run_lock(run):
            values, rows = side_by_side(*load_run(run), said, {name: scorer_facts(each)})
            write_run(run, values, rows)
    return values


def _settled(values: dict[str, Any], written: Sequence[str], threshold: float | None) -> dict[str, Scorer]:
    """The scorers by name, with the models that the run's protocol names for them, or that it was judged by."""
    try:
        given = scorer_defaults(load_protocol(values["spec"]["protocol"]).replaced(values["spec"]["values"]))
    except BadInput:  # its file has gone; the result remembers the judges
        given = {}
    for name, score in values["scores"].items():
        (own,) = parse_plugins(name)
        if score["model"] and "model" not in own.params:
            given[own.name] = {"model": score["model"], **given.get(own.name, {})}
    components = [_at(component, threshold) for text in written for component in parse_plugins(text)]
    backend = choose_backend(values["spec"].get("backend"))
    scorers = [resolve_plugins((component,), SCORERS, given, values["protocol"])[0] for component in components]
    return {canonical_name([each]): cast(Scorer, each.plugin).on(backend) for each in scorers}


def _at(component: Component, threshold: float | None) -> Component:
    """A scorer as it was written, at a threshold."""
    if threshold is None:
        return component
    cls = SCORERS.get(component.name)
    if "threshold" not in cls.model_fields:
        raise BadInput(
            f"Scorer {cls.name!r} has no threshold: it says what it says. "
            "Allowed with --threshold: scorers that give a probability or a score, such as beaver_dam."
        )
    other = {"threshold", "" if cls.main_parameter() == "threshold" else "threshold"}
    kept = {key: value for key, value in component.params.items() if key not in other}
    return component.model_copy(update={"params": {**kept, "threshold": str(threshold)}})
