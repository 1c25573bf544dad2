"""The evidence for each built-in defense and attack, and its departures: complete, and shown by the commands."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.plugins import Attack, Defense, Plugin, Task
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, Registry
from harmbench_vaccine.reporting.docstrings import departures_in
from harmbench_vaccine.reporting.evidence import Evidence, departures_of, evidence_text, load_evidence
from support.cli import hbv

ROOT = Path(__file__).parents[1]
REGISTRIES: dict[str, Registry[Any]] = {"defense": DEFENSES, "attack": ATTACKS}
EVIDENCE = {f"{kind} {name}": e for kind in REGISTRIES for name, e in load_evidence().of_kind(kind).items()}
BUILT_IN: list[type[Plugin]] = [cls for registry in REGISTRIES.values() for cls in registry.loadable().values()]
ADVICE = "; state the evidence in harmbench_vaccine/reporting/evidence.yaml (docs/trust.md has the grades)"


@pytest.mark.parametrize("kind", REGISTRIES)
def test_exactly_the_built_in_plugins_have_evidence(kind: str) -> None:
    files = {path.stem for path in (ROOT / f"{kind}s").glob("*.py")} - {"__init__"}
    evidence = set(load_evidence().of_kind(kind))
    assert files == set(REGISTRIES[kind].loadable())
    assert not files - evidence, f"{kind}s without evidence: {sorted(files - evidence)}{ADVICE}"
    assert not evidence - files, f"evidence for a {kind} that does not exist: {sorted(evidence - files)}"


@pytest.mark.parametrize("evidence", EVIDENCE.values(), ids=EVIDENCE)
def test_the_named_tests_exist(evidence: Evidence) -> None:
    for name in evidence.tests:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("evidence", EVIDENCE.values(), ids=EVIDENCE)
def test_a_grade_has_what_it_claims(evidence: Evidence) -> None:
    """Code that was run or read is named with its commit, and only code that was run has a difference."""
    with_code = evidence.grade in {"authors' code run", "authors' code read", "third-party code"}
    assert bool(evidence.commit) == with_code
    assert not evidence.commit or re.fullmatch("[0-9a-f]{7}", evidence.commit)
    assert not evidence.repository or re.fullmatch(r"[\w-]+/[\w.-]+", evidence.repository)
    assert bool(evidence.difference) == (evidence.grade == "authors' code run")


@pytest.mark.parametrize(("base", "name"), [(Defense, "vaccine"), (Attack, "ratio"), (Task, "sst2")])
def test_a_plugin_of_the_user_has_no_evidence_of_a_built_in_one(base: type[Plugin], name: str) -> None:
    assert evidence_text(type("Other", (base,), {"__module__": "mine", "name": name})) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Departures


@pytest.mark.parametrize(
    ("text", "departures"),
    [
        ("Method.\n\nDepartures: none.\n", []),
        ("Method.\n\nDepartures: none known.\n", []),
        ("Method.\n\nDepartures: one; another (as in\nthe paper).\n", ["one", "another (as in the paper)"]),
        ("Method.\n\nDepartures from the authors' code (a/b, c.py): one.\n\nEnd.", ["one"]),
        ("Method.\n\nDepartures: one.\n\nDepartures from the paper: two.", ["one", "two"]),
        ("Method.\n\nDepartures: none of the rows is used.", ["none of the rows is used"]),
        ("Method. Departures: one.", None),
        ("Method.\n\n    Departures <- none", None),
        ("", None),
    ],
)
def test_departures_are_read_from_their_paragraph(text: str, departures: list[str] | None) -> None:
    assert departures_in(text) == departures


@pytest.mark.parametrize("cls", BUILT_IN, ids=lambda cls: f"{cls.kind} {cls.name}")
def test_every_built_in_plugin_lists_its_departures(cls: type[Plugin]) -> None:
    departures = departures_of(cls)
    file = f"{cls.kind}s/{cls.name}.py"
    assert departures is not None, (
        f"{file}: end its docstring with the paragraph `Departures: ...` or `Departures: none.`"
    )
    for phrase in departures:
        assert len(phrase.split()) > 2, f"{file}: {phrase!r} is not a phrase"
        assert phrase.count("(") == phrase.count(")"), f"{file}: {phrase!r} has a semicolon inside parentheses"
        assert phrase[-1] not in ".,:", f"{file}: {phrase!r} ends in a sign"
    assert len(set(departures)) == len(departures)


def test_a_definition_of_one_line_may_have_no_departures() -> None:
    """A method that was compared with code differs from it in something."""
    compared = {"authors' code run", "authors' code read", "third-party code"}
    silent = [f"{cls.kind} {cls.name}" for cls in BUILT_IN if not departures_of(cls)]
    assert [name for name in silent if EVIDENCE[name].grade in compared] == []


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize(
    ("name", "kind", "source"),
    [
        ("vaccine", "defenses", "authors' code run (git-disl/Vaccine 8937f68)"),
        ("mixing", "attacks", "authors' code read (git-disl/Virus fa297d0)"),
    ],
)
def test_the_commands_show_evidence_and_departures(name: str, kind: str, source: str, tmp_path: Path) -> None:
    cls: type[Plugin] = REGISTRIES[kind.removesuffix("s")].get(name)
    departures = departures_of(cls)
    assert departures
    page = hbv("info", name, home=tmp_path, COLUMNS="80").out
    words = " ".join(page.split())
    assert source in words
    assert all(words.count(f"- {departure}") == words.count(departure) == 1 for departure in departures)
    assert all(len(line) <= 80 for line in page.splitlines())
    rows = re.split(r"\n\n", hbv("list", kind, "--verbose", home=tmp_path, COLUMNS="80").out)
    (row,) = [row for row in rows if re.match(rf"name +{name}\n", row)]
    assert source.partition(" (")[0] in row
    assert re.search(rf"^departures +{len(departures)}$", row, re.MULTILINE)
    listed = hbv("list", kind, "--verbose", "--json", home=tmp_path).results[0]
    (facts,) = [facts for facts in listed if facts["name"] == name]
    (details,) = hbv("info", name, "--json", home=tmp_path).results[0]
    for shown in (facts, details):
        assert (shown["evidence"], shown["departures"]) == (evidence_text(cls), departures)
        assert shown["evidence"].startswith(source)


@pytest.mark.parametrize(("paragraph", "count"), [("", "not stated"), ("\n\nDepartures: none.", "0")])
def test_a_defense_without_the_paragraph_does_not_state_departures(paragraph: str, count: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f'"""Mine: a method.{paragraph}\n"""\n\nfrom harmbench_vaccine.plugins import Defense\n\n\n'
        'class Mine(Defense):\n    """Mine."""\n'
    )
    (details,) = hbv("info", path, "--json", home=tmp_path).results[0]
    assert details["departures"] == (None if count == "not stated" else [])
    assert details["evidence"] == ""
    words = " ".join(hbv("info", path, home=tmp_path).out.split())
    assert ("Departures: none." in words) == bool(paragraph)


def test_a_ranking_as_json_has_the_evidence(tmp_path: Path) -> None:
    shown = hbv("leaderboard", ROOT / "leaderboards" / "testbed.csv", "--json", home=tmp_path)
    for row in shown.results[0]:
        assert list(row["evidence"]) == list(json.loads(row["defense_params"]))
        assert all(row["evidence"].values())
