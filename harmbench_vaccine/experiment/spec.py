"""What a run is: validated, hashable, and the same after a round trip through YAML or JSON."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.plugins.composition import Component, Composition


class RunSpec(BaseModel):
    """One cell: a model, a defense, an attack, a task, under a protocol, with a seed.

    What the protocol settles and the user did not write stays empty here; `protocols.load` has the rest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str = "testbed"
    defense: Composition = (Component(name="sft"),)
    attack: Composition = (Component(name="ratio", params={"": "0"}),)
    task: str = "sst2"
    seed: int = Field(default=0, ge=0)
    model: str | None = None
    """A hub id or folder; None: the protocol's."""
    scorers: tuple[str, ...] = ()
    """Judges in place of the protocol's; the first one's harmful score is the headline."""
    data: dict[str, str] = Field(default_factory=dict)
    """Data set name -> folder, file or hub id, in place of the protocol's."""
    values: dict[str, str] = Field(default_factory=dict)
    """Dotted path of a value of the protocol -> what stands in its place."""
    backend: Literal["transformers", "vllm"] | None = None
    """What generates answers; None: vLLM where it and a GPU are there."""

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """Raises `BadInput` where the text is no spec."""
        try:
            return cls._read(json.loads(text))
        except json.JSONDecodeError as error:
            raise BadInput(f"Not a run: not JSON: {error}.") from error

    def to_yaml(self) -> str:
        """The spec as YAML, defaults included."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> RunSpec:
        """Raises `BadInput` where the text is no spec."""
        import yaml

        try:
            return cls._read(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise BadInput(f"Not a run: not YAML: {str(error).splitlines()[0]}.") from error

    @classmethod
    def _read(cls, values: Any) -> RunSpec:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise BadInput(f"Not a run: {first_validation_error(error)}") from error


def first_validation_error(error: ValidationError) -> str:
    """The first thing that pydantic objects to, as a sentence."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{where}: {problem['msg']}."
