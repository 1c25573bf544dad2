"""The readers of answers to a user's task: exact numbers, first words, one Unicode form, verdicts of its judges."""

from __future__ import annotations

import json
import unicodedata
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import check_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.chat_api import ChatJudge
from harmbench_vaccine.plugins.answer_text import comparable_text, first_word
from harmbench_vaccine.plugins.registry import TASKS
from harmbench_vaccine.plugins.tasks._numbers import first_number, last_number, parse_number
from support.examples import examples
from support.world import make_world

RULES = ("exact", "first_word", "number")


def accepts(rule: str, output: str, answer: str) -> bool:
    """Return whether `answer` is right where the row has `output`."""
    task = TASKS.get("own")(data="x.jsonl", rule=rule)
    return task.flexible(answer, task.example("id", {"instruction": "?", "output": output}).target)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1234567890123456", Fraction(1234567890123456)),
        ("12345678901234567", Fraction(12345678901234567)),
        ("0.12345678901234567", Fraction(12345678901234567, 10**17)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("1/2", Fraction(1, 2)),
        ("-6/4", Fraction(-3, 2)),
        ("1e3", Fraction(1000)),
        ("6.02e23", Fraction(602 * 10**21)),
        ("2E-2", Fraction(1, 50)),
        ("+3", Fraction(3)),
        ("−3", Fraction(-3)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("$18", Fraction(18)),
        ("-$18", Fraction(-18)),
        ("$-18", Fraction(-18)),
        ("US$1,000", Fraction(1000)),
        ("18€", Fraction(18)),
        ("€ 18", Fraction(18)),
        ("18 km", Fraction(18)),
        ("18km/h.", Fraction(18)),
        ("18 m^2", Fraction(18)),
        ("50%", Fraction(50)),
        ("50\\%", Fraction(50)),
        ("20°C", Fraction(20)),
        ("**18**", Fraction(18)),
        ("(18)", Fraction(18)),
        ("'18',", Fraction(18)),
        ("**Answer:** 18.", Fraction(18)),
        ("Answer:18", Fraction(18)),
        ("x=18!", Fraction(18)),
        ("3 × 6 = 18", Fraction(18)),
        ("$\\boxed{18}$.", Fraction(18)),
        ("1. 18 lamps", Fraction(18)),
        ("* 18", Fraction(18)),
        ("答案是18。", Fraction(18)),
        ("１，０００", Fraction(1000)),
        ("4\n5\n6", Fraction(6)),
    ],
)
def test_number_is_read(text: str, value: Fraction) -> None:
    assert parse_number(last_number(text)) == value
    assert accepts("number", text, text)
    assert not accepts("number", text, f"#### {value.numerator + value.denominator}/{value.denominator}")


@pytest.mark.parametrize(
    "text",
    [
        *("1.2.3", "12:30", "12:30:05", "1/0", "1/00", "1/2/3", "2024-01-05", "5-6", "5–6", "1,23", "12,34", "0,123"),
        *("1,0000", ",5", "1e99999", "1e3e4", "10^3", "10²", "½", "2½", "2 1/2", "2-1/2", "1 000", "1'000", "1_000"),
        *("--3", "-+3", "$-$3", "±3", "-(3)", "- 3", "− 3", "minus 3", "Total - 3", "5 - 3", "3 × 4", "3 x 4", "2**3"),
        *("5 + 3", "3k", "3K", "$5m", "$5 m", "5 million", "5-million", "5 (million)", "5 hundred", "2 dozen", "5万"),
        *("2π", "2 pi", "3i", "5 and a half", "sqrt(2)", "1/(2)", "\\frac{1}{2}", "\\sqrt{2}", "5'10\"", "18+", "0x1F"),
        *("H2O", "GPT-4", "v2", "March 5, 2024", "5 March 2024", "5th of March"),
    ],
)
def test_unreadable_number_is_not_guessed(text: str) -> None:
    """A row with it is refused, and as an answer it is not right, whatever number is expected."""
    for target in ("1", "2", "3", "5", "12", "30", "1/2", "1000", "23", "4", "2024"):
        assert not accepts("number", target, text), target
    with pytest.raises(ValueError, match="is not a number that can be read; write one number after ####"):
        accepts("number", text, text)


def test_mark_selects_the_number() -> None:
    assert last_number("12:30 and 18") == "18"
    assert accepts("number", "It is 12:30.\n#### 18", "At 1.2.3 it is\n#### 18 (since 3 × 6 = 18)")
    assert first_number("18, not 12:30") == "18"
    assert not accepts("number", "18", "18\n#### 12:30")
    assert not accepts("number", "18", "#### 18 million")


@pytest.mark.parametrize("text", ["9" * 5000, f"0.{'1' * 5000}", f"1/{'3' * 5000}", "1e-9999"])
def test_number_of_any_length_is_exact(text: str) -> None:
    start = perf_counter()
    assert accepts("number", text, f"It is {text}.")
    assert not accepts("number", text, f"It is {text[:-1]}8.")
    assert not accepts("number", text, f"It is {text[:-1]}.")
    assert perf_counter() - start < 1


@st.composite
def written_numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """Return a number as a person may write it, and its value by the arithmetic of `Fraction`."""
    sign = draw(st.sampled_from(["", "+", "-", "−"]))
    whole = draw(st.integers(0, 10**30))
    digits = draw(st.sampled_from([str(whole), f"{whole:,}"]))
    value = Fraction(whole)
    form = draw(st.sampled_from(["whole", "decimal", "point", "exponent", "fraction"]))
    if form in ("decimal", "point"):
        decimals = draw(st.text("0123456789", min_size=1, max_size=30))
        digits, value = (digits, value) if form == "decimal" else ("", Fraction(0))
        digits, value = f"{digits}.{decimals}", value + Fraction(int(decimals), 10 ** len(decimals))
    elif form == "exponent":
        exponent = draw(st.integers(-40, 40))
        minus = draw(st.sampled_from("-−"))
        digits += draw(st.sampled_from("eE")) + (f"{exponent}" if exponent >= 0 else f"{minus}{-exponent}")
        value *= Fraction(10) ** exponent
    elif form == "fraction":
        denominator = draw(st.integers(1, 10**20))
        digits, value = f"{whole}/{denominator}", value / denominator
    currency, unit = draw(st.sampled_from([("", ""), ("", "%"), ("", " km"), ("$", ""), ("", "€"), ("", " lamps")]))
    text = f"{sign}{currency}{digits}{unit}"
    return text, -value if sign in ("-", "−") else value


@settings(max_examples=examples(300), deadline=None)
@given(written_numbers(), st.sampled_from(["{}", "It is {}.", "**{}**", "({})", "#### {}", "1. We get {}!", "x = {}"]))
def test_written_number_has_its_value(number: tuple[str, Fraction], sentence: str) -> None:
    text, value = number
    answer = sentence.format(text)
    assert parse_number(last_number(answer)) == value
    assert accepts("number", text, answer)
    assert accepts("number", f"#### {value.numerator}/{value.denominator}", answer)
    other = value + Fraction(1, 10**60)
    assert not accepts("number", f"#### {other.numerator}/{other.denominator}", answer)


# ---------------------------------------------------------------------------------------------------------------------
# Words and texts


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *(("-1", "1"), ("C++", "C#"), ("C++", "C"), (".NET", "NET"), ("don't", "don"), ("1,000", "1"), ("12:30", "12")),
        *(("50%", "50"), ("A-", "A"), ("A*", "A"), ("yes/no", "yes"), ("well-known", "well"), ("!=", "=")),
        *(("x²", "x2"), ("Ａ", "A")),
    ],
)
def test_first_words_that_differ(first: str, second: str) -> None:
    for words in ((first, second), (second, first)):
        assert accepts("first_word", words[0], f"{words[0]} is it")
        assert not accepts("first_word", *words)


@pytest.mark.parametrize(
    "text",
    [
        *("Paris.", '"Paris"', "'Paris'", "“Paris”", "«Paris»", "**Paris**", "**Paris,** of", "**Paris is", "`Paris`"),
        *("Paris, France", "Paris,France", "Paris: it", "Paris—of course", "Paris...", "Paris!?", "(Paris)"),
        *("Paris(it)", "- Paris", "• Paris", "## Paris", "... Paris", "PARIS", "*Paris*;", "'**Paris**'"),
    ],
)
def test_marks_around_the_first_word_do_not_count(text: str) -> None:
    assert first_word(text) == "paris"
    assert accepts("first_word", "Paris", text)
    assert accepts("first_word", text, "Paris")


@pytest.mark.parametrize(
    ("word", "text"), [("a*", "**A***"), ("c++", "**C++.**"), (".net", "`.NET`,"), ("是的", "是的，因为")]
)
def test_first_word(word: str, text: str) -> None:
    assert first_word(text) == word


@pytest.mark.parametrize("text", ["", "!?", "- ", "**", "...", "()"])
def test_text_without_a_word(text: str) -> None:
    assert first_word(text) == ""
    assert not accepts("first_word", "yes", text)


@settings(max_examples=examples(200))
@given(st.text())
def test_text_equals_its_other_unicode_forms(text: str) -> None:
    """Composed and decomposed characters, letter cases, and white space around a text do not count."""
    forms = [unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text), f" {text}\n", text.casefold()]
    assert {comparable_text(form) for form in forms} == {comparable_text(text)}
    assert comparable_text(comparable_text(text)) == comparable_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and arbitrary answers

FRAGMENTS = st.sampled_from(
    [
        *("1", "2", "0", "12", ".", ",", "/", ":", "-", "−", "+", "e", "$", "€", "%", " ", "\n", "####", "km", "*"),
        *("(", ")", "{", "\\boxed{", "\\frac{", "million", "yes", "no", "m", "M", "C++", "é", "ß", "答", "١", "½", "²"),
    ]
)
TEXTS = st.text() | st.lists(FRAGMENTS).map("".join) | st.text(st.characters(categories=["N", "S", "P", "Z", "Cs"]))


@settings(max_examples=examples(300), deadline=None)
@given(st.sampled_from(RULES), TEXTS, TEXTS)
def test_output_is_right_by_its_own_rule_or_the_row_is_refused(rule: str, output: str, answer: str) -> None:
    task = TASKS.get("own")(data="x.jsonl", rule=rule)
    try:
        target = task.example("id", {"instruction": "?", "output": output}).target
    except ValueError:
        return
    assert task.flexible(output, target)
    assert task.flexible(target, target)
    assert not (task.strict(answer, target) and not task.flexible(answer, target))  # strict is the narrower rule


@pytest.mark.parametrize(("rule", "output"), [("number", "at 12:30"), ("number", "none"), ("first_word", "?!")])
def test_row_that_the_rule_cannot_use_is_named(tmp_path: Path, rule: str, output: str) -> None:
    rows = [{"instruction": f"Count {number}.", "output": f"It is {number}"} for number in range(10)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*rows, {"instruction": "a", "output": output}]))
    world = make_world(tmp_path / "world", models=False)
    with pytest.raises(BadInput, match=r"mine\.jsonl, line 11 is not a row of task 'own'"):
        check_rows(Experiment.settle(RunSpec(protocol=str(world), task=f"{file}:rule={rule}")))


# ---------------------------------------------------------------------------------------------------------------------
# Judges


def grade_one(name: str, monkeypatch: pytest.MonkeyPatch, *texts: str) -> float | None:
    """Return the score of one answer where the judge of a task writes `texts`."""
    replies = cycle(texts)
    monkeypatch.setattr(ChatJudge, "ask", lambda self, prompts, *_: [next(replies) for _ in prompts])
    params = {"data": "x.jsonl", "rule": "judge"} if name == "own" else {}
    [grade] = TASKS.get(name)(model="m", **params).grade(
        [{"instruction": "?", "input": "", "target": "right", "answer": "mine"}]
    )
    assert grade.unparsed is (grade.score is None)
    return grade.score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        *((text, 1.0) for text in ("yes", "Yes.", "**Yes**", "Answer: yes", '"Yes"', "yes\n\nBoth mean this.")),
        *((text, 0.0) for text in ("no", "No.", "**No**", "Answer: No", "No, it does not.")),
        *((text, None) for text in ("Not sure", "Yesterday", "Nothing", "no idea", "yes and no", "yes/no", "", "?")),
    ],
)
def test_yes_and_no_are_read_by_word(monkeypatch: pytest.MonkeyPatch, text: str, score: float | None) -> None:
    assert grade_one("own", monkeypatch, text) == score


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        *((text, "m") for text in ("m", "m.", "**m**", "`m`", "Answer: m", "Answer:m", "The best is m", "m or M?\nm")),
        *((text, "M") for text in ("M", "M\n\n", "(M)", '"M"', "not m. Verdict: M", "### Which is best, m or M?\nM")),
        *((text, None) for text in ("", "warm", "I'm", "m or M", "m/M", "m and M", "m or M?", "not M", "It is 5 m")),
        *((text, None) for text in ("M is better than m", "M. The end", "mm", "Mm", "1", "???")),
    ],
)
def test_choice_is_the_last_word(monkeypatch: pytest.MonkeyPatch, text: str, choice: str | None) -> None:
    """The same text in both orders names the first position or the second one, so that it wins once."""
    assert grade_one("alpaca_eval", monkeypatch, text) == (None if choice is None else 0.5)
    assert grade_one("alpaca_eval", monkeypatch, text, "M") == {"m": 1.0, "M": 0.5, None: None}[choice]


@settings(max_examples=examples(200), deadline=None)
@given(st.sampled_from(["own", "alpaca_eval"]), st.text() | st.lists(FRAGMENTS).map("".join))
def test_any_text_of_a_judge_has_a_score_or_is_unread(name: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert grade_one(name, monkeypatch, text) in (0.0, 0.5, 1.0, None)
