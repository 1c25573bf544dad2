"""The evidence that a built-in defense or attack is the method of its paper, and its departures from it.

The evidence is in `evidence.yaml`, which is not part of the code that run ids hash, so that better evidence repeats no
run. The departures are in the docstring of the plug-in's module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.plugins import Plugin

from .docstrings import departures_in

Grade = Literal[
    "authors' code run",
    "authors' code read",
    "third-party code",
    "equations only",
    "third-party text",
    "definition",
]

GRADES: dict[Grade, str] = {
    "authors' code run": "the authors' code was run next to the equations, with the same weights and rows",
    "authors' code read": "written from the equations and from the authors' code, which was not run",
    "third-party code": "written from the code of another project",
    "equations only": "written from the text of the authors, without their code",
    "third-party text": "written from a description by others",
    "definition": "a baseline, a control or a format without authors: its definition is one line",
}
"""The grades, the strongest first, with their explanations."""


class Evidence(BaseModel):
    """The evidence for one defense or attack."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grade: Grade
    repository: str = ""
    """Owner and name on GitHub of the code that was run or read."""
    commit: str = ""
    """Commit of this code."""
    difference: str = ""
    """Largest difference of the adapter weights between the code that was run and the equations."""
    tests: list[str] = Field(min_length=1)
    """Tests that compare the code here with an independent statement of the equations."""

    @property
    def text(self) -> str:
        """The grade, with the code and the difference where they are known."""
        source = f"{self.repository} {self.commit}".strip()
        differs = self.difference and f"adapter weights differ by {self.difference}"
        return "; ".join(filter(None, (f"{self.grade}{source and f' ({source})'}", differs)))


class EvidenceFile(BaseModel):
    """The content of `evidence.yaml`: name -> evidence, for each kind of plug-in that has a source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    defenses: dict[str, Evidence]
    attacks: dict[str, Evidence]

    def of_kind(self, kind: str) -> dict[str, Evidence]:
        """Return name -> evidence of the plug-ins of a kind; empty for a kind without evidence."""
        return {"defense": self.defenses, "attack": self.attacks}.get(kind, {})


@cache
def load_evidence() -> EvidenceFile:
    """Read the evidence for every built-in defense and attack."""
    text = (files("harmbench_vaccine.reporting") / "evidence.yaml").read_text(encoding="utf-8")
    return EvidenceFile.model_validate(read_yaml(text, "evidence.yaml"))


def evidence_text(cls: type[Plugin]) -> str:
    """Return the evidence for a defense or an attack as a text; empty for one that is not built in."""
    built_in = cls.__module__.startswith(f"harmbench_vaccine.{cls.kind}s.")
    evidence = load_evidence().of_kind(cls.kind).get(cls.name) if built_in else None
    return evidence.text if evidence else ""


def evidence_of(defenses: Iterable[str]) -> dict[str, str | None]:
    """Return defense -> text of its evidence, for names in results; None for a defense without evidence."""
    evidence = load_evidence().defenses
    return {name: evidence[name].text if name in evidence else None for name in defenses}


def departures_of(cls: type[Plugin]) -> list[str] | None:
    """Return the departures of a plug-in from its paper or the authors' code.

    Returns:
        The phrases in the docstring of its module; None if the docstring does not list departures.
    """
    return departures_in(sys.modules[cls.__module__].__doc__ or "")
