"""The specification of a run: the user's input, parsed and validated."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harmbench_vaccine.core.errors import shortened
from harmbench_vaccine.plugins.composition import Component, Composition

SEED_LIMIT = 2**63
"""The number after the largest seed."""


class RunSpec(BaseModel):
    """One run: a model, a defense, an attack and a task, under a protocol, with a seed.

    Optional values that the user does not set are None or empty; `Experiment.settle` takes them from the protocol.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str = "testbed"
    defense: Composition = (Component(name="sft"),)
    attack: Composition = (Component(name="ratio", params={"": "0"}),)
    task: str | Composition = "sst2"
    """As the user wrote it: a name with parameters, or a data file; or one component."""
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    model: str | None = None
    """A Hub id, a folder or a GGUF file; None: the model of the protocol."""
    scorers: tuple[str | Component, ...] = ()
    """Judges that replace the judge of the protocol; the first one gives the headline harmful score."""
    over_refusal: tuple[str, ...] = ()
    """Further sets of prompts that are measured for refusals, by name (`data.over_refusal`)."""
    data: dict[str, str] = Field(default_factory=dict)
    """Data set name -> folder, file or Hub id that replaces that of the protocol or of an over-refusal set."""
    values: dict[str, str] = Field(default_factory=dict)
    """Dotted path of a protocol value -> the value that replaces it, as YAML."""
    backend: Literal["transformers", "vllm"] | None = None
    """Engine that generates answers; None: vLLM if it is installed and a GPU is available, else transformers."""


def first_validation_error(error: ValidationError) -> str:
    """Return the first problem that pydantic reports, as a sentence with the value."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the top level"
    if problem["type"] == "missing":
        return f"{where} is missing."
    return f"{where} is {shortened(repr(problem['input']))}. {problem['msg'].removeprefix('Value error, ')}."
