"""The specifications of a command or a call: one for each combination of defense, attack, task and seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harmbench_vaccine.core.errors import BadInput, shortened
from harmbench_vaccine.inference.engine import Backend
from harmbench_vaccine.plugins.composition import Component, expand_range, expand_values
from harmbench_vaccine.plugins.python_specs import PluginSpec, parse_specification
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS

from .spec import SEED_LIMIT, RunSpec, first_validation_error

MOST_RUNS = 100_000
"""Allowed number of combinations of a command or a call."""


def combine_specs(
    defenses: Iterable[PluginSpec],
    attacks: Iterable[PluginSpec],
    tasks: Iterable[PluginSpec],
    seeds: Iterable[int | str],
    *,
    protocol: str | Path = "testbed",
    model: str | Path | None = None,
    data: Mapping[str, str | Path] | None = None,
    scorers: Sequence[PluginSpec] = (),
    over_refusal: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    backend: Backend | None = None,
) -> list[RunSpec]:
    """Return one specification for every combination, in the order of the table: by task, seed, attack, defense.

    Args:
        defenses: Each a text such as `vaccine:rho=5`, a class, an object, or a tuple that composes several. A text that
            lists several values, such as `vaccine:rho=1,5`, is one defense for each of them.
        attacks: As `defenses`.
        tasks: Each a text, a class or an object; a text may also be the path of a data file.
        seeds: Seeds of all random draws: numbers, or texts such as `0..4`.
        protocol: Name of a built-in protocol, or a YAML file.
        model: Hub id, folder or GGUF file that replaces the model of the protocol.
        data: Data set -> folder, file or Hub id.
        scorers: Judges that replace that of the protocol.
        over_refusal: Further sets of prompts that are measured for refusals, by name.
        values: Dotted path of a protocol value -> the value, or its YAML text.
        backend: The engine that generates answers.

    Raises:
        BadInput: A specification cannot be parsed, an argument has a wrong type, or there are too many combinations.
    """
    numbers = [
        number for seed in seeds for number in (parse_seeds(seed, "Argument seed") if isinstance(seed, str) else [seed])
    ]
    listed_defenses, listed_attacks = expand_specifications(defenses), expand_specifications(attacks)
    listed_tasks = list(tasks)
    if (runs := len(listed_tasks) * len(numbers) * len(listed_attacks) * len(listed_defenses)) > MOST_RUNS:
        raise BadInput(f"The lists of values give {runs} runs; allowed: at most {MOST_RUNS}. Shorten the lists.")
    parsed_defenses = [parse_specification(defense, DEFENSES) for defense in listed_defenses]
    parsed_attacks = [parse_specification(attack, ATTACKS) for attack in listed_attacks]
    parsed_tasks = [task if isinstance(task, str) else parse_specification(task, TASKS) for task in listed_tasks]
    judges = [
        component
        for scorer in scorers
        for component in ([scorer] if isinstance(scorer, str) else parse_specification(scorer, SCORERS))
    ]
    locations = {name: str(path) for name, path in (data or {}).items()}
    texts = {path: yaml_text(value) for path, value in (values or {}).items()}
    try:
        return [
            RunSpec(
                protocol=str(protocol),
                defense=defense,
                attack=attack,
                task=task,
                seed=seed,
                model=None if model is None else str(model),
                scorers=tuple[str | Component, ...](judges),
                over_refusal=tuple(over_refusal),
                data=locations,
                values=texts,
                backend=backend,
            )
            for task, seed, attack, defense in product(parsed_tasks, numbers, parsed_attacks, parsed_defenses)
        ]
    except ValidationError as error:
        raise BadInput(f"Argument {first_validation_error(error)}") from error


def expand_specifications(written: Iterable[PluginSpec]) -> list[PluginSpec]:
    """Return one specification for every combination of the values that each text lists.

    Raises:
        BadInput: A range is not allowed, or a text lists too many combinations.
    """
    return [specification for each in written for specification in _expand_specification(each)]


def _expand_specification(written: PluginSpec) -> Sequence[PluginSpec]:
    if isinstance(written, tuple):
        return list(product(*(expand_values(part) if isinstance(part, str) else [part] for part in written)))
    return expand_values(written) if isinstance(written, str) else [written]


def parse_seeds(text: str, of: str) -> list[int]:
    """Return the seeds of a text such as `3`, `0..4` or `0,2..4`.

    Args:
        text: The text.
        of: What the text is the value of, for the error.

    Raises:
        BadInput: A part is not a seed and not a range of seeds.
    """
    numbers = [number.strip() for part in text.split(",") for number in expand_range(part, of)]
    for number in numbers:
        if not (re.fullmatch(r"[0-9]{1,19}", number) and int(number) < SEED_LIMIT):
            allowed = "whole numbers from 0 to 2**63 - 1, and ranges such as 0..4"
            raise BadInput(f"{of} is {shortened(number)!r}; allowed: {allowed}.")
    return list(map(int, numbers))


def yaml_text(value: Any) -> str:
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
