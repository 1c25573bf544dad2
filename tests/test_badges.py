"""The evidence for each built-in defense: complete, with tests that exist, and shown by the commands."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.reporting.evidence import Evidence, evidence_text, load_evidence
from support.cli import hbv

ROOT = Path(__file__).parents[1]


def test_exactly_the_built_in_defenses_have_evidence() -> None:
    files = {path.stem for path in (ROOT / "defenses").glob("*.py")} - {"__init__"}
    assert set(load_evidence()) == files == set(DEFENSES.loadable())


@pytest.mark.parametrize("evidence", load_evidence().values(), ids=load_evidence())
def test_the_named_tests_exist(evidence: Evidence) -> None:
    for name in evidence.tests:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("evidence", load_evidence().values(), ids=load_evidence())
def test_a_grade_has_what_it_claims(evidence: Evidence) -> None:
    """Code that was run or read is named with its commit, and only code that was run has a difference."""
    with_code = evidence.grade in {"authors' code run", "authors' code read", "third-party code"}
    assert bool(evidence.commit) == with_code
    assert not evidence.commit or re.fullmatch("[0-9a-f]{7}", evidence.commit)
    assert not evidence.repository or re.fullmatch(r"[\w-]+/[\w.-]+", evidence.repository)
    assert bool(evidence.difference) == (evidence.grade == "authors' code run")


def test_a_defense_of_the_user_has_no_evidence_of_a_built_in_one() -> None:
    other = type("Vaccine", (Defense,), {"__module__": "mine", "name": "vaccine"})
    assert evidence_text(other) == ""


def test_the_commands_show_the_evidence(tmp_path: Path) -> None:
    text = load_evidence()["vaccine"].text
    assert text.startswith("authors' code run (git-disl/Vaccine 8937f68); ")
    assert "authors' code run (git-disl/Vaccine 8937f68)" in hbv("info", "vaccine", home=tmp_path).out
    assert "git-disl/Vaccine" in hbv("list", "defenses", "--verbose", home=tmp_path).out
    (facts,) = [
        row
        for row in hbv("list", "defenses", "--verbose", "--json", home=tmp_path).results[0]
        if row["name"] == "vaccine"
    ]
    assert facts["evidence"] == text
    shown = hbv("leaderboard", ROOT / "leaderboards" / "testbed.csv", "--json", home=tmp_path)
    for row in shown.results[0]:
        assert list(row["evidence"]) == list(json.loads(row["defense_params"]))
        assert all(row["evidence"].values())
