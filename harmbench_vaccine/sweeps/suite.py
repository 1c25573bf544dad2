"""Suites: YAML files that list the runs of a comparison by axes, with additions and exclusions.

    name: vaccine-table1
    title: "Vaccine, Table 1: harmful ratios"
    protocol: vaccine-paper
    defenses: [sft, ewc, vaccine]
    attacks: ["ratio=0,0.01,0.05,0.1,0.2"]
    tasks: [sst2]
    seeds: 0..2
    include:
      - {defense: "vaccine:rho=1,5", attack: ratio=0.1}
      - {attack: ratio=0.1, grid: {finetune.settings.lr: [1e-5, 1e-4], finetune.settings.epochs: [5, 20]}}
    exclude:
      - {defense: ewc, attack: ratio=0.2}

The runs are every combination of the axes. An entry of `include` replaces axes for further runs, and changes values of
the protocol for them: `set` to one value each, `grid` to every combination of several. Runs under other protocol values
have another protocol hash, so that no table mixes them with the others. An entry of `exclude` removes the runs that
have all of its values.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.data.text_files import read_text
from harmbench_vaccine.experiment.spec import SEED_LIMIT, RunSpec, first_validation_error
from harmbench_vaccine.experiment.spec_lists import combine_specs, parse_seeds, yaml_text
from harmbench_vaccine.plugins.composition import Composition, expand_values, parse_plugins

if TYPE_CHECKING:
    from harmbench_vaccine.experiment.experiment import Experiment


def _listed(value: Any) -> Any:
    """Return a single value as a list of one."""
    return value if isinstance(value, list) else [value]


def _seed_numbers(value: Any) -> Any:
    """Return the seeds of a list such as [0, "2..4"]."""
    return [
        number
        for item in _listed(value)
        for number in (parse_seeds(item, "A seed of the suite") if isinstance(item, str) else [item])
    ]


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=SEED_LIMIT)], ...], BeforeValidator(_seed_numbers)]
Values = dict[str, Any]
"""Dotted path of a protocol value -> the value that replaces it."""

_FILE = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SuiteEntry(BaseModel):
    """Values of some axes, and values of the protocol."""

    model_config = _FILE

    protocol: Texts | None = None
    """Replaces `protocol` of the suite."""
    model: Texts | None = None
    """Replaces `model` of the suite."""
    defense: Texts | None = None
    """Replaces `defenses`."""
    attack: Texts | None = None
    """Replaces `attacks`."""
    task: Texts | None = None
    """Replaces `tasks`."""
    seed: Seeds | None = None
    """Replaces `seeds`."""
    values: Annotated[Values, Field(alias="set")] = Field(default_factory=dict)
    """Dotted path of a protocol value -> its value, in addition to `set` of the suite."""
    grid: dict[str, Annotated[list[Any], BeforeValidator(_listed), Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted path of a protocol value -> several values; every combination of them is used."""

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        for path in self.grid:
            if path in self.values:
                raise ValueError(f"`set` and `grid` both have {path!r}: remove one of them")
        return self

    def protocol_values(self) -> Iterator[Values]:
        """Yield the protocol values of every point of the grid."""
        for point in product(*self.grid.values()):
            yield {**self.values, **dict(zip(self.grid, point, strict=True))}


class Suite(BaseModel):
    """A suite file, validated."""

    model_config = _FILE

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Lower-case letters, digits, `.`, `_` and `-`; also the name of the folder of results."""
    title: str
    """One line for tables."""
    source: str = ""
    """The paper and its table, or another reason for the selection."""
    protocols: Annotated[Texts, Field(alias="protocol", min_length=1)] = ("testbed",)
    """Built-in protocols or YAML files: one, or a list. Default: `testbed`."""
    models: Annotated[Texts, Field(alias="model")] = ()
    """Hub ids, folders or GGUF files that replace the model of the protocol: one, or a list."""
    defenses: Annotated[Texts, Field(min_length=1)]
    """Defenses as on the command line; `vaccine:rho=1,5` is two defenses."""
    attacks: Annotated[Texts, Field(min_length=1)]
    """Attacks as on the command line; `ratio=0,0.1` is two attacks."""
    tasks: Annotated[Texts, Field(min_length=1)] = ("sst2",)
    """Tasks as on the command line. Default: `sst2`."""
    seeds: Annotated[Seeds, Field(min_length=1)] = (0,)
    """A number, a range such as `0..4`, or a list. Default: 0."""
    scorers: Texts = ()
    """Judges that replace that of the protocol; the first one gives the HS."""
    over_refusal: Texts = ()
    """Further sets of prompts that are measured for refusals: `xstest`, `or_bench`."""
    data: dict[str, str] = Field(default_factory=dict)
    """Data set -> folder, file or Hub id that replaces that of the protocol."""
    values: Annotated[Values, Field(alias="set")] = Field(default_factory=dict)
    """Dotted path of a protocol value -> the value that replaces it."""
    include: tuple[SuiteEntry, ...] = ()
    """Entries, each of which adds runs."""
    exclude: tuple[SuiteEntry, ...] = ()
    """Entries, each of which removes runs."""

    def specs(self) -> list[RunSpec]:
        """Return the specifications of all runs, each once, in the order of the table.

        Raises:
            BadInput: A specification cannot be parsed, or an exclusion removes nothing.
        """
        combined = [spec for entry in (SuiteEntry(), *self.include) for spec in self._combine(entry)]
        specs = list({spec.model_dump_json(): spec for spec in combined}.values())
        for entry in self.exclude:
            remaining = [spec for spec in specs if not _matches(entry, spec)]
            if len(remaining) == len(specs):
                written = entry.model_dump(exclude_defaults=True, by_alias=True, mode="json")
                raise BadInput(f"Suite {self.name!r} excludes {written}, but it has no such run.")
            specs = remaining
        return specs

    def settle(self) -> list[Experiment]:
        """Settle all runs, each once: a value of a grid that equals that of the protocol does not make another run.

        Raises:
            BadInput: A run of the suite is not possible.
        """
        from harmbench_vaccine.experiment.experiment import settle_all

        unique: dict[str, Experiment] = {}
        for experiment in settle_all(self.specs()):
            unique.setdefault(_identity(experiment), experiment)
        return list(unique.values())

    def with_replacements(
        self, model: str | None, data: Mapping[str, str], scorers: Texts, over_refusal: Texts = ()
    ) -> Suite:
        """Return the suite with another model, other data sets, judges and over-refusal sets, for all of its runs.

        Args:
            model: Hub id, folder or GGUF file; None: those of the suite.
            data: Data set -> location.
            scorers: Judges as on the command line; none: those of the suite.
            over_refusal: Names of over-refusal sets; none: those of the suite.

        Raises:
            BadInput: The suite compares several models.
        """
        entries = [name for entry in self.include for name in entry.model or ()]
        if model is not None and (entries or len(self.models) > 1):
            names = ", ".join([*self.models, *entries])
            raise BadInput(f"--model cannot replace the models that suite {self.name!r} compares ({names}).")
        models = self.models if model is None else (model,)
        update = {
            "models": models,
            "data": {**self.data, **data},
            "scorers": scorers or self.scorers,
            "over_refusal": over_refusal or self.over_refusal,
        }
        return self.model_copy(update=update)

    def write(self, path: Path) -> None:
        """Write the suite as a file, which workers read."""
        import yaml

        values = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        write_atomically(path, yaml.safe_dump(values, sort_keys=False))

    def _combine(self, entry: SuiteEntry) -> Iterable[RunSpec]:
        """Return every combination of the axes, some of which an entry replaces."""
        return (
            spec
            for values in entry.protocol_values()
            for protocol in entry.protocol or self.protocols
            for model in entry.model or self.models or (None,)
            for spec in combine_specs(
                entry.defense or self.defenses,
                entry.attack or self.attacks,
                entry.task or self.tasks,
                entry.seed or self.seeds,
                protocol=protocol,
                model=model,
                data=self.data,
                scorers=self.scorers,
                over_refusal=self.over_refusal,
                values={**self.values, **values},
            )
        )


def _identity(experiment: Experiment) -> str:
    """Return everything in which two settled runs of a suite can differ."""
    plugins = (*experiment.defenses, *experiment.attacks, *experiment.judges, experiment.task_plugin)
    params = [[resolved.plugin.name, resolved.params] for resolved in plugins]
    return canonical_json([experiment.protocol_hash, experiment.model, params, experiment.spec.seed])


def _matches(entry: SuiteEntry, spec: RunSpec) -> bool:
    """Return whether a run has all values of an entry."""
    written: Mapping[str, Iterable[Any] | None] = {
        "protocol": entry.protocol,
        "model": entry.model,
        "defense": entry.defense and _parsed(entry.defense),
        "attack": entry.attack and _parsed(entry.attack),
        "task": entry.task,
        "seed": entry.seed,
    }
    points = ({path: yaml_text(value) for path, value in values.items()} for values in entry.protocol_values())
    return all(values is None or getattr(spec, axis) in values for axis, values in written.items()) and any(
        point.items() <= spec.values.items() for point in points
    )


def _parsed(texts: Iterable[str]) -> list[Composition]:
    return [parse_plugins(each) for text in texts for each in expand_values(text)]


def load_suite(name: str) -> Suite:
    """Load a suite that ships with the package, by name, or a YAML file.

    Raises:
        BadInput: It does not exist, or a value is not allowed.
    """
    path = suite_file(name)
    try:
        return Suite.model_validate(read_yaml(read_text(path), f"Suite {path}"))
    except ValidationError as error:
        unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
        if unknown:
            raise _unknown_field(unknown[0], path) from error
        raise BadInput(f"Suite {path} is not valid: {first_validation_error(error)}") from error


def _unknown_field(location: tuple[int | str, ...], path: Path) -> BadInput:
    model = Suite if len(location) == 1 else SuiteEntry
    allowed = [field.alias or name for name, field in model.model_fields.items()]
    return unknown_name("value", str(location[-1]), allowed, of=f"suite {path}")


def suite_names() -> list[str]:
    """Return the names of the suites that ship with the package."""
    names = (Path(entry.name) for entry in _shipped_files().iterdir())
    return sorted(path.stem for path in names if path.suffix == ".yaml")


def suite_file(name: str) -> Path:
    """Return the file of a suite: one that ships with the package, or the file at a path.

    Raises:
        BadInput: It does not exist.
    """
    if name.endswith((".yaml", ".yml")):
        path = user_path(name)
        if not path.exists():
            raise BadInput(f"Suite file {name!r} does not exist.")
        return path
    shipped = Path(str(_shipped_files() / f"{name}.yaml"))
    if "/" in name or not os.path.isfile(shipped):  # a name may be too long for a path
        raise unknown_name("suite", name, suite_names())
    return shipped


def _shipped_files() -> Traversable:
    """Return the folder leaderboards/ of the repository, whose YAML files are the suites."""
    return files("harmbench_vaccine.suites")
