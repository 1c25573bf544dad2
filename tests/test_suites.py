"""Suites and lists of values: the runs that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import expand_values, parse_plugins
from harmbench_vaccine.sweeps.suite import load_suite

# ---------------------------------------------------------------------------------------------------------------------
# Lists of values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft", ["sft"]),
        ("ratio=0.1", ["ratio=0.1"]),
        ("ratio=0,0.05,0.1", ["ratio=0", "ratio=0.05", "ratio=0.1"]),
        ("ratio=0, 0.05", ["ratio=0", "ratio=0.05"]),
        ("ratio=0,0.1,samples=500", ["ratio=0,samples=500", "ratio=0.1,samples=500"]),
        ("vaccine:rho=1,5", ["vaccine:rho=1", "vaccine:rho=5"]),
        ("lisa:k1=1..3", ["lisa:k1=1", "lisa:k1=2", "lisa:k1=3"]),
        ("lisa:k1=1,3..4,k2=9", ["lisa:k1=1,k2=9", "lisa:k1=3,k2=9", "lisa:k1=4,k2=9"]),
        (
            "vaccine=1,2+ewc=1e+09,2",
            ["vaccine=1+ewc=1e+09", "vaccine=1+ewc=2", "vaccine=2+ewc=1e+09", "vaccine=2+ewc=2"],
        ),
        ("backdoor,ratio=0.1", ["backdoor,ratio=0.1"]),
        ("./mine.py:file=a.txt", ["./mine.py:file=a.txt"]),
    ],
)
def test_expand_values(text: str, expected: list[str]) -> None:
    assert expand_values(text) == expected


@given(
    st.lists(st.floats(0, 1).map(lambda number: f"{number:g}"), min_size=1, max_size=4),
    st.lists(st.integers(1, 99).map(str), min_size=1, max_size=4),
)
def test_expanded_values_are_those_of_every_combination(ratios: list[str], samples: list[str]) -> None:
    texts = expand_values(f"ratio={','.join(ratios)},samples={','.join(samples)}")
    params = [parse_plugins(text) for text in texts]
    assert len(texts) == len(ratios) * len(samples)
    assert {(p[0].params[""], p[1].params[""]) for p in params} == {(r, s) for r in ratios for s in samples}


@pytest.mark.parametrize("text", ["ratio=5..1", "ratio=0..99999999"])
def test_bad_range(text: str) -> None:
    with pytest.raises(BadInput, match=r"is empty or has more than .* FIRST..LAST"):
        expand_values(text)


# ---------------------------------------------------------------------------------------------------------------------
# Suites

SUITE = """
name: small
title: A small suite
defenses: [sft, "vaccine:rho=2,5"]
attacks: ["ratio=0,0.1"]
seeds: 0..1
include:
  - {defense: lisa, attack: ratio=0.1}
  - {defense: sft, seed: 0}
exclude:
  - {defense: "vaccine:rho=5", attack: ratio=0}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "suite.yaml"
    path.write_text(text)
    return str(path)


def cell(spec: RunSpec) -> tuple[str, str, int]:
    return (
        "+".join(f"{c.name}{'=' + str(c.params['rho']) if c.params else ''}" for c in spec.defense),
        str(spec.attack[0].params[""]),
        spec.seed,
    )


def test_runs_of_a_suite(tmp_path: Path) -> None:
    cells = [cell(spec) for spec in load_suite(write(tmp_path, SUITE)).specs()]
    expected = {
        (defense, attack, seed)
        for defense in ("sft", "vaccine=2", "vaccine=5")
        for attack in ("0", "0.1")
        for seed in (0, 1)
    }
    expected |= {("lisa", "0.1", seed) for seed in (0, 1)}
    expected -= {("vaccine=5", "0", seed) for seed in (0, 1)}
    assert set(cells) == expected
    assert len(cells) == len(expected)


def test_single_values_are_axes_of_one(tmp_path: Path) -> None:
    text = "{name: one, title: One, defenses: sft, attacks: ratio=0.1, model: some/model, set: {rows: paper}}"
    (spec,) = load_suite(write(tmp_path, text)).specs()
    assert (spec.model, spec.values, spec.seed, spec.protocol) == ("some/model", {"rows": "paper"}, 0, "testbed")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("defenses:", "defences:"), "Unknown value 'defences' of suite .* Did you mean 'defenses'"),
        (("seeds: 0..1", "seeds: [-1]"), "seeds.0 is -1"),
        (("seeds: 0..1", "seeds: 0..x"), "seeds.0 is '0..x'"),
        (("seeds: 0..1", "seeds: []"), r"seeds is \[\]"),
        (("name: small", "name: ../small"), "name is '../small'"),
        (("{defense: sft, seed: 0}", "{defence: sft}"), "Unknown value 'defence' of suite .* Did you mean 'defense'"),
        (("title: A small suite", ""), "title is missing"),
        (("attack: ratio=0}", "attack: ratio=0.3}"), "excludes .* but it has no such run"),
        (("name: small", "- name"), "cannot be read as YAML"),
    ],
)
def test_bad_suite(change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        load_suite(write(tmp_path, SUITE.replace(*change))).specs()


def test_unknown_suite() -> None:
    with pytest.raises(BadInput, match=r"Suite file 'x\.yaml' does not exist"):
        load_suite("x.yaml")
    with pytest.raises(BadInput, match="Unknown suite 'nothing'"):
        load_suite("nothing")
