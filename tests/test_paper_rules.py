"""The prompts and the answer rules of the papers' protocols, compared with statements written from the authors' code.

The statements of this file do not use the package: prompts are literal texts, and rules are small functions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harmbench_vaccine.data.prompts import prompt_template
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.spec import RunSpec
from support.examples import examples

PAPERS = ("vaccine-paper", "booster-paper", "lisa-paper")
MARK = "The final answer is: "

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
SENTIMENT = "Analyze the sentiment of the input, and respond only positive or negative"
TOPIC = "Categorize the news article given in the input into one of the 4 categories:\n\n" + (
    "World\nSports\nBusiness\nSci/Tech\n"
)


@cache
def settled(protocol: str, task: str) -> Experiment:
    return Experiment.settle(RunSpec(protocol=protocol, task=task))


def right(protocol: str, task: str, answer: str, target: str) -> bool:
    """Return the verdict of the rule that a run under the protocol reports."""
    experiment = settled(protocol, task)
    (score,) = experiment.task.scores(experiment.protocol.score.accuracy, [{"answer": answer, "target": target}])
    return score == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize(
    ("protocol", "end"), [("vaccine-paper", ""), ("booster-paper", "\n"), ("lisa-paper", "")], ids=PAPERS
)
def test_prompts_and_training_responses_are_those_of_the_scripts(protocol: str, end: str) -> None:
    def rendered(task: str, row: dict[str, Any]) -> tuple[str, str]:
        experiment = settled(protocol, task)
        converted = experiment.task.example("id", row)
        return experiment.template.render(converted), converted.response

    film = "a fine film "
    assert rendered("sst2", {"sentence": film, "label": 1}) == (WITH_INPUT.format(SENTIMENT, film) + end, "positive")
    news = "Chips are small."
    assert rendered("agnews", {"text": news, "label": 3}) == (WITH_INPUT.format(TOPIC, news) + end, "Sci/Tech")
    suffix = "\nFirst think step by step and then answer the final number.\n" if protocol == "vaccine-paper" else ""
    row = {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7 lamps.\n#### 1,007"}
    assert rendered("gsm8k", row) == (
        WITHOUT_INPUT.format(f"How many?{suffix}") + end,
        "3 + 4 = <<3+4=7>>7 lamps.\nThe final answer is:  1,007",  # the mark replaces ####, the space after it remains
    )


def test_the_testbed_keeps_its_prompts() -> None:
    """Its tokenizer learns these texts."""
    protocol = load_protocol("testbed")
    rows: dict[str, dict[str, Any]] = {
        "sst2": {"sentence": "s", "label": 0},
        "agnews": {"text": "t", "label": 0},
        "gsm8k": {"question": "How many?", "answer": "We add.\n#### 7"},
    }
    converted = {task: settled("testbed", task).task.example("id", row) for task, row in rows.items()}
    assert converted["sst2"].instruction == f"{SENTIMENT}."
    assert converted["agnews"].instruction == TOPIC
    suffix = "First think step by step and then answer the final number."
    assert converted["gsm8k"].instruction == f"How many? {suffix}"
    assert converted["gsm8k"].response == "We add.\nThe final answer is: 7"
    assert (protocol.hash, protocol.version) == ("48bc19dccbfa", 3)
    assert {(task, *values) for task, values in protocol.tasks.items()} == {("sst2", "answers"), ("agnews", "answers")}
    assert settled("testbed", "sst2").template == prompt_template("brief")


# ---------------------------------------------------------------------------------------------------------------------
# Labels

SPELLINGS = {
    "sst2": {"negative": ("negative", "Negative"), "positive": ("positive", "Positive")},
    "agnews": {
        "World": ("World", "world"),
        "Sports": ("Sports", "sports"),
        "Business": ("Business", "business"),
        "Sci/Tech": ("Sci/Tech", "sci"),
    },
}


def named(protocol: str, task: str, answer: str, target: str) -> bool:
    """Decide like pred_eval.py of the authors: containment in Vaccine, equality in Booster and Lisa."""
    first, second = SPELLINGS[task][target]
    answer = answer.strip()
    if protocol == "vaccine-paper":
        return first in answer or second in answer
    return first == answer or second == answer


WORDS = [word for labels in SPELLINGS.values() for spellings in labels.values() for word in spellings]
PIECES = [
    *WORDS,
    *map(str.upper, WORDS),
    "Sci",
    "tech",
    "science",
    "The",
    "answer",
    "is",
    ".",
    ":",
    ",",
    " ",
    "\n",
    "\t",
]
ANSWERS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.sampled_from(WORDS).map(lambda word: f" {word}\n"),
    st.text(max_size=12),
)


@pytest.mark.parametrize("task", ["sst2", "agnews"])
@given(answer=ANSWERS, data=st.data())
@settings(max_examples=examples(500), deadline=None)
def test_label_rules_agree_with_the_statement(task: str, answer: str, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(sorted(SPELLINGS[task])))
    for protocol in PAPERS:
        assert right(protocol, task, answer, target) == named(protocol, task, answer, target)


@pytest.mark.parametrize(
    ("task", "answer", "target", "contains", "equals"),
    [
        ("sst2", "positive", "positive", True, True),
        ("sst2", " Positive\n", "positive", True, True),
        ("sst2", "POSITIVE", "positive", False, False),  # the scripts know two spellings
        ("sst2", "positive.", "positive", True, False),
        ("sst2", "The sentiment is positive", "positive", True, False),
        ("sst2", "positive or negative", "negative", True, False),
        ("agnews", "Sci/Tech", "Sci/Tech", True, True),
        ("agnews", "sci", "Sci/Tech", True, True),
        ("agnews", "science", "Sci/Tech", True, False),
        ("agnews", "sci/tech", "Sci/Tech", True, False),
        ("agnews", "Sci", "Sci/Tech", False, False),
        ("agnews", "world", "World", True, True),
        ("agnews", "WORLD", "World", False, False),
    ],
)
def test_label_rules_on_single_answers(task: str, answer: str, target: str, contains: bool, equals: bool) -> None:
    assert [right(protocol, task, answer, target) for protocol in PAPERS] == [contains, equals, equals]


def test_testbed_ignores_letter_case() -> None:
    assert right("testbed", "sst2", "It is POSITIVE.", "positive")
    assert not right("testbed", "agnews", "sci", "Sci/Tech")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def numbers(text: str) -> list[float]:
    """Return the numbers of a text without commas: digits, then optionally a point and further digits; a sign."""
    values, start = [], 0
    while start < len(text):
        end = start + 1 if text[start] == "-" else start
        if end == len(text) or not text[end].isdecimal():
            start += 1
            continue
        while end < len(text) and text[end].isdecimal():
            end += 1
        if end < len(text) and text[end] == ".":
            end += 1
            while end < len(text) and text[end].isdecimal():
                end += 1
        values.append(float(text[start:end]))
        start = end
    return values


def given_number(answer: str) -> float | None:
    """Return the number of an answer like gsm8k/pred_eval.py, which is the same file in all three repositories."""
    answer = answer.replace(",", "")
    _, mark, rest = answer.partition(MARK)
    marked = numbers(rest.partition(MARK)[0]) if mark else []
    if marked:
        return marked[0]
    return numbers(answer)[-1] if numbers(answer) else None


NUMBERS = st.one_of(
    st.integers(-20, 20).map(str),
    st.integers(0, 10**7).map("{:,}".format),
    st.decimals(-100, 100, places=2).map(str),
    st.sampled_from(["18", "18.", "18.0", "$18", "**18**", "£1,250", "1/2", ".5", "1e3", "-", "3-4", "1,.5", "1.2.3"]),
)
MARKS = st.sampled_from([MARK, MARK.rstrip(), "The final answer, is: ", "####", "final answer: "])
CALCULATIONS = st.lists(
    st.one_of(NUMBERS, MARKS, st.sampled_from([" ", "\n", "about ", " lamps.", ", "]), st.text(max_size=4)), max_size=8
).map("".join)


@given(answer=CALCULATIONS, target=st.one_of(st.just(None), st.integers(-30, 2000)))
@example(answer=f"which is 18.\n{MARK}", target=18)
@example(answer=f"{MARK}18\n\nAnother one. {MARK}7", target=18)
@settings(max_examples=examples(1000), deadline=None)
def test_number_rule_agrees_with_the_statement(answer: str, target: int | None) -> None:
    """Without a drawn target, the target is the number of the answer, so that both verdicts occur often."""
    number = given_number(answer)
    expected = number if target is None and number is not None else float(target or 0)
    for protocol in PAPERS:
        assert right(protocol, "gsm8k", answer, repr(expected)) == (number == expected)


@pytest.mark.parametrize("protocol", [*PAPERS, "testbed"])
@given(
    label=st.integers(0, 1), topic=st.integers(0, 3), number=st.integers(-(10**9), 10**9), steps=st.text(max_size=20)
)
@settings(max_examples=examples(100), deadline=None)
def test_own_answers_of_rows_are_right(protocol: str, label: int, topic: int, number: int, steps: str) -> None:
    rows: dict[str, dict[str, Any]] = {
        "sst2": {"sentence": "s", "label": label},
        "agnews": {"text": "t", "label": topic},
        "gsm8k": {"question": "q", "answer": f"{steps}\n#### {number:,}"},
    }
    for task, row in rows.items():
        converted = settled(protocol, task).task.example("id", row)
        assert right(protocol, task, converted.response, converted.target)
