"""What a run is: the grammar, the round trips, which value wins, and what a refusal says."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest

from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.hashing import canonical_json, digest
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Defense, Plugin, param
from harmbench_vaccine.plugins.composition import Component, canonical_name, parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES


class Demo(Defense):
    """Every kind of parameter."""

    name: ClassVar[str] = "demo"

    alpha: float = param(1.0, "a share", source="paper, table 1", main=True, ge=0, le=8)
    lam: float = param(0.5, "a weight", source="paper, eq. 2", gt=0)
    steps: int = param(10, "a count", source="code, line 3", ge=1)
    mode: Literal["hard", "soft"] = param("hard", "a choice", source="ours")
    deep: bool = param(False, "a switch", source="ours")
    label: str = param("x", "a text", source="ours")


class Bare(Defense):
    """No parameter at all."""

    name: ClassVar[str] = "bare"


class Shelf:
    """A registry of two."""

    def get(self, name: str) -> type[Plugin]:
        return {"demo": Demo, "bare": Bare}[name]


def settled(text: str, protocol: dict[str, dict[str, Any]] | None = None) -> list[Any]:
    return resolve_plugins(parse_plugins(text), Shelf(), protocol or {}, "house")  # type: ignore[arg-type]


def pairs(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [(component.name, component.params) for component in parse_plugins(text)]


# ---------------------------------------------------------------------------------------------------------------------
# Grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vaccine", [("vaccine", {})]),
        ("ratio=0.1", [("ratio", {"": "0.1"})]),
        ("vaccine:rho=5", [("vaccine", {"rho": "5"})]),
        ("vaccine:rho=5,tau=2", [("vaccine", {"rho": "5", "tau": "2"})]),
        ("vaccine:rho=5+ewc", [("vaccine", {"rho": "5"}), ("ewc", {})]),
        ("backdoor:trigger=2025+ratio=0.1", [("backdoor", {"trigger": "2025"}), ("ratio", {"": "0.1"})]),
        ("ratio=0.1,samples=500", [("ratio", {"": "0.1"}), ("samples", {"": "500"})]),
        ("ratio=0.1+samples=500", [("ratio", {"": "0.1"}), ("samples", {"": "500"})]),
        (" ratio = 0.1 , samples = 500 ", [("ratio", {"": "0.1"}), ("samples", {"": "500"})]),
        ("vaccine: rho = 5 , tau = 2 + ewc", [("vaccine", {"rho": "5", "tau": "2"}), ("ewc", {})]),
        ("ewc:lambda=3", [("ewc", {"lam": "3"})]),
        ("random-vaccine", [("random_vaccine", {})]),
        ("./my-idea.py", [("./my-idea.py", {})]),
        ("./mine.py:lambda=3,k=2+ratio=0.1", [("./mine.py", {"lam": "3", "k": "2"}), ("ratio", {"": "0.1"})]),
        ("mine.py=4", [("mine.py", {"": "4"})]),
        ("ratio=1e-3", [("ratio", {"": "1e-3"})]),
    ],
)
def test_the_grammar(text: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert pairs(text) == expected


def test_comma_and_plus_between_values_say_the_same() -> None:
    assert parse_plugins("ratio=0.1,samples=500") == parse_plugins("ratio=0.1+samples=500")


@pytest.mark.parametrize(
    "text",
    ["", " ", "+", "vaccine+", "+vaccine", "a b", "9lives", "vaccine:", "vaccine:rho", "vaccine:rho=", "vaccine:=5",
     "vaccine:rho=5,", "ratio=", "ratio=0.1,", "=0.1", "vaccine!"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(BadInput) as refusal:
        parse_plugins(text)
    assert repr(text) in str(refusal.value)
    assert "name=VALUE" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_parameter_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="rho"):
        parse_plugins("vaccine:rho=5,rho=6")


def test_a_word_that_python_reserves_and_its_stand_in_are_one_parameter() -> None:
    with pytest.raises(BadInput, match="lam"):
        parse_plugins("ewc:lambda=3,lam=4")


# ---------------------------------------------------------------------------------------------------------------------
# Round trips

SPECS = [
    RunSpec(),
    RunSpec(
        defense=parse_plugins("vaccine:rho=5+sft"), attack=parse_plugins("ratio=0.1,samples=500"), task="agnews", seed=3
    ),
    RunSpec(
        protocol="./p.yaml",
        defense=(
            Component(name="./mine.py", params={"a": 1, "b": 0.1, "c": True, "d": "yes", "e": "1e-3", "f": 1e-9}),
        ),
        model="meta-llama/Llama-2-7b-hf",
        scorers=("beaver_dam=0.7",),
        data={"sst2": "/data/ü 1", "alpaca": "null"},
    ),
]


@pytest.mark.parametrize("spec", SPECS)
def test_round_trips(spec: RunSpec) -> None:
    for again in (RunSpec.from_json(spec.to_json()), RunSpec.from_yaml(spec.to_yaml())):
        assert again == spec
        assert hash(again) == hash(spec)
        kinds = [{key: type(value) for key, value in part.params.items()} for part in (*again.defense, *again.attack)]
        assert kinds == [
            {key: type(value) for key, value in part.params.items()} for part in (*spec.defense, *spec.attack)
        ]


def test_specs_that_differ_are_different_keys() -> None:
    assert (
        len({*SPECS, RunSpec(seed=1), RunSpec(task="gsm8k"), RunSpec(defense=parse_plugins("vaccine"))})
        == len(SPECS) + 3
    )
    assert RunSpec(data={"a": "1", "b": "2"}) in {RunSpec(data={"b": "2", "a": "1"})}


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": -1}', "seed"),
        ('{"sed": 1}', "sed"),
        ('{"defense": [{"nme": "sft"}]}', "defense.0"),
        ("[]", "the whole"),
        ("{", ""),
        ("", ""),
    ],
)
def test_what_is_no_spec_is_bad_input(text: str, said: str) -> None:
    for read in (RunSpec.from_json, RunSpec.from_yaml):
        with pytest.raises(BadInput, match="Not a run") as refusal:
            read(text)
        assert said in str(refusal.value)


def test_equal_values_have_equal_digests_whatever_their_order() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    # SHA-256 of the two characters {} (echo -n '{}' | sha256sum)
    assert digest({}) == "44136fa355b3678a1146"


# ---------------------------------------------------------------------------------------------------------------------
# Which value wins


def test_written_over_protocol_over_default_and_the_origin_is_kept() -> None:
    one = settled("demo:alpha=3", {"demo": {"alpha": 2, "steps": 7}})[0]
    assert one.params == {"alpha": 3.0, "lam": 0.5, "steps": 7, "mode": "hard", "deep": False, "label": "x"}
    assert (one.plugin.alpha, one.plugin.steps, one.plugin.lam) == (3.0, 7, 0.5)
    assert one.origins == {
        "alpha": "written", "steps": "protocol house", "lam": "default: paper, eq. 2", "mode": "default: ours",
        "deep": "default: ours", "label": "default: ours",
    }  # fmt: skip


def test_the_protocol_wins_over_the_default_where_nothing_is_written() -> None:
    one = settled("demo", {"demo": {"alpha": 2}, "bare": {}})[0]
    assert (one.params["alpha"], one.origins["alpha"]) == (2.0, "protocol house")


def test_a_bare_value_goes_to_the_main_parameter() -> None:
    assert settled("demo=4")[0].params["alpha"] == 4.0
    assert settled("demo=4")[0].origins["alpha"] == "written"


def test_values_take_the_type_of_their_parameter() -> None:
    one = settled("demo:alpha=1e-3,steps=4,mode=soft,deep=true,label=17")[0].params
    assert one == {"alpha": 0.001, "lam": 0.5, "steps": 4, "mode": "soft", "deep": True, "label": "17"}


@pytest.mark.parametrize("edge", ["demo=0", "demo=8", "demo:steps=1", "demo:lam=1e-300"])
def test_the_ends_of_a_range_are_allowed(edge: str) -> None:
    assert settled(edge)


@pytest.mark.parametrize(
    ("text", "key", "value", "allowed"),
    [
        ("demo=-0.001", "alpha", "-0.001", "a number >= 0 and <= 8"),
        ("demo=8.001", "alpha", "8.001", "a number >= 0 and <= 8"),
        ("demo=nan", "alpha", "nan", "a number >= 0 and <= 8"),
        ("demo=inf", "alpha", "inf", "a number >= 0 and <= 8"),
        ("demo=much", "alpha", "much", "a number >= 0 and <= 8"),
        ("demo:lambda=0", "lam", "0", "a number > 0"),
        ("demo:steps=0", "steps", "0", "a whole number >= 1"),
        ("demo:steps=1.5", "steps", "1.5", "a whole number >= 1"),
        ("demo:mode=sft", "mode", "sft", "hard | soft"),
        ("demo:deep=maybe", "deep", "maybe", "true | false"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(text: str, key: str, value: str, allowed: str) -> None:
    with pytest.raises(BadInput) as refusal:
        settled(text)
    said = str(refusal.value)
    assert "'demo'" in said
    assert f"{key}={value}" in said
    assert allowed in said
    assert "\n" not in said


def test_a_value_of_the_protocol_is_checked_too() -> None:
    with pytest.raises(BadInput, match="steps=0"):
        settled("demo", {"demo": {"steps": 0}})
    with pytest.raises(BadInput, match="'stps'"):
        settled("demo", {"demo": {"stps": 3}})


def test_an_unknown_parameter_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(BadInput) as refusal:
        settled("demo:alpa=3")
    said = str(refusal.value)
    assert "'alpa'" in said
    assert "Did you mean 'alpha'?" in said
    assert "alpha, deep, label, lam, mode, steps" in said


def test_a_plugin_without_parameters_takes_none() -> None:
    with pytest.raises(BadInput, match="'bare' takes no bare value"):
        settled("bare=4")
    with pytest.raises(BadInput, match="Allowed: none"):
        settled("bare:rho=4")


def test_one_name_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="'demo' is named twice"):
        settled("demo=1+bare+demo=2")


def test_the_papers_values_are_the_defaults() -> None:
    assert resolve_plugins(parse_plugins("vaccine"), DEFENSES, {}, "x")[0].params == {"rho": 2.0, "tau": 1}
    assert resolve_plugins(parse_plugins("ratio"), ATTACKS, {}, "x")[0].params == {"p": 0.1}
    assert resolve_plugins(parse_plugins("samples"), ATTACKS, {}, "x")[0].params == {"n": 1000}


@pytest.mark.parametrize("text", ["ratio=-0.01", "ratio=1.01", "ratio:p=2", "samples=0", "samples=-5", "samples=2.5"])
def test_the_attacks_ranges(text: str) -> None:
    with pytest.raises(BadInput, match="is not allowed"):
        resolve_plugins(parse_plugins(text), ATTACKS, {}, "x")


# ---------------------------------------------------------------------------------------------------------------------
# Canonical strings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo", "demo"),
        ("demo=4", "demo=4"),
        ("demo:alpha=4.0", "demo=4"),
        ("demo: steps=3 , alpha=4", "demo:alpha=4,steps=3"),
        ("demo:lambda=2", "demo:lam=2"),
        ("bare + demo=0.50", "bare+demo=0.5"),
        ("demo:deep=yes", "demo:deep=true"),
    ],
)
def test_canonical_strings(text: str, expected: str) -> None:
    said = canonical_name(settled(text))
    if expected == "demo:alpha=4,steps=3":  # the order of the parameters is free, as long as it is one
        assert set(said.removeprefix("demo:").split(",")) == {"alpha=4", "steps=3"}
        assert said == canonical_name(settled("demo:alpha=4,steps=3"))
    else:
        assert said == expected


def test_what_the_protocol_settled_is_not_in_the_canonical_string() -> None:
    assert canonical_name(settled("demo:steps=3", {"demo": {"alpha": 2}})) == "demo:steps=3"


@pytest.mark.parametrize(
    "text",
    ["demo=4", "demo=0.123456789", "demo=1e-7", "demo:lam=1e38", "demo:lam=123456789.5", "demo:alpha=1,mode=soft+bare",
     "demo:deep=false"],
)  # fmt: skip
def test_a_canonical_string_reads_back_to_the_same_parameters(text: str) -> None:
    first = settled(text)
    again = settled(canonical_name(first))
    assert [one.params for one in again] == [one.params for one in first]
    assert canonical_name(again) == canonical_name(first)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_exit_codes() -> None:
    assert (BadInput("x").exit_code, HbvError("x").exit_code) == (2, 1)


def test_an_unknown_name_is_told_with_the_nearest_and_every_valid_one() -> None:
    assert str(unknown_name("task", "ss2", ["sst2", "agnews"])) == (
        "Unknown task 'ss2'. Did you mean 'sst2'? Allowed: agnews, sst2."
    )
    assert str(unknown_name("task", "zzz", ["sst2"])) == "Unknown task 'zzz'. Allowed: sst2."
    assert str(unknown_name("run", "zzz", [])) == "Unknown run 'zzz'. Allowed: none."


@pytest.mark.parametrize(
    ("registry", "name", "nearest"),
    [(DEFENSES, "vacine", "vaccine"), (DEFENSES, "Random-Vaccin", "random_vaccine"), (ATTACKS, "ratios", "ratio")],
)
def test_the_nearest_plugin_is_named(registry: Any, name: str, nearest: str) -> None:
    with pytest.raises(BadInput, match=f"Did you mean '{nearest}'"):
        registry.get(name)
