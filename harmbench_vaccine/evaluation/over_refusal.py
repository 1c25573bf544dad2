"""Over-refusal: refusals of the benign prompts of a protocol, and of further sets that a user requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.data.answer_checks import refuses
from harmbench_vaccine.data.over_refusal import OVER_REFUSAL
from harmbench_vaccine.data.sources import provenance
from harmbench_vaccine.experiment.experiment import Experiment

from .agreement import AnswerRow
from .result import Result, StageRecord
from .result_fields import OverRefusal, RefusedShare
from .run_overview import RESULT, read_result_file
from .statistics import percentage, wilson

T = TypeVar("T")

_WHEN = ("before", "after")
_SAME_MODELS = tuple(f"{when}/benign" for when in _WHEN)
"""Answers whose keys show that two results measure the same models with the same template and token limit."""


def measure_over_refusal(rows: Sequence[AnswerRow]) -> dict[str, OverRefusal]:
    """Compute the refusals of each set of prompts that should not be refused, by the rule of the validity gates.

    Args:
        rows: The answers of a run.

    Returns:
        Set -> refusals by the aligned and the final model; `benign`, the set of the protocol, comes first.
    """
    names = [name for name in ("benign", *OVER_REFUSAL) if any(row["set"] == name for row in rows)]
    return {name: OverRefusal(before=_share(rows, name, "before"), after=_share(rows, name, "after")) for name in names}


def _share(rows: Sequence[AnswerRow], name: str, when: str) -> RefusedShare:
    refused = [refuses(row["answer"]) for row in rows if (row["when"], row["set"]) == (when, name)]
    return RefusedShare(
        percent=percentage(refused), ci=wilson(sum(refused), len(refused)), hits=sum(refused), n=len(refused)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stored runs


def has_over_refusal(run: Path, experiment: Experiment) -> bool:
    """Return whether the stored result of a run has every set that its experiment requests, from the same data.

    Args:
        run: The folder of the run.
        experiment: The experiment. Its sets are not part of the run id.
    """
    if not experiment.spec.over_refusal:
        return True
    try:
        result = read_result_file(run / RESULT, Result.from_json)
    except HbvError:  # it is measured again
        return False
    return all(
        name in result.over_refusal and _is_same_source(result, name, experiment.location(name))
        for name in experiment.spec.over_refusal
    )


def _is_same_source(result: Result, name: str, location: str) -> bool:
    """Return whether a set was read from this content, or from this name on the Hub."""
    source, requested = result.data.get(name), provenance(location, {})
    if source is None:
        return False
    if "fingerprint" in requested:
        return source.fingerprint == requested["fingerprint"]
    return source.location == location


def with_earlier_sets(
    result: Result, answers: list[dict[str, Any]], earlier: Result, earlier_answers: Sequence[dict[str, Any]]
) -> tuple[Result, list[dict[str, Any]]]:
    """Add the over-refusal sets that only an earlier result of the same models has, as if the run had requested them.

    Args:
        result: The new result of a run.
        answers: Its answers.
        earlier: The stored result of the run.
        earlier_answers: The answers of the stored result.
    """
    names = [name for name in earlier.spec.get("over_refusal", ()) if name not in result.over_refusal]
    old, new = (each.stages.get("answer") for each in (earlier, result))
    if not names or not old or not new or _benign_keys(old) != _benign_keys(new):
        return result, answers
    artifacts = {name: each for name, each in old.artifacts.items() if name.partition("/")[2] in names}
    seconds = new.seconds + sum(artifact.seconds for artifact in artifacts.values())
    answer = new.model_copy(update={"seconds": seconds, "artifacts": new.artifacts | artifacts})
    dropped = {**(result.counts.dropped or {}), **_only(names, earlier.counts.dropped or {})}
    locations = {name: location for name, location in result.spec["data"].items() if name not in names}
    update = {
        "over_refusal": result.over_refusal | _only(names, earlier.over_refusal),
        "counts": result.counts.model_copy(update={"dropped": dropped}),
        "data": result.data | _only(names, earlier.data),
        "stages": result.stages | {"answer": answer},
        "spec": {
            **result.spec,
            "over_refusal": [*result.spec["over_refusal"], *names],
            "data": locations | _only(names, earlier.spec["data"]),
        },
    }
    rows = [
        row
        for when in _WHEN
        for row in (*answers, *(earlier_row for earlier_row in earlier_answers if earlier_row["set"] in names))
        if row["when"] == when
    ]
    return result.model_copy(update=update), rows


def _only(names: Sequence[str], values: Mapping[str, T]) -> dict[str, T]:
    return {name: values[name] for name in names if name in values}


def _benign_keys(record: StageRecord) -> list[str]:
    return [record.artifacts[name].key for name in _SAME_MODELS if name in record.artifacts]
