"""`hbv why` words the inputs that differ between two artifacts."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from harmbench_vaccine.evaluation.why import Difference, Explanation, compare_inputs
from harmbench_vaccine.reporting.why_view import why_view
from support.results import make_result


def test_empty_input_is_left_out_next_to_the_fields_of_the_other() -> None:
    none: dict[str, Any] = {"defense": [], "data": {}}
    one = {"defense": [{"name": "vaccine"}], "data": {"sst2": "folder"}}
    assert compare_inputs(one, none) == [
        Difference("defense.0.name", "vaccine", None),
        Difference("data.sst2", "folder", None),
    ]
    assert compare_inputs(none, one) == [
        Difference("defense.0.name", None, "vaccine"),
        Difference("data.sst2", None, "folder"),
    ]
    assert compare_inputs({"defense": "vaccine"}, one) == [
        Difference("defense", "vaccine", None),
        Difference("defense.0.name", None, "vaccine"),
        Difference("data.sst2", None, "folder"),
    ]


@pytest.mark.parametrize(
    ("value", "earlier", "text"),
    [
        ("vaccine", None, "defense = vaccine (absent)"),
        (None, "vaccine", "defense is absent (vaccine)"),
        ([], 0, "defense is empty (0)"),
        (0, {}, "defense = 0 (empty)"),
    ],
)
def test_why_words_absent_and_empty_inputs(value: Any, earlier: Any, text: str) -> None:
    explanation = Explanation("align", "align", "1" * 20, "created", "2" * 20, [Difference("defense", value, earlier)])
    console = Console(width=140)
    with console.capture() as capture:
        console.print(why_view(make_result(), [explanation]))
    assert text in capture.get()
