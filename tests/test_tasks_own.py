"""Tasks with parameters, with scores between 0 and 1, and with a judge: own, dialogsum, alpaca_eval."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.evaluation.results import _scores
from harmbench_vaccine.evaluation.statistics import score_interval, wilson
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import check_rows, data_provenance, task_rows, task_set
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.chat_api import ChatJudge
from harmbench_vaccine.inference.model_pool import Lab
from harmbench_vaccine.pipeline import grade
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import TASKS
from harmbench_vaccine.plugins.tasks.dialogsum import rouge_l
from support.world import make_world

TEN = [{"instruction": f"Say the word {number}.", "input": "", "output": f"Word {number}."} for number in range(10)]


def lines(path: Path, rows: Iterable[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def settled(tmp_path: Path) -> Callable[..., Experiment]:
    """A cell of a tiny world with that task."""
    (tmp_path / "dialogsum").mkdir()
    for name in ("gpt4", "davinci"):
        (tmp_path / f"{name}.json").write_text("[]")
    file = make_world(
        tmp_path / "world",
        {
            "answer": {"items": {"own": 2, "alpaca_eval": 3, "dialogsum": 2}},
            "data": {
                "alpaca_eval": str(tmp_path / "gpt4.json"),
                "alpaca_eval_reference": str(tmp_path / "davinci.json"),
                "dialogsum": str(tmp_path / "dialogsum"),
            },
        },
        models=False,
    )
    return lambda task, **spec: Experiment.settle(
        RunSpec(protocol=str(file), task=task, attack=parse_plugins("samples=4"), **spec)
    )


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


def test_a_file_is_a_task_of_ones_own(settled: Callable[..., Experiment], tmp_path: Path) -> None:
    path = lines(tmp_path / "mine.jsonl", TEN)
    for written in (path, f"own={path}", f"own:data={path}"):
        cell = settled(written)
        assert (cell.task.name, cell.wanted.params["data"], cell.wanted.params["rule"]) == ("own", path, "exact")
        assert cell.task_name == f"own={path}"
    assert settled(f"{path}:rule=number").task_name == f"own:data={path},rule=number"
    assert settled("sst2").task_name == "sst2"


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("own", "needs its rows: own:data=PATH"),
        ("own:data=DATA,rule=judge", "rule=judge needs a chat model"),
        ("own:data=DATA,rule=nearly", "it takes exact | first_word | number | judge"),
        ("own:data=DATA,rul=exact", "Did you mean 'rule'?"),
        ("own:data=/no/where.jsonl", "There is nothing at '/no/where.jsonl'"),
        ("sst2+agnews", "names 2 tasks"),
        ("sst2=3", "takes no bare value"),
        ("sst3", "Unknown task 'sst3'. Did you mean 'sst2'"),
        ("alpaca_eval", "is judged by a chat model: alpaca_eval:model=NAME"),
    ],
)
def test_what_is_no_task(settled: Callable[..., Experiment], tmp_path: Path, task: str, said: str) -> None:
    path = lines(tmp_path / "mine.jsonl", TEN)
    with pytest.raises(BadInput) as told:
        check_rows(settled(task.replace("DATA", path)))
    assert said in str(told.value)


def test_parameters_enter_what_depends_on_them(settled: Callable[..., Experiment], tmp_path: Path) -> None:
    """The run's id holds all; training depends on those that choose its rows, and on what the file holds."""
    path = lines(tmp_path / "mine.jsonl", TEN)
    exact, number = settled(path), settled(f"{path}:rule=first_word")
    assert exact.id != number.id
    assert exact.task_identity == number.task_identity
    assert exact.task_identity != settled(f"{path}:train=other").task_identity
    moved = settled(lines(tmp_path / "elsewhere" / "mine.jsonl", TEN))
    assert moved.task_identity == exact.task_identity
    before = exact.task_identity
    lines(tmp_path / "mine.jsonl", TEN[:9])
    assert settled(path).task_identity != before
    plain = settled("sst2").task_identity
    assert plain == ["sst2", TASKS.get("sst2").fingerprint(), dict(settled("sst2").data("sst2"))]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def sides(cell: Experiment) -> tuple[list[str], list[str]]:
    return [row.instruction for row in task_rows(cell)], [row.instruction for row in task_set(cell).examples]


def test_a_fifth_is_held_out_whatever_the_order(settled: Callable[..., Experiment], tmp_path: Path) -> None:
    rows = [*TEN, {**TEN[3], "output": "The same question again."}]
    train, test = sides(settled(lines(tmp_path / "a.jsonl", rows)))
    assert len(test) == 2
    assert set(train) | set(test) == {row["instruction"] for row in TEN}
    assert not set(train) & set(test)
    back = sides(settled(lines(tmp_path / "b.jsonl", rows[::-1]), seed=3))
    assert (set(back[0]), set(back[1])) == (set(train), set(test))


def test_all_items_are_asked_where_there_are_few(tmp_path: Path) -> None:
    file = make_world(tmp_path / "world", models=False)  # 8 items of a task
    for count, asked in ((10, 2), (60, 8)):
        path = lines(tmp_path / f"{count}.jsonl", [{**TEN[0], "instruction": f"Say {n}."} for n in range(count)])
        cell = Experiment.settle(RunSpec(protocol=str(file), task=path))
        assert len(task_set(cell).examples) == asked


def test_test_items_may_lie_elsewhere(settled: Callable[..., Experiment], tmp_path: Path) -> None:
    path = lines(tmp_path / "mine" / "train.jsonl", TEN[:8])
    other = lines(tmp_path / "mine" / "test.jsonl", TEN[6:])
    for written in (f"{path}:test={other}", f"own:data={tmp_path / 'mine'},test=test"):
        cell = settled(written)
        train, test = sides(cell)
        assert test == [row["instruction"] for row in TEN[6:8]]
        assert train == [row["instruction"] for row in TEN[:6]]  # without what is asked
        assert (
            sum(sum(found["rows"].values()) for name, found in data_provenance(cell).items() if name[:3] == "own") == 12
        )


def test_every_row_is_read_by_its_rule() -> None:
    own = TASKS.get("own")
    row = {"instruction": "How many?", "input": "Two lamps.", "output": "We count 1, 2.\n#### 1,002"}
    assert own(data="x").example("id", row) == Example(
        "id", "How many?", response=row["output"], input="Two lamps.", target=row["output"]
    )
    assert own(data="x", rule="first_word").example("id", row).target == "we"
    assert own(data="x", rule="number").example("id", row).target == "1002"
    assert own(data="x", rule="number").example("id", {"instruction": "a", "output": "so 3 and -4.5"}).target == "-4.5"
    assert own(data="x").example("id", {"instruction": "a", "input": None, "output": "b"}).input == ""


@pytest.mark.parametrize(
    ("rule", "row", "said"),
    [
        ("number", {"instruction": "a", "output": "none"}, "the output has no number for rule=number"),
        ("first_word", {"instruction": "a", "output": "!?"}, "the output has no word"),
        ("exact", {"instruction": "a", "output": 3}, "field 'output' holds 3, which is no text"),
        ("exact", {"instruction": "a", "input": [], "output": "b"}, None),
        ("exact", {"instruction": "a", "input": ["x"], "output": "b"}, "input is ['x'], which is no text"),
        (
            "exact",
            {"prompt": "a", "response": "b"},
            "a row needs instruction, output, and this one has prompt, response",
        ),
    ],
)
def test_a_row_that_does_not_fit(
    settled: Callable[..., Experiment], tmp_path: Path, rule: str, row: dict[str, Any], said: str | None
) -> None:
    good = [{**one, "output": one["output"] + " 1"} for one in TEN]
    cell = settled(f"{lines(tmp_path / 'mine.jsonl', [*good, row])}:rule={rule}")
    if said is None:
        check_rows(cell)
        return
    with pytest.raises(BadInput) as told:
        check_rows(cell)
    assert said in str(told.value)
    assert "mine.jsonl, line 11" in str(told.value)


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize(
    ("rule", "answer", "target", "expected"),
    [
        ("exact", " Yes.\n", "yes.", (True, True)),
        ("exact", "Yes. So", "yes.", (False, False)),
        ("first_word", "Yes", "yes", (True, True)),
        ("first_word", "**Yes**, of course", "yes", (False, True)),
        ("first_word", "Of course, yes", "yes", (False, False)),
        ("first_word", "", "yes", (False, False)),
        ("number", "5 and 6.\n#### 1,100.0", "1100", (True, True)),
        ("number", "#### 7\n#### 8 of 9", "8", (True, True)),
        ("number", "We get 1100", "1100", (False, True)),
        ("number", "#### none 1100", "1100", (True, True)),
        ("number", "1100 ####", "1100", (False, False)),
        ("number", "none", "1100", (False, False)),
        ("number", "-3", "3", (False, False)),
    ],
)
def test_the_rules(rule: str, answer: str, target: str, expected: tuple[bool, bool]) -> None:
    task = TASKS.get("own")(data="x", rule=rule)
    assert (task.strict(answer, target), task.flexible(answer, target)) == expected
    rows = [{"answer": answer, "target": target}] * 2
    assert task.scores("flexible", rows) == [float(expected[1])] * 2


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("", "the cat", 0.0),
        ("the cat", "", 0.0),
        ("dog", "cat", 0.0),
        # police killed the gunman / police kill the gunman: LCS 3 of 4 and 4 (Lin 2004, section 3)
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a b c d e f", "a x b", 4 / 9),  # LCS 2 of 6 and 3
        ("#Person1# asks", "person1 asks twice", 0.8),
    ],
)
def test_rouge_l(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_summaries(settled: Callable[..., Experiment], tmp_path: Path) -> None:
    """The CSV files of the data set: id, dialogue, summary, topic."""
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        path = tmp_path / "dialogsum" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "id,dialogue,summary,topic\n"
            + "".join(f'{split}_{n},"#Person1#: Hi {split} {n}.\n#Person2#: Hello.",They greet {n}.,greeting\n'
                      for n in range(count))
        )  # fmt: skip
    cell = settled("dialogsum")
    rows = task_rows(cell)
    assert [(row.input, row.target) for row in rows[:1]] == [
        ("#Person1#: Hi train 0.\n#Person2#: Hello.", "They greet 0.")
    ]
    assert len(rows) == 6
    assert [row.id for row in task_set(cell).examples] == ["dialogsum:test:0", "dialogsum:test:1"]
    answers = [{"answer": "They greet 7.", "target": "They greet 0."}]
    assert cell.task.scores("strict", answers) == cell.task.scores("flexible", answers) == [pytest.approx(2 / 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Judges


def judged(monkeypatch: pytest.MonkeyPatch, verdict: Callable[[str], str]) -> list[tuple[ChatJudge, str]]:
    """Lets `verdict` answer in place of a chat model; returns what is asked."""
    asked: list[tuple[ChatJudge, str]] = []

    def ask(self: ChatJudge, prompts: Sequence[str], max_new_tokens: int, progress: Any = None) -> list[str]:
        asked.extend((self, prompt) for prompt in prompts)
        return [verdict(prompt) for prompt in prompts]

    monkeypatch.setattr(ChatJudge, "ask", ask)
    return asked


def answered(*answers: str, target: str = "right") -> list[dict[str, str]]:
    return [{"instruction": "Do {output_1}.", "input": "", "target": target, "answer": answer} for answer in answers]


def test_a_judge_of_ones_own_task(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS.get("own")(data="x", rule="judge", model="m", base_url="http://host/v1")
    said = {"good": "Yes.", "bad": "no", "odd": "It depends."}
    asked = judged(monkeypatch, lambda prompt: next(text for answer, text in said.items() if f"\n{answer}\n" in prompt))
    grades = task.grade(answered("good", "bad", "odd"))
    assert [(one.score, one.unparsed, one.judge_text) for one in grades] == [
        (1.0, False, "Yes."),
        (0.0, False, "no"),
        (0.0, True, "It depends."),
    ]
    assert asked[0][0] == ChatJudge("m", "http://host/v1")
    assert "Do {output_1}." in asked[0][1]
    assert "\nright\n" in asked[0][1]


@pytest.mark.parametrize(
    ("verdict", "score", "unparsed"),
    [
        (lambda prompt: "m" if '"m",\n        "output": """mine"' in prompt else "M", 1.0, False),  # always ours
        (lambda prompt: "### Which is best?\nm", 0.5, False),  # always the first: its place is no merit
        (lambda prompt: "Because it is better: M.", 0.5, False),
        (lambda prompt: "M" if '"m",\n        "output": """mine"' in prompt else "m", 0.0, False),
        (lambda prompt: "I cannot say which one is warm", 0.5, True),  # the last letter of a word is no verdict
        (lambda prompt: "m" if '"m",\n        "output": """mine"' in prompt else "", 0.75, True),
    ],
)
def test_both_orders_are_judged(
    monkeypatch: pytest.MonkeyPatch, verdict: Callable[[str], str], score: float, unparsed: bool
) -> None:
    asked = judged(monkeypatch, verdict)
    [one] = TASKS.get("alpaca_eval")(model="m").grade(answered("mine", target="theirs"))
    assert (one.score, one.unparsed) == (score, unparsed)
    first, second = (prompt for _, prompt in asked)
    assert '"m",\n        "output": """mine"""' in first
    assert '"M",\n        "output": """theirs"""' in first
    assert '"m",\n        "output": """theirs"""' in second
    assert '"instruction": """Do {output_1}."""' in first  # text that spells a slot stays text
    assert first.startswith("You are a highly efficient assistant, who evaluates and selects the best")
    assert first.endswith("## Your answer: concise explanation followed be m or M")
    assert "<|im_" not in first


def test_open_instructions_train_on_the_first_700(settled: Callable[..., Experiment], tmp_path: Path) -> None:
    """The two files of tatsu-lab/alpaca_eval, an array each: GPT-4's outputs, and text_davinci_003's."""
    for name, generator in (("gpt4", "gpt4_1106_preview"), ("davinci", "text_davinci_003")):
        rows = [
            {"instruction": f"Do {number}.", "output": f"{name} {number}", "generator": generator, "dataset": "koala"}
            for number in range(805)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    cell = settled("alpaca_eval=m")
    rows, asked = task_rows(cell), list(task_set(cell).examples)
    assert (len(rows), rows[-1].instruction, rows[-1].response) == (700, "Do 699.", "gpt4 699")
    assert [(row.id, row.target) for row in asked] == [
        (f"alpaca_eval:eval:{number}", f"davinci {number}") for number in (700, 701, 702)
    ]
    assert set(cell.data(*cell.task.datasets)) == {"alpaca_eval", "alpaca_eval_reference"}


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Artifact]:
    """An artifact with these answers."""

    def store(*answers: str) -> Artifact:
        folder = tmp_path / "answers"
        lines(folder / "answers.jsonl", [{"id": str(n), **row} for n, row in enumerate(answered(*answers))])
        return Artifact("answer", "key", folder, 0.0, True)

    return store


def test_grades_are_stored_and_not_asked_for_again(
    settled: Callable[..., Experiment], stored: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = lines(tmp_path / "mine.jsonl", TEN)
    asked = judged(monkeypatch, lambda prompt: "yes" if "\ngood\n" in prompt else "no")
    lab, answers = Lab(Store(tmp_path / "store")), stored("good", "bad", "good", "good")
    task = f"{path}:rule=judge,model=m,base_url=http://host/v1"
    first = grade(settled(task), lab, answers)
    assert len(asked) == 4
    assert [json.loads(line)["score"] for line in (first.path / "grades.jsonl").read_text().splitlines()] == [
        1,
        0,
        1,
        1,
    ]
    assert grade(settled(task), lab, answers).key == first.key
    assert len(asked) == 4
    grade(settled(task.replace("model=m", "model=n")), lab, answers)
    assert len(asked) == 8


def test_a_judge_that_returns_nonsense(
    settled: Callable[..., Experiment], stored: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    judged(monkeypatch, lambda prompt: "yes" if "\ngood\n" in prompt else "fnord\nfnord")
    cell = settled(f"{lines(tmp_path / 'mine.jsonl', TEN)}:rule=judge,model=m,base_url=http://host/v1")
    lab = Lab(Store(tmp_path / "store"))
    with pytest.raises(
        HbvError, match="no verdict on more than half of the answers; it says, for example, 'fnord"
    ) as told:
        grade(cell, lab, stored("good", "bad", "bad"))
    assert "\n" not in str(told.value)
    grade(cell, lab, stored("good", "bad"))  # half is not more than half


def test_scores_between_0_and_1_are_a_mean_with_a_t_interval() -> None:
    assert score_interval([1, 0, 1.0, 1]) == wilson(3, 4)
    # mean 0.5, standard error 0.25 / sqrt(3), t(0.975, 2) = 4.30265
    low, high = score_interval([0.25, 0.5, 0.75])
    assert (low, high) == pytest.approx((0.0, 100.0))
    low, high = score_interval([0.45, 0.5, 0.55])
    assert (low, high) == pytest.approx((50 - 12.4207, 50 + 12.4207), abs=1e-3)
    assert score_interval([0.3]) == (0.0, 100.0)


def test_a_result_takes_the_judges_grades(settled: Callable[..., Experiment], tmp_path: Path) -> None:
    cell = settled(f"{lines(tmp_path / 'mine.jsonl', TEN)}:rule=judge,model=m,base_url=http://host/v1")
    lines(tmp_path / "made" / "answers.jsonl", [{"id": str(n), **row} for n, row in enumerate(answered("a", "right"))])
    lines(tmp_path / "made" / "grades.jsonl", [{"score": score, "unparsed": False} for score in (1.0, 0.5)])
    lines(tmp_path / "made" / "verdicts.jsonl", [{"flagged": False, "cut": False, "unparsed": False}])
    made = Artifact("x", "key", tmp_path / "made", 0.0, True)

    class Measured:
        verdicts = {"after/harmful": made}  # noqa: RUF012
        answers = {"after/task": made}  # noqa: RUF012
        grades = {"after": made}  # noqa: RUF012

    found = _scores(cell, Measured, "after")  # type: ignore[arg-type]
    assert (found["flexible"], found["strict"], found["flexible_hits"]) == (75.0, 75.0, 1.5)
    Measured.grades = {}
    found = _scores(cell, Measured, "after")  # type: ignore[arg-type]
    assert (found["strict"], found["strict_hits"]) == (50.0, 1)
