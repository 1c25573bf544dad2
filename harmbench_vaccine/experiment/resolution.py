"""Construct the judges and the task of an experiment from what the user, a defense or the protocol names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.files import is_data_file
from harmbench_vaccine.data.sources import location_identity
from harmbench_vaccine.plugins import Resolved, Scorer, Task
from harmbench_vaccine.plugins.composition import Component, Composition, canonical_name, parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import SCORERS, TASKS, is_plugin_path
from harmbench_vaccine.plugins.teams import DefenseTeam

from .protocol import Protocol


def scorer_defaults(protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Return the parameters of scorers that a protocol sets, the model of its own judge included."""
    cls = SCORERS.get(parse_plugins(protocol.score.scorer)[0].name)
    model = {"model": protocol.score.judge} if "model" in cls.model_fields else {}
    return {**protocol.scorers, cls.name: {**model, **protocol.scorers.get(cls.name, {})}}


def resolve_scorers(written: Sequence[str | Component], protocol: Protocol) -> list[Resolved[Scorer]]:
    """Construct the scorers that the user wrote, or the protocol's.

    Raises:
        BadInput: An unknown name or parameter, a value out of range, or one judge twice.
    """
    defaults = scorer_defaults(protocol)
    components = [
        component
        for scorer in written or [protocol.score.scorer]
        for component in (parse_plugins(scorer) if isinstance(scorer, str) else [scorer])
    ]
    scorers = [resolve_plugins((component,), SCORERS, defaults, protocol.name)[0] for component in components]
    names = [canonical_name([scorer]) for scorer in scorers]
    if len(set(names)) < len(names):
        raise BadInput(f"A scorer is named twice in {', '.join(names)}; the same one at two thresholds is allowed.")
    return scorers


def resolve_task(written: str | Composition, protocol: Protocol) -> Resolved[Task]:
    """Construct the task that the user wrote; the path of a data file or folder gives the task `own` on this data.

    Raises:
        BadInput: An unknown name or parameter, a value out of range, or several tasks.
    """
    components = _task_components(written) if isinstance(written, str) else written
    if len(components) != 1:
        raise BadInput(f"Task {written!r} names {len(components)} tasks; a run has one. Write --task once for each.")
    return resolve_plugins(components, TASKS, protocol.tasks, protocol.name)[0]


def _task_components(written: str) -> Composition:
    head, colon, rest = written.strip().partition(":")
    names_parameter = re.match(r"(\w+|[^=]*\.py)=", head)  # name=VALUE, whose value may be a path
    if not names_parameter and (is_data_file(head) or (is_plugin_path(head) and not head.endswith(".py"))):
        params = parse_plugins(f"own:{rest}")[0].params if colon else {}
        return (Component(name="own", params={"data": head, **params}),)
    return parse_plugins(written)


def resolve_guard(
    team: DefenseTeam, judges: Mapping[str, Mapping[str, Any]], protocol_name: str
) -> Resolved[Scorer] | None:
    """Construct the judge that a defense of a stage uses; None: it uses none.

    Args:
        team: The defenses of the stage.
        judges: The parameters of judges that the protocol sets, as for a judge that scores.
        protocol_name: The protocol's name.
    """
    if (guard := team.guard()) is None:
        return None
    name, params = guard
    values = {key: value for key, value in params.items() if value is not None}
    return resolve_plugins((Component(name=name, params=values),), SCORERS, judges, protocol_name)[0]


def judge_identity(judge: Resolved[Scorer]) -> tuple[str, str]:
    """Return the server and the model of a judge, a local model by its content; for a rule, its name."""
    model, server = (judge.params.get(key) or "" for key in ("model", "base_url"))
    if not model:
        return judge.plugin.name, ""
    return server, model if server else location_identity(model)
