"""YAML of protocols and of `--set`: the core schema of YAML 1.2, no surprises, and one error for everything else."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.strict_yaml import read_yaml
from support.examples import examples

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)
"""Ten billion values in ten lines."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),  # YAML 1.1: true
        ("off", "off"),
        ("1e-3", 0.001),  # YAML 1.1: text
        ("1.", 1.0),
        (".5", 0.5),
        ("+7", 7),
        ("010", 10),  # YAML 1.1: 8
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("1_000", "1_000"),  # YAML 1.1: 1000
        ("0x1f", "0x1f"),
        ("2001-01-01", "2001-01-01"),  # YAML 1.1: a date
        ("2001-99-99", "2001-99-99"),
        ("'7'", "7"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{samples: 7}", {"samples": 7}),
        ("a: &x {lr: 1}\nb: *x", {"a": {"lr": 1}, "b": {"lr": 1}}),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert read_yaml(text, "The text") == value
    assert type(read_yaml(text, "The text")) is type(value)


def test_non_finite_numbers_are_read_as_numbers() -> None:
    """The ranges of the values refuse them, with the name of the value."""
    assert [read_yaml(text, "The text") for text in (".inf", "-.INF", "1e999")] == [math.inf, -math.inf, math.inf]
    assert math.isnan(read_yaml(".nan", "The text"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is set twice"),
        ("{1: 2}", "line 1: a name must be text, not 1"),
        ("? [a]\n: b", "line 1: a name must be text, not ['a']"),
        ("!!python/object/apply:os.system [ls]", "line 1: tags (!!python/object/apply:os.system) are not allowed"),
        ("!!binary aGVsbG8=", "line 1: tags (!!binary) are not allowed"),
        ("!!bool maybe", "line 1: tags (!!bool) are not allowed"),
        ("!mine 1", "line 1: tags (!mine) are not allowed"),
        ("&a [*a]", "line 1: *a is inside itself"),
        ("*unknown", "line 1: found undefined alias 'unknown'"),
        (BOMB, "line 5: more than 100000 values"),
        ("9" * 5000, "line 1: a number of 5000 digits is not supported"),
        ("[" * 3000, "it is nested too deeply"),
        ("{a: " * 3000, "it is nested too deeply"),
        ("[1, 2", "line 1: expected ',' or ']'"),
        ("a:\n\t- b", "line 2: found character '\\t' that cannot start any token"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("1\n---\n2", "line 2: but found another document"),
        ("a\x00b", "special characters are not allowed"),
        ("\udcff", "special characters are not allowed"),
        ('"\\U7fffffff"', "not in range"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        read_yaml(text, "The text")
    assert str(refusal.value).startswith("The text cannot be read as YAML: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2027, exclude_categories=["Cc", "Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=examples(200), deadline=None)
@given(JSON)
def test_json_is_read_as_json(value: Any) -> None:
    assert read_yaml(json.dumps(value, ensure_ascii=False), "The text") == value


@settings(max_examples=examples(300), deadline=None)
@given(st.text() | st.text(alphabet="{}[]:,&*!|>-?#%@'\"\n\t 019ae.~<", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(BadInput):
        read_yaml(text, "The text")


@pytest.mark.parametrize("text", ['"', "'", '"a\n--- b"'])
def test_open_quote_is_bad_input_and_not_a_fault_of_the_program(text: str) -> None:
    with pytest.raises(BadInput) as refusal:
        read_yaml(text, "The value")
    assert str(refusal.value).startswith("The value cannot be read as YAML: line ")
    assert "unexpected" not in str(refusal.value)
