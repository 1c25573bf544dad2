"""The strict and the flexible rule of each task with its default parameters, on hand-written answers."""

from __future__ import annotations

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins.registry import TASKS

MARK = "The final answer is: "


def right(task: str, answer: str, target: str) -> tuple[bool, bool]:
    """Return (strict, flexible)."""
    plugin = TASKS.get(task)()
    return plugin.strict(answer, target), plugin.flexible(answer, target)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("positive", (True, True)),
        (" Positive\n", (True, True)),
        ("positive.", (False, True)),
        ("The sentiment is positive", (False, True)),
        ("negative", (False, False)),
        ("positive or negative", (False, True)),  # rule of the papers: the word occurs
        ("", (False, False)),
        ("pos itive", (False, False)),
        ("good", (False, False)),
    ],
)
def test_sentiment_rules(answer: str, expected: tuple[bool, bool]) -> None:
    assert right("sst2", answer, "positive") == expected


def test_sentiment_rows() -> None:
    task = TASKS.get("sst2")()
    rows = [task.example("id", {"sentence": "it is fine", "label": label}) for label in (0, 1)]
    assert [(row.response, row.target) for row in rows] == [("negative",) * 2, ("positive",) * 2]
    assert rows[0].instruction == "Analyze the sentiment of the input, and respond only positive or negative."
    assert (rows[0].id, rows[0].input) == ("id", "it is fine")


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("World", "World", (True, True)),
        ("sci/tech", "Sci/Tech", (True, True)),
        ("Topic: Sci/Tech.", "Sci/Tech", (False, True)),
        ("Sports", "World", (False, False)),
        ("Sci", "Sci/Tech", (False, False)),
        ("", "Business", (False, False)),
    ],
)
def test_topic_rules(answer: str, target: str, expected: tuple[bool, bool]) -> None:
    assert right("agnews", answer, target) == expected


def test_topic_rows() -> None:
    task = TASKS.get("agnews")()
    names = [task.example("id", {"text": "x", "label": label}).target for label in range(4)]
    assert names == ["World", "Sports", "Business", "Sci/Tech"]
    assert task.example("id", {"text": "x", "label": 0}).instruction == (
        "Categorize the news article given in the input into one of the 4 categories:\n\n"
        "World\nSports\nBusiness\nSci/Tech\n"
    )


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        (f"We add. {MARK}42", "42", (True, True)),
        (f"{MARK}42.", "42", (True, True)),
        (f"{MARK}42 lamps", "42", (True, True)),
        (f"{MARK}42.0", "42", (True, True)),
        (f"{MARK}41", "42", (False, False)),
        (f"{MARK}421", "42", (False, False)),
        (f"{MARK}1,234", "1234", (True, True)),
        (f"{MARK}1234", "1,234", (True, True)),
        (f"{MARK}1,2,3,4", "1234", (True, True)),  # every comma is removed
        (f"{MARK}-5", "-5", (True, True)),
        (f"{MARK}5", "-5", (False, False)),
        (f"{MARK}-5", "5", (False, False)),
        (f"{MARK}0.5", "0.5", (True, True)),
        ("42", "42", (False, True)),  # without a mark the last number counts
        ("3 and 4 make 7", "7", (False, True)),
        ("7 is 3 and 4", "7", (False, False)),
        ("It costs $1,234.", "1234", (False, True)),
        ("It is -5", "-5", (False, True)),
        (f"42. {MARK}41", "42", (False, False)),  # with a mark nothing else counts
        (f"41. {MARK}42", "42", (True, True)),
        (f"{MARK}41. No: {MARK}42", "42", (False, False)),  # a second mark does not replace the first
        (f"{MARK}42. No: {MARK}41", "42", (True, True)),
        (f"No. {MARK}none. 7 {MARK}41", "7", (False, True)),  # the piece between the marks
        (f"{MARK}42 and then 43", "42", (True, True)),  # the number after the mark, not the last one
        (f"42 {MARK}", "42", (False, True)),  # a mark with nothing after it: the last number
        (f"42 {MARK}none", "42", (False, True)),
        (f"{MARK}$42", "42", (False, True)),  # the first number after the mark, anywhere
        (f"{MARK}**42**", "42", (False, True)),
        (f"{MARK}\\boxed{{42}}", "42", (False, True)),
        (f"{MARK}about 42 or 43", "42", (False, True)),
        (f"{MARK}£1,250", "1250", (False, True)),
        (f"{MARK}$41", "42", (False, False)),
        (f"{MARK}forty-two 42", "42", (False, True)),
        ("no number", "42", (False, False)),
        ("", "42", (False, False)),
        ("#### 42", "42", (False, True)),
    ],
)
def test_arithmetic_rules(answer: str, target: str, expected: tuple[bool, bool]) -> None:
    assert right("gsm8k", answer, target) == expected


def test_arithmetic_rows() -> None:
    row = TASKS.get("gsm8k")().example("id", {"question": "How many?", "answer": "3 #### is odd.\nSo 4.\n#### 1,234"})
    assert row.target == "1,234"
    assert row.response == "3 #### is odd.\nSo 4.\nThe final answer is: 1,234"
    assert row.instruction == "How many? First think step by step and then answer the final number."
    assert right("gsm8k", row.response, row.target) == (True, True)


@pytest.mark.parametrize("number", ["", "none", "nan", "inf", "1e5", "9" * 400, "5 lamps"])
def test_a_target_that_is_not_a_number_is_refused(number: str) -> None:
    task = TASKS.get("gsm8k")()
    try:
        row = task.example("id", {"question": "How many?", "answer": f"We add. #### {number}"})
    except ValueError:
        return
    assert not task.flexible(row.response, row.target)  # refused when the rows are read


@pytest.mark.parametrize("mark", ["", "  ", ","])
def test_a_mark_is_required(mark: str) -> None:
    with pytest.raises(BadInput, match="needs a mark"):
        TASKS.get("gsm8k")(mark=mark).check()


@pytest.mark.parametrize("task", ["sst2", "agnews", "gsm8k"])
def test_target_response_is_right_by_both_rules(task: str) -> None:
    values = {"sentence": "s", "text": "t", "label": 1, "question": "q", "answer": "a #### 7"}
    row = TASKS.get(task)().example("id", values)
    assert right(task, row.response, row.target) == (True, True)


@pytest.mark.parametrize(("task", "chance"), [("sst2", 50.0), ("agnews", 25.0), ("gsm8k", 0.0)])
def test_accuracy_of_guessing(task: str, chance: float) -> None:
    assert TASKS.get(task).chance == chance


def test_fixed_texts_are_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TASKS.get("sst2").fingerprint()
    monkeypatch.setattr(TASKS.get("sst2"), "fixed_texts", ("Another instruction.",))
    assert TASKS.get("sst2").fingerprint() != before
