"""Run specifications: grammar, round trips, precedence of values, error messages."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
from pydantic import ValidationError, model_validator

from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.hashing import canonical_json, digest
from harmbench_vaccine.experiment.spec import RunSpec, first_validation_error
from harmbench_vaccine.plugins import Defense, Plugin, param
from harmbench_vaccine.plugins.base import resolve_params
from harmbench_vaccine.plugins.composition import Component, canonical_name, parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES


class Demo(Defense):
    """A defense with every kind of parameter."""

    name: ClassVar[str] = "demo"

    alpha: float = param(1.0, "a share", source="paper, table 1", main=True, ge=0, le=8)
    lam: float = param(0.5, "a weight", source="paper, eq. 2", gt=0)
    steps: int = param(10, "a count", source="code, line 3", ge=1)
    mode: Literal["hard", "soft"] = param("hard", "a choice", source="ours")
    deep: bool = param(False, "a switch", source="ours")
    label: str = param("x", "a text", source="ours")


class Bare(Defense):
    """A defense without parameters."""

    name: ClassVar[str] = "bare"


class Registry:
    """A registry of two defenses."""

    def get(self, name: str) -> type[Plugin]:
        return {"demo": Demo, "bare": Bare}[name]


def resolved(text: str, protocol: dict[str, dict[str, Any]] | None = None) -> list[Any]:
    return resolve_plugins(parse_plugins(text), Registry(), protocol or {}, "house")  # type: ignore[arg-type]


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
def test_grammar(text: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert pairs(text) == expected


def test_comma_and_plus_between_values_are_equivalent() -> None:
    assert parse_plugins("ratio=0.1,samples=500") == parse_plugins("ratio=0.1+samples=500")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "vaccine+",
        "+vaccine",
        "a b",
        "9lives",
        "vaccine:",
        "vaccine:rho",
        "vaccine:rho=",
        "vaccine:=5",
        "vaccine:rho=5,",
        "ratio=",
        "ratio=0.1,",
        "=0.1",
        "vaccine!",
    ],
)
def test_syntax_error_quotes_the_grammar(text: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_plugins(text)
    assert repr(text) in str(error.value)
    assert "name=VALUE" in str(error.value)
    assert "\n" not in str(error.value)


def test_repeated_parameter_is_refused() -> None:
    with pytest.raises(BadInput, match="rho"):
        parse_plugins("vaccine:rho=5,rho=6")


def test_lambda_and_lam_are_one_parameter() -> None:
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
    again = RunSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    types, expected = (
        [{key: type(value) for key, value in part.params.items()} for part in (*run.defense, *run.attack)]
        for run in (again, spec)
    )
    assert types == expected


def test_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": -1}', "seed"),
        ('{"sed": 1}', "sed"),
        ('{"defense": [{"nme": "sft"}]}', "defense.0"),
        ("[]", "the top level"),
    ],
)
def test_invalid_spec_names_the_field(text: str, message: str) -> None:
    with pytest.raises(ValidationError) as invalid:
        RunSpec.model_validate_json(text)
    assert message in first_validation_error(invalid.value)


def test_digest_ignores_the_order_of_keys() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    # SHA-256 of the two characters {} (echo -n '{}' | sha256sum)
    assert digest({}) == "44136fa355b3678a1146"


# ---------------------------------------------------------------------------------------------------------------------
# Precedence of values


def test_precedence_and_origins() -> None:
    one = resolved("demo:alpha=3", {"demo": {"alpha": 2, "steps": 7}})[0]
    assert one.params == {"alpha": 3.0, "lam": 0.5, "steps": 7, "mode": "hard", "deep": False, "label": "x"}
    assert (one.plugin.alpha, one.plugin.steps, one.plugin.lam) == (3.0, 7, 0.5)
    assert one.origins == {
        "alpha": "written",
        "steps": "protocol house",
        "lam": "default: paper, eq. 2",
        "mode": "default: ours",
        "deep": "default: ours",
        "label": "default: ours",
    }


def test_protocol_overrides_the_default() -> None:
    one = resolved("demo", {"demo": {"alpha": 2}, "bare": {}})[0]
    assert (one.params["alpha"], one.origins["alpha"]) == (2.0, "protocol house")


def test_bare_value_sets_the_main_parameter() -> None:
    assert resolved("demo=4")[0].params["alpha"] == 4.0
    assert resolved("demo=4")[0].origins["alpha"] == "written"


def test_values_are_converted_to_the_type_of_the_parameter() -> None:
    one = resolved("demo:alpha=1e-3,steps=4,mode=soft,deep=true,label=17")[0].params
    assert one == {"alpha": 0.001, "lam": 0.5, "steps": 4, "mode": "soft", "deep": True, "label": "17"}


@pytest.mark.parametrize("edge", ["demo=0", "demo=8", "demo:steps=1", "demo:lam=1e-300"])
def test_bounds_of_a_range_are_allowed(edge: str) -> None:
    assert resolved(edge)


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
def test_value_out_of_range_is_refused(text: str, key: str, value: str, allowed: str) -> None:
    with pytest.raises(BadInput) as error:
        resolved(text)
    message = str(error.value)
    assert "'demo'" in message
    assert f"{key}={value}" in message
    assert allowed in message
    assert "\n" not in message


def test_values_of_the_protocol_are_validated() -> None:
    with pytest.raises(BadInput, match="steps=0"):
        resolved("demo", {"demo": {"steps": 0}})
    with pytest.raises(BadInput, match="'stps'"):
        resolved("demo", {"demo": {"stps": 3}})


def test_unknown_parameter_suggests_the_nearest() -> None:
    with pytest.raises(BadInput) as error:
        resolved("demo:alpa=3")
    message = str(error.value)
    assert "'alpa'" in message
    assert "Did you mean 'alpha'?" in message
    assert "alpha, deep, label, lam, mode, steps" in message


def test_plugin_without_parameters() -> None:
    with pytest.raises(BadInput, match="'bare' takes no bare value"):
        resolved("bare=4")
    with pytest.raises(BadInput, match="Allowed: none"):
        resolved("bare:rho=4")


def test_repeated_plugin_is_refused() -> None:
    with pytest.raises(BadInput, match="'demo' is named twice"):
        resolved("demo=1+bare+demo=2")


def test_defaults_are_the_values_of_the_paper() -> None:
    assert resolve_plugins(parse_plugins("vaccine"), DEFENSES, {}, "x")[0].params == {"rho": 2.0, "tau": 1}
    assert resolve_plugins(parse_plugins("ratio"), ATTACKS, {}, "x")[0].params == {"p": 0.1}
    assert resolve_plugins(parse_plugins("samples"), ATTACKS, {}, "x")[0].params == {"n": 1000}


@pytest.mark.parametrize("text", ["ratio=-0.01", "ratio=1.01", "ratio:p=2", "samples=0", "samples=-5", "samples=2.5"])
def test_ranges_of_attacks(text: str) -> None:
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
    name = canonical_name(resolved(text))
    if expected == "demo:alpha=4,steps=3":  # any order of the parameters is right, but it must be constant
        assert set(name.removeprefix("demo:").split(",")) == {"alpha=4", "steps=3"}
        assert name == canonical_name(resolved("demo:alpha=4,steps=3"))
    else:
        assert name == expected


def test_canonical_string_omits_values_of_the_protocol() -> None:
    assert canonical_name(resolved("demo:steps=3", {"demo": {"alpha": 2}})) == "demo:steps=3"


@pytest.mark.parametrize(
    "text",
    [
        "demo=4",
        "demo=0.123456789",
        "demo=1e-7",
        "demo:lam=1e38",
        "demo:lam=123456789.5",
        "demo:alpha=1,mode=soft+bare",
        "demo:deep=false",
    ],
)
def test_canonical_string_is_parsed_to_the_same_parameters(text: str) -> None:
    first = resolved(text)
    again = resolved(canonical_name(first))
    assert [one.params for one in again] == [one.params for one in first]
    assert canonical_name(again) == canonical_name(first)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_exit_codes() -> None:
    assert (BadInput("x").exit_code, HbvError("x").exit_code) == (2, 1)


def test_unknown_name_suggests_the_nearest() -> None:
    assert str(unknown_name("task", "ss2", ["sst2", "agnews"])) == (
        "Unknown task 'ss2'. Did you mean 'sst2'? Allowed: agnews, sst2."
    )
    assert str(unknown_name("task", "zzz", ["sst2"])) == "Unknown task 'zzz'. Allowed: sst2."
    assert str(unknown_name("run", "zzz", [])) == "Unknown run 'zzz'. Allowed: none."
    assert str(unknown_name("attack", "sft", ["ratio"], other_kind="defense")) == (
        "'sft' is a defense, not an attack. Allowed: ratio."
    )


def test_an_error_lists_only_the_nearest_of_many_names() -> None:
    message = str(unknown_name("run", "sft-07", [f"sft-{number:02}" for number in range(60)] + ["other"]))
    assert message.startswith("Unknown run 'sft-07'. Did you mean 'sft-07'?")
    assert message.endswith(", and 49 more.")
    assert "other" not in message
    assert "more" not in str(unknown_name("run", "x", [f"sft-{number:02}" for number in range(60)]))


@pytest.mark.parametrize(
    ("registry", "name", "nearest"),
    [(DEFENSES, "vacine", "vaccine"), (DEFENSES, "Random-Vaccin", "random_vaccine"), (ATTACKS, "ratios", "ratio")],
)
def test_registry_suggests_the_nearest_plugin(registry: Any, name: str, nearest: str) -> None:
    with pytest.raises(BadInput, match=f"Did you mean '{nearest}'"):
        registry.get(name)


def test_validator_that_compares_parameters_is_bad_input() -> None:
    class Pair(Defense):
        """A defense whose parameters depend on each other."""

        name: ClassVar[str] = "pair"
        low: int = param(1, "a count", source="ours")
        high: int = param(2, "a count", source="ours")

        @model_validator(mode="after")
        def _check(self) -> Pair:
            if self.low > self.high:
                raise ValueError("low is above high")
            return self

    with pytest.raises(BadInput, match=r"defense 'pair': low is above high\."):
        resolve_params(Pair, {"low": 3})
