"""Explain which artifacts of a run were reused, and which inputs of the others differ from earlier artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harmbench_vaccine.core.store import META, Store

from .result import Result, StageArtifact

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A field of the inputs that differs between two artifacts."""

    field: str
    """Dotted path, such as `settings.lr` or `defense.0.params.rho`."""
    value: Any
    """The value of the explained artifact; None: absent."""
    earlier: Any
    """The value of the nearest earlier artifact; None: absent."""


@dataclass(frozen=True)
class Explanation:
    """The reason why an artifact of a run was reused or created."""

    stage: str
    name: str
    """Name of the artifact within its stage."""
    key: str
    state: Literal["reused", "created", "missing"]
    """`missing`: the artifact was deleted from the store."""
    nearest: str | None = None
    """Key of the earlier artifact with the fewest different fields; None: it was the first of its stage."""
    differences: list[Difference] = field(default_factory=list)


def explain_run(result: Result, store: Store) -> list[Explanation]:
    """Explain every artifact of a run, in the order of its stages.

    Args:
        result: The result of the run; a result of schema 1 has no artifacts.
        store: The store that contains the artifacts, also if the result was computed in another folder.
    """
    return [
        _explain(stage, name, artifact, store)
        for stage, record in result.stages.items()
        for name, artifact in record.artifacts.items()
    ]


def _explain(stage: str, name: str, artifact: StageArtifact, store: Store) -> Explanation:
    if artifact.cached:
        return Explanation(stage, name, artifact.key, "reused")
    kind = Path(artifact.path).parent.name
    description: dict[str, Any] | None = None
    with suppress(OSError, ValueError):
        description = json.loads((store.root / kind / artifact.key / META).read_text(encoding="utf-8"))
    if description is None:
        return Explanation(stage, name, artifact.key, "missing")
    created = description.get("created", "")
    candidates = [
        (compare_inputs(description["inputs"], earlier["inputs"]), earlier["key"])
        for earlier in store.descriptions(kind)
        if earlier["key"] != artifact.key and earlier.get("created", "") <= created
    ]
    if not candidates:
        return Explanation(stage, name, artifact.key, "created")
    differences, nearest = min(candidates, key=lambda candidate: _distance(candidate[0]))
    return Explanation(stage, name, artifact.key, "created", nearest, differences)


def _distance(differences: list[Difference]) -> tuple[int, int, int]:
    """Return a sort key for earlier artifacts: the number of differences; those inside the stage count twice."""
    absent = sum(difference.value is None or difference.earlier is None for difference in differences)
    upstream = ("model.", "aligned.", "final.", "answers")
    local = sum(not difference.field.startswith(upstream) for difference in differences)
    return len(differences) + local + absent, local, absent


def compare_inputs(inputs: Inputs, earlier: Inputs) -> list[Difference]:
    """Return the fields in which two inputs differ, in their order.

    An empty list or mapping is left out if the fields of the other one are differences.
    """
    new, old = dict(_leaves(inputs)), dict(_leaves(earlier))
    fields = dict.fromkeys([*new, *old])
    empty = [field for field, value in [*new.items(), *old.items()] if value in ([], {})]
    replaced = {field for field in empty if any(other.startswith(f"{field}.") for other in fields)}
    return [
        Difference(field, new.get(field), old.get(field))
        for field in fields
        if field not in replaced and (field not in new or field not in old or new[field] != old[field])
    ]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every leaf of nested dictionaries and lists."""
    if isinstance(value, dict) and value:
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = list(enumerate(value))
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
