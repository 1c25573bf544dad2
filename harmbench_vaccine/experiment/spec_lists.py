"""The specifications of a command or a call: one for each combination of defense, attack, task and seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harmbench_vaccine.core.errors import BadInput, shortened
from harmbench_vaccine.inference.engine import Backend
from harmbench_vaccine.plugins.composition import Component
from harmbench_vaccine.plugins.python_specs import PluginSpec, parse_specification
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS

from .spec import RunSpec, first_validation_error


def combine_specs(
    defenses: Iterable[PluginSpec],
    attacks: Iterable[PluginSpec],
    tasks: Iterable[PluginSpec],
    seeds: Iterable[int],
    *,
    protocol: str | Path = "testbed",
    model: str | Path | None = None,
    data: Mapping[str, str | Path] | None = None,
    scorers: Sequence[PluginSpec] = (),
    values: Mapping[str, Any] | None = None,
    backend: Backend | None = None,
) -> list[RunSpec]:
    """Return one specification for every combination, in the order of the table: by task, seed, attack, defense.

    Args:
        defenses: Each a text such as `vaccine:rho=5`, a class, an object, or a tuple that composes several.
        attacks: As `defenses`.
        tasks: As `defenses`; a text may also be the path of a data file.
        seeds: Seeds of all random draws.
        protocol: Name of a built-in protocol, or a YAML file.
        model: Hub id or folder that replaces the model of the protocol.
        data: Data set -> folder, file or Hub id.
        scorers: Judges that replace that of the protocol.
        values: Dotted path of a protocol value -> the value, or its YAML text.
        backend: The engine that generates answers.

    Raises:
        BadInput: A specification cannot be parsed, or an argument has a wrong type.
    """
    judges = [
        component
        for scorer in scorers
        for component in ([scorer] if isinstance(scorer, str) else parse_specification(scorer, SCORERS))
    ]
    try:
        return [
            RunSpec(
                protocol=str(protocol),
                defense=parse_specification(defense, DEFENSES),
                attack=parse_specification(attack, ATTACKS),
                task=task if isinstance(task, str) else parse_specification(task, TASKS),
                seed=seed,
                model=None if model is None else str(model),
                scorers=tuple[str | Component, ...](judges),
                data={name: str(path) for name, path in (data or {}).items()},
                values={path: _yaml_text(value) for path, value in (values or {}).items()},
                backend=backend,
            )
            for task, seed, attack, defense in product(tasks, seeds, attacks, defenses)
        ]
    except ValidationError as error:
        raise BadInput(f"Argument {first_validation_error(error)}") from error


def _yaml_text(value: Any) -> str:
    """Return a value as `--set` takes it.

    Raises:
        BadInput: YAML does not have such values.
    """
    if isinstance(value, str):
        return value
    import yaml

    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    except yaml.YAMLError as error:
        raise BadInput(
            f"Argument values contains {shortened(repr(value))}; allowed: numbers, texts, lists, mappings and None."
        ) from error
    return text.removesuffix("\n...\n").strip()
