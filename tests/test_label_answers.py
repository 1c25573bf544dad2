"""Sentences as answers of label tasks: they name their own label only, and the row decides the sentence."""

from __future__ import annotations

from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins import Task
from harmbench_vaccine.plugins.tasks.agnews import AGNews
from harmbench_vaccine.plugins.tasks.sst2 import SST2

SENTENCES = ("I call this {label}.", "Overall it is {label}.", "{label}, I think.")
ROWS: list[tuple[type[Task], dict[str, Any]]] = [
    (SST2, {"sentence": "a fine film", "label": 1}),
    (AGNews, {"text": "Chip makers merge", "label": 3}),
]


@pytest.mark.parametrize(("task", "row"), ROWS)
def test_row_decides_the_sentence(task: type[Task], row: dict[str, Any]) -> None:
    sentences = task(answers=" | ".join(SENTENCES))
    sentences.check()
    plain = task()
    responses = set()
    for number in range(50):
        example = sentences.example(f"row:{number}", row)
        assert example == sentences.example(f"row:{number}", row)
        assert example.target == plain.example(f"row:{number}", row).response
        assert sentences.flexible(example.response, example.target)
        responses.add(example.response.replace(example.target, "{label}"))
    assert responses == set(SENTENCES)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("I call this {label}. | Overall it is.", r":answers lacks \{label\}: 'Overall it is.'"),
        ("I call this {label}. | ", r"lacks \{label\}: ''"),
        ("It is {label}, not negative.", "counts for 'negative', 'positive'"),
    ],
)
def test_sentence_without_one_label_is_refused(answers: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        SST2(answers=answers).check()


def test_rule_equals_needs_the_label_alone() -> None:
    with pytest.raises(BadInput, match="counts for no label by the rule 'equals'"):
        SST2(answers="It is {label}.", rule="equals").check()
