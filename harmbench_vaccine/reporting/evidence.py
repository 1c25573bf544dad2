"""The evidence that a built-in defense is the method of its paper, from `evidence.yaml`.

The file is not part of the code that run ids hash, so that better evidence repeats no run.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.plugins import Defense

Grade = Literal["authors' code run", "authors' code read", "third-party code", "equations only", "definition"]

GRADES: dict[Grade, str] = {
    "authors' code run": "the authors' code was run next to the equations, with the same weights and rows",
    "authors' code read": "written from the equations and from the authors' code, which was not run",
    "third-party code": "written from the code of another project",
    "equations only": "written from the text of the paper, without its code",
    "definition": "a baseline or control without authors: its definition is one line",
}
"""The grades, the strongest first, with their explanations."""


class Evidence(BaseModel):
    """The evidence for one defense."""

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


@cache
def load_evidence() -> dict[str, Evidence]:
    """Read the evidence for every built-in defense, by its name."""
    text = (files("harmbench_vaccine.reporting") / "evidence.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Evidence]).validate_python(read_yaml(text, "evidence.yaml"))


def evidence_text(defense: type[Defense]) -> str:
    """Return the evidence for a defense as a text; empty for one that is not built in."""
    built_in = defense.__module__.startswith("harmbench_vaccine.defenses.")
    return load_evidence()[defense.name].text if built_in else ""


def evidence_of(defenses: Iterable[str]) -> dict[str, str | None]:
    """Return defense -> text of its evidence, for names in results; None for a defense without evidence."""
    evidence = load_evidence()
    return {name: evidence[name].text if name in evidence else None for name in defenses}
