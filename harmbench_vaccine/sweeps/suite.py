"""Suites: YAML files that list the runs of a comparison by axes, with additions and exclusions.

    name: vaccine-table1
    title: "Vaccine, Table 1: harmful ratios"
    protocol: vaccine-llama2
    defenses: [sft, ewc, vaccine]
    attacks: ["ratio=0,0.01,0.05,0.1,0.2"]
    tasks: [sst2]
    seeds: 0..2
    include:
      - {defense: "vaccine:rho=1,5", attack: ratio=0.1}
    exclude:
      - {defense: ewc, attack: ratio=0.2}

The runs are every combination of the axes. An entry of `include` replaces axes for further runs; an entry of `exclude`
removes the runs that have all of its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.data.text_files import read_text
from harmbench_vaccine.experiment.spec import RunSpec, first_validation_error
from harmbench_vaccine.experiment.spec_lists import combine_specs
from harmbench_vaccine.plugins.composition import expand_range, expand_values, parse_plugins


def _listed(value: Any) -> Any:
    """Return a single value as a list of one."""
    return value if isinstance(value, list) else [value]


def _seed_numbers(value: Any) -> Any:
    """Return the seeds of a list such as [0, "2..4"]."""
    return [
        int(number) if isinstance(number, str) and number.isdecimal() else number
        for item in _listed(value)
        for number in (expand_range(item, "seeds") if isinstance(item, str) else [item])
    ]


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_seed_numbers)]

_FILE = ConfigDict(frozen=True, extra="forbid")


class SuiteEntry(BaseModel):
    """Values of some axes."""

    model_config = _FILE

    protocol: Texts | None = None
    model: Texts | None = None
    defense: Texts | None = None
    attack: Texts | None = None
    task: Texts | None = None
    seed: Seeds | None = None


class Suite(BaseModel):
    """A suite file, validated."""

    model_config = _FILE

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    title: str
    source: str = ""
    """The paper and its table, or another reason for the selection."""
    protocols: Annotated[Texts, Field(alias="protocol", min_length=1)] = ("testbed",)
    models: Annotated[Texts, Field(alias="model")] = ()
    """Models that replace that of the protocol; empty: the model of the protocol."""
    defenses: Annotated[Texts, Field(min_length=1)]
    attacks: Annotated[Texts, Field(min_length=1)]
    tasks: Annotated[Texts, Field(min_length=1)] = ("sst2",)
    seeds: Annotated[Seeds, Field(min_length=1)] = (0,)
    scorers: Texts = ()
    """Judges that replace that of the protocol."""
    data: dict[str, str] = Field(default_factory=dict)
    """Data set -> folder, file or Hub id that replaces that of the protocol."""
    values: Annotated[dict[str, Any], Field(alias="set")] = Field(default_factory=dict)
    """Dotted path of a protocol value -> the value that replaces it."""
    include: tuple[SuiteEntry, ...] = ()
    exclude: tuple[SuiteEntry, ...] = ()

    def specs(self) -> list[RunSpec]:
        """Return the specifications of all runs, each once, in the order of the table.

        Raises:
            BadInput: A specification cannot be parsed, or an exclusion removes nothing.
        """
        combined = [spec for entry in (SuiteEntry(), *self.include) for spec in self._combine(entry)]
        specs = list({spec.model_dump_json(): spec for spec in combined}.values())
        for entry in self.exclude:
            kept = [spec for spec in specs if not _matches(entry, spec)]
            if len(kept) == len(specs):
                written = entry.model_dump(exclude_none=True, mode="json")
                raise BadInput(f"Suite {self.name!r} excludes {written}, but it has no such run.")
            specs = kept
        return specs

    def _combine(self, entry: SuiteEntry) -> Iterable[RunSpec]:
        """Return every combination of the axes, some of which an entry replaces."""
        return (
            spec
            for protocol in entry.protocol or self.protocols
            for model in entry.model or self.models or (None,)
            for spec in combine_specs(
                _expanded(entry.defense or self.defenses),
                _expanded(entry.attack or self.attacks),
                entry.task or self.tasks,
                entry.seed or self.seeds,
                protocol=protocol,
                model=model,
                data=self.data,
                scorers=self.scorers,
                values=self.values,
            )
        )


def _expanded(texts: Iterable[str]) -> list[str]:
    return [each for text in texts for each in expand_values(text)]


def _matches(entry: SuiteEntry, spec: RunSpec) -> bool:
    """Return whether a run has all values of an entry."""
    written: Mapping[str, Iterable[Any] | None] = {
        "protocol": entry.protocol,
        "model": entry.model,
        "defense": entry.defense and [parse_plugins(text) for text in _expanded(entry.defense)],
        "attack": entry.attack and [parse_plugins(text) for text in _expanded(entry.attack)],
        "task": entry.task,
        "seed": entry.seed,
    }
    return all(values is None or getattr(spec, axis) in values for axis, values in written.items())


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
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


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
    if name not in suite_names():
        raise unknown_name("suite", name, suite_names())
    return _FOLDER / f"{name}.yaml"


_FOLDER = Path(__file__).parents[1] / "leaderboards" / "suites"
