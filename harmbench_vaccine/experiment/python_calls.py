"""The experiments that a call of `hbv.run` describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harmbench_vaccine.core.errors import BadInput, shortened, unknown_name
from harmbench_vaccine.plugins.python_specs import check_class_names

from .spec import RunSpec
from .spec_lists import combine_specs

AXES = ("defense", "attack", "task", "seed")
"""The arguments that may have several values."""
_PLUGINS = ("defense", "attack", "task", "scorers")


def specs_of_call(arguments: Mapping[str, Any]) -> list[RunSpec]:
    """Return the specifications of a call: of each run of a list, or of every combination."""
    runs: list[Mapping[str, Any] | RunSpec] = [arguments]
    first = arguments["defense"]
    if isinstance(first, list) and any(isinstance(item, Mapping | RunSpec) for item in first):
        runs = [_arguments_of_run(item, {**arguments, "defense": "sft"}) for item in first]
    mappings = [run for run in runs if isinstance(run, Mapping)]
    check_class_names(value for run in mappings for name in _PLUGINS for value in _as_list(run[name]))
    return [spec for run in runs for spec in (_combinations(run) if isinstance(run, Mapping) else [run])]


def _arguments_of_run(item: Any, defaults: Mapping[str, Any]) -> Mapping[str, Any] | RunSpec:
    if isinstance(item, RunSpec):
        return item
    if not isinstance(item, Mapping):
        raise BadInput(f"{shortened(repr(item))} is not a run; allowed: mappings, such as dict(defense='vaccine').")
    for name in item:
        if name not in defaults:
            raise unknown_name("argument of a run", str(name), defaults)
    return {**defaults, **item}


def _combinations(arguments: Mapping[str, Any]) -> list[RunSpec]:
    axes = {name: _as_list(arguments[name]) for name in (*AXES, "scorers")}
    for name in AXES:
        if not axes[name]:
            raise BadInput(f"Argument {name} is an empty list; give at least one value, or leave it out.")
    for name in ("data", "values"):
        if not isinstance(arguments[name], Mapping | None):
            raise BadInput(f"Argument {name} is {shortened(repr(arguments[name]))}; allowed: a mapping by name.")
    settings = {name: value for name, value in arguments.items() if name not in AXES}
    sets = arguments["over_refusal"]
    lists = {"scorers": axes["scorers"], "over_refusal": list(sets) if isinstance(sets, tuple) else _as_list(sets)}
    return combine_specs(*(axes[name] for name in AXES), **{**settings, **lists})


def _as_list(written: Any) -> list[Any]:
    return list(written) if isinstance(written, list | range) else [written]
