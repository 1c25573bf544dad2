"""A plug-in that a Python program constructs makes the checks of the command line, with the same sentences."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.safe_lora import SafeLoRA
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.plugins import Defense, Plugin, param
from harmbench_vaccine.plugins.composition import parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import REGISTRIES, Registry
from harmbench_vaccine.plugins.tasks.sst2 import SST2

BUILT_INS = [(registry, cls) for registry in REGISTRIES for cls in registry.loadable().values()]


class TwoBounds(Defense):
    """A defense of a script, with two bounds and a choice of None."""

    low: float = param(0.5, "a share", source="the test", ge=0, le=1)
    high: int | None = param(None, "a number of steps", source="the test", gt=0)

    def model_post_init(self, context: Any, /) -> None:
        """Compare two parameters."""
        if self.high == 13:
            raise ValueError("high=13 brings bad luck")


@pytest.mark.parametrize(
    ("cls", "params", "sentence"),
    [
        (Vaccine, {"rho": -1}, "defense 'vaccine': rho=-1 is not allowed; allowed: a number >= 0."),
        (Vaccine, {"rho": float("nan")}, "defense 'vaccine': rho=nan is not allowed; allowed: a number >= 0."),
        (Vaccine, {"rho": "much"}, "defense 'vaccine': rho=much is not allowed; allowed: a number >= 0."),
        (Vaccine, {"rho": [1]}, "defense 'vaccine': rho=[1] is not allowed; allowed: a number >= 0."),
        (Vaccine, {"rh": 5}, "Unknown parameter 'rh' of defense 'vaccine'. Did you mean 'rho'? Allowed: rho, tau."),
        (
            SST2,
            {"rule": "loose"},
            "task 'sst2': rule=loose is not allowed; allowed: contains | equals | contains_any_case.",
        ),
        (TwoBounds, {"low": 2}, "defense 'two_bounds': low=2 is not allowed; allowed: a number >= 0 and <= 1."),
        (
            TwoBounds,
            {"high": 0},
            "defense 'two_bounds': high=0 is not allowed; allowed: a whole number > 0, or none.",
        ),
        (TwoBounds, {"high": 13}, "defense 'two_bounds': high=13 brings bad luck."),
    ],
)
def test_refused_value_is_one_sentence(cls: type[Plugin], params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as refused:
        cls(**params)
    assert str(refused.value) == sentence


def refused_values(cls: type[Plugin]) -> Iterator[tuple[str, Any]]:
    """Yield values that a class must refuse: of another type, on the wrong side of each bound, and unknown names."""
    yield "parameter_of_nothing", 1
    for name, field in cls.model_fields.items():
        if "str" not in str(field.annotation):
            yield name, "a text"
        for bound in field.metadata:
            beyond = {"ge": -1, "gt": 0, "le": 1}
            for kind, step in beyond.items():
                if (limit := getattr(bound, kind, None)) is not None:
                    yield name, limit + step


@pytest.mark.parametrize(("registry", "cls"), BUILT_INS, ids=[f"{cls.kind} {cls.name}" for _, cls in BUILT_INS])
def test_sentences_are_those_of_the_command_line(registry: Registry[Any], cls: type[Plugin]) -> None:
    for name, value in refused_values(cls):
        with pytest.raises(BadInput) as of_object:
            cls(**{name: value})
        with pytest.raises(BadInput) as of_text:
            resolve_plugins(parse_plugins(f"{cls.name}:{name}={value}"), registry, {}, "")
        assert str(of_object.value) == str(of_text.value)
        assert f"of {cls.kind} {cls.name!r}" in str(of_object.value) or str(of_object.value).startswith(
            f"{cls.kind} {cls.name!r}: {name}={value} is not allowed; allowed: "
        )


def test_numeric_bounds_are_tried() -> None:
    """The loop above is not empty: many parameters have bounds."""
    tried = chain.from_iterable(refused_values(cls) for _, cls in BUILT_INS)
    assert sum(not isinstance(value, str) for _, value in tried) > len(BUILT_INS) + 20


def test_name_before_a_registry_has_loaded_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SafeLoRA, "name")
    with pytest.raises(BadInput, match=r"^Unknown parameter 'x' of defense 'safe_lora'"):
        SafeLoRA(x=1)
