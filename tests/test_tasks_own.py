"""Tasks with parameters, with scores between 0 and 1, and with a judge: own, dialogsum, alpaca_eval."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.sources import fingerprint
from harmbench_vaccine.evaluation.measure import _counts, _item_scores, answer_rows
from harmbench_vaccine.evaluation.statistics import score_interval, wilson
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import Measurements, TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import check_rows, data_provenance, task_rows, task_set
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.chat_api import ChatJudge
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.pipeline import grade
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import TASKS
from harmbench_vaccine.plugins.tasks.dialogsum import rouge_l
from harmbench_vaccine.reporting.answer_views import answers_view
from harmbench_vaccine.reporting.result_views import results_table
from support.results import make_result
from support.runs import run_context
from support.world import make_world

TEN = [{"instruction": f"Repeat the word {number}.", "input": "", "output": f"Word {number}."} for number in range(10)]


def write_lines(path: Path, rows: Iterable[Any]) -> str:
    """Write rows as JSON lines and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def settle(tmp_path: Path) -> Callable[..., Experiment]:
    """Return a function from a task to an experiment in a tiny world."""
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
# Command line


def test_file_is_a_task(settle: Callable[..., Experiment], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", TEN)
    for text in (path, f"own={path}", f"own:data={path}"):
        experiment = settle(text)
        params = experiment.task_plugin.params
        assert (experiment.task.name, params["data"], params["rule"]) == ("own", path, "exact")
        assert experiment.task_name == f"own={path}"
    assert settle(f"{path}:rule=number").task_name == f"own:data={path},rule=number"
    assert settle("sst2").task_name == "sst2"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("own", "needs data: write own:data=PATH"),
        ("own:data=DATA,rule=judge", "rule=judge needs a chat model"),
        ("own:data=DATA,rule=nearly", "allowed: exact | first_word | number | judge"),
        ("own:data=DATA,rul=exact", "Did you mean 'rule'?"),
        ("own:data=/no/where.jsonl", "'/no/where.jsonl' does not exist"),
        ("sst2+agnews", "names 2 tasks"),
        ("sst2=3", "takes no bare value"),
        ("sst3", "Unknown task 'sst3'. Did you mean 'sst2'"),
        ("alpaca_eval", "needs a chat model as a judge: write alpaca_eval:model=NAME"),
    ],
)
def test_invalid_task_is_refused(settle: Callable[..., Experiment], tmp_path: Path, task: str, message: str) -> None:
    path = write_lines(tmp_path / "mine.jsonl", TEN)
    with pytest.raises(BadInput) as refusal:
        check_rows(settle(task.replace("DATA", path)))
    assert message in str(refusal.value)


def test_keys_contain_the_parameters_that_matter(settle: Callable[..., Experiment], tmp_path: Path) -> None:
    """The run id contains all parameters; training depends on those that select rows, and on the file content."""
    path = write_lines(tmp_path / "mine.jsonl", TEN)
    exact, number = settle(path), settle(f"{path}:rule=first_word")
    assert keys.run_id(exact) != keys.run_id(number)
    assert keys.task_inputs(exact) == keys.task_inputs(number)
    assert keys.task_inputs(exact) != keys.task_inputs(settle(f"{path}:train=other"))
    moved = settle(write_lines(tmp_path / "elsewhere" / "mine.jsonl", TEN))
    assert keys.task_inputs(moved) == keys.task_inputs(exact)
    before = keys.task_inputs(exact)
    write_lines(tmp_path / "mine.jsonl", TEN[:9])
    assert keys.task_inputs(settle(path)) != before
    plain, params = keys.task_inputs(settle("sst2")), settle("sst2").task_plugin.params
    assert plain == {
        "name": "sst2",
        "params": {name: params[name] for name in ("instruction", "answers")},
        "code": TASKS.get("sst2").fingerprint(),
        "data": {"sst2": fingerprint(settle("sst2").location("sst2"))},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def split_questions(experiment: Experiment) -> tuple[list[str], list[str]]:
    """Return the training questions and the test questions."""
    return [row.instruction for row in task_rows(experiment)], [
        row.instruction for row in task_set(experiment).examples
    ]


def test_held_out_fifth_does_not_depend_on_the_order(settle: Callable[..., Experiment], tmp_path: Path) -> None:
    rows = [*TEN, {**TEN[3], "output": "The same question again."}]
    train, test = split_questions(settle(write_lines(tmp_path / "a.jsonl", rows)))
    assert len(test) == 2
    assert set(train) | set(test) == {row["instruction"] for row in TEN}
    assert not set(train) & set(test)
    reverse = split_questions(settle(write_lines(tmp_path / "b.jsonl", rows[::-1]), seed=3))
    assert (set(reverse[0]), set(reverse[1])) == (set(train), set(test))


def test_all_items_are_used_if_few_are_available(tmp_path: Path) -> None:
    file = make_world(tmp_path / "world", models=False)  # 8 items of a task
    for count, items in ((10, 2), (60, 8)):
        path = write_lines(
            tmp_path / f"{count}.jsonl", [{**TEN[0], "instruction": f"Repeat {n}."} for n in range(count)]
        )
        experiment = Experiment.settle(RunSpec(protocol=str(file), task=path))
        assert len(task_set(experiment).examples) == items


def test_items_of_another_file_or_split(settle: Callable[..., Experiment], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine" / "train.jsonl", TEN[:8])
    held_out = write_lines(tmp_path / "mine" / "test.jsonl", TEN[6:])
    for text in (f"{path}:test={held_out}", f"own:data={tmp_path / 'mine'},test=test"):
        experiment = settle(text)
        train, test = split_questions(experiment)
        assert test == [row["instruction"] for row in TEN[6:8]]
        assert train == [row["instruction"] for row in TEN[:6]]  # without the test questions
        sources = [source for name, source in data_provenance(experiment).items() if name[:3] == "own"]
        assert sum(sum(source["rows"].values()) for source in sources) == 12


def test_target_depends_on_the_rule() -> None:
    task_class = TASKS.get("own")
    row = {"instruction": "How many?", "input": "Two lamps.", "output": "We count 1, 2.\n#### 1,002"}
    assert task_class(data="x").example("id", row) == Example(
        "id", "How many?", response=row["output"], input="Two lamps.", target=row["output"]
    )
    assert task_class(data="x", rule="first_word").example("id", row).target == "we"
    assert task_class(data="x", rule="number").example("id", row).target == "1002"
    assert (
        task_class(data="x", rule="number").example("id", {"instruction": "a", "output": "so 3 and -4.5"}).target
        == "-4.5"
    )
    assert task_class(data="x").example("id", {"instruction": "a", "input": None, "output": "b"}).input == ""


@pytest.mark.parametrize(
    ("rule", "row", "message"),
    [
        ("number", {"instruction": "a", "output": "none"}, "rule=number cannot read the output: it has no digits"),
        ("number", {"instruction": "a", "output": "at 12:30"}, "'at 12:30' is not a number that can be read"),
        ("number", {"instruction": "a", "output": "5.\n#### 1.2.3"}, "'1.2.3' is not a number that can be read"),
        ("first_word", {"instruction": "a", "output": "!?"}, "the output has no word"),
        ("exact", {"instruction": "a", "output": 3}, "field 'output' holds 3, which is not text"),
        ("exact", {"instruction": "a", "input": ["x"], "output": "b"}, "field 'input' holds list, which is not text"),
        (
            "exact",
            {"prompt": "a", "response": "b"},
            "a row needs instruction, output, and this one has prompt, response",
        ),
    ],
)
def test_invalid_row_is_refused(
    settle: Callable[..., Experiment], tmp_path: Path, rule: str, row: dict[str, Any], message: str
) -> None:
    good = [{**valid, "output": valid["output"] + " 1"} for valid in TEN]
    experiment = settle(f"{write_lines(tmp_path / 'mine.jsonl', [*good, row])}:rule={rule}")
    with pytest.raises(BadInput) as refusal:
        check_rows(experiment)
    assert message in str(refusal.value)
    assert "mine.jsonl, line 11" in str(refusal.value)


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
        ("exact", "cafe\N{COMBINING ACUTE ACCENT}", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}", (True, True)),
        ("exact", "STRASSE", "straße", (True, True)),
        ("exact", "x²", "x2", (False, False)),
        ("exact", "Ａ", "A", (False, False)),
        ("first_word", "Cafe\N{COMBINING ACUTE ACCENT}!", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", (False, True)),
        ("number", "5 and 6.\n#### 1,100.0", "1100", (True, True)),
        ("number", "#### 7\n#### 8 of 9", "8", (True, True)),
        ("number", "We get 1100", "1100", (False, True)),
        ("number", "#### none 1100", "1100", (True, True)),
        ("number", "1100 ####", "1100", (False, False)),
        ("number", "none", "1100", (False, False)),
        ("number", "-3", "3", (False, False)),
    ],
)
def test_strict_and_flexible_rules(rule: str, answer: str, target: str, expected: tuple[bool, bool]) -> None:
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
        ("Un café ouvert", "un caf ouvert", 1.0),  # rouge_score splits at every character except a-z and 0-9
        ("été", "t", 1.0),
    ],
)
def test_rouge_l(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_dialogsum_rows_and_scores(settle: Callable[..., Experiment], tmp_path: Path) -> None:
    """The CSV files of the data set: id, dialogue, summary, topic."""
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        path = tmp_path / "dialogsum" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "id,dialogue,summary,topic\n"
            + "".join(
                f'{split}_{n},"#Person1#: Hi {split} {n}.\n#Person2#: Hello.",They greet {n}.,greeting\n'
                for n in range(count)
            )
        )
    experiment = settle("dialogsum")
    rows = task_rows(experiment)
    assert [(row.input, row.target) for row in rows[:1]] == [
        ("#Person1#: Hi train 0.\n#Person2#: Hello.", "They greet 0.")
    ]
    assert len(rows) == 6
    assert [row.id for row in task_set(experiment).examples] == ["dialogsum:test:0", "dialogsum:test:1"]
    answers = [{"answer": "They greet 7.", "target": "They greet 0."}]
    assert (
        experiment.task.scores("strict", answers)
        == experiment.task.scores("flexible", answers)
        == [pytest.approx(2 / 3)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Judges


def stub_judge(monkeypatch: pytest.MonkeyPatch, verdict: Callable[[str], str]) -> list[tuple[ChatJudge, str]]:
    """Replace the chat model by `verdict`; return the recorded prompts."""
    requests: list[tuple[ChatJudge, str]] = []

    def ask(self: ChatJudge, prompts: Sequence[str], max_new_tokens: int, progress: Any = None) -> list[str]:
        requests.extend((self, prompt) for prompt in prompts)
        return [verdict(prompt) for prompt in prompts]

    monkeypatch.setattr(ChatJudge, "ask", ask)
    return requests


def answered(*answers: str, target: str = "right") -> list[dict[str, str]]:
    """Return an answered item for each answer."""
    return [{"instruction": "Do {output_1}.", "input": "", "target": target, "answer": answer} for answer in answers]


def test_judge_of_a_user_task(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS.get("own")(data="x", rule="judge", model="m", base_url="http://host/v1")
    texts = {"good": "Yes.", "bad": "no", "odd": "It depends."}

    def verdict(prompt: str) -> str:
        return next(text for answer, text in texts.items() if f"\n{answer}\n" in prompt)

    requests = stub_judge(monkeypatch, verdict)
    grades = task.grade(answered("good", "bad", "odd"))
    assert [(graded.score, graded.unparsed, graded.judge_text) for graded in grades] == [
        (1.0, False, "Yes."),
        (0.0, False, "no"),
        (None, True, "It depends."),
    ]
    chat, prompt = requests[0]
    assert chat == ChatJudge("m", "http://host/v1")
    assert "Do {output_1}." in prompt
    assert "\nright\n" in prompt


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        (lambda prompt: "m" if '"m",\n        "output": """mine"' in prompt else "M", 1.0),  # always the answer
        (lambda prompt: "### Which is best?\nm", 0.5),  # always the first position
        (lambda prompt: "Because it is better: M.", 0.5),
        (lambda prompt: "M" if '"m",\n        "output": """mine"' in prompt else "m", 0.0),
        (lambda prompt: "I cannot decide which one is warm", None),  # the last letter of a word is not a verdict
        (lambda prompt: "m" if '"m",\n        "output": """mine"' in prompt else "", None),  # one order is unread
    ],
)
def test_both_orders_are_judged(
    monkeypatch: pytest.MonkeyPatch, verdict: Callable[[str], str], score: float | None
) -> None:
    requests = stub_judge(monkeypatch, verdict)
    [graded] = TASKS.get("alpaca_eval")(model="m").grade(answered("mine", target="theirs"))
    assert (graded.score, graded.unparsed) == (score, score is None)
    first, second = (prompt for _, prompt in requests)
    assert '"m",\n        "output": """mine"""' in first
    assert '"M",\n        "output": """theirs"""' in first
    assert '"m",\n        "output": """theirs"""' in second
    assert '"instruction": """Do {output_1}."""' in first  # the name of a slot in the text is not replaced
    assert first.startswith("You are a highly efficient assistant, who evaluates and selects the best")
    assert first.endswith("## Your answer: concise explanation followed be m or M")
    assert "<|im_" not in first


def test_alpaca_eval_trains_on_the_first_700(settle: Callable[..., Experiment], tmp_path: Path) -> None:
    """The two files of tatsu-lab/alpaca_eval are arrays: the outputs of GPT-4 and of text_davinci_003."""
    for name, generator in (("gpt4", "gpt4_1106_preview"), ("davinci", "text_davinci_003")):
        rows = [
            {"instruction": f"Do {number}.", "output": f"{name} {number}", "generator": generator, "dataset": "koala"}
            for number in range(805)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    experiment = settle("alpaca_eval=m")
    rows, items = task_rows(experiment), list(task_set(experiment).examples)
    assert (len(rows), rows[-1].instruction, rows[-1].response) == (700, "Do 699.", "gpt4 699")
    assert [(item.id, item.target) for item in items] == [
        (f"alpaca_eval:eval:{number}", f"davinci {number}") for number in (700, 701, 702)
    ]
    assert set(experiment.task.datasets) == {"alpaca_eval", "alpaca_eval_reference"}


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Artifact]:
    """Return a function that stores answers as an artifact."""

    def store(*answers: str) -> Artifact:
        folder = tmp_path / "answers"
        write_lines(folder / "answers.jsonl", [{"id": str(n), **row} for n, row in enumerate(answered(*answers))])
        return Artifact("answer", "key", folder, 0.0, True)

    return store


def test_grades_are_cached(
    settle: Callable[..., Experiment], stored: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "mine.jsonl", TEN)
    requests = stub_judge(monkeypatch, lambda prompt: "yes" if "\ngood\n" in prompt else "no")
    context, answers = run_context(tmp_path / "store"), stored("good", "bad", "good", "good")
    task = f"{path}:rule=judge,model=m,base_url=http://host/v1"
    first = grade(settle(task), context, answers)
    assert len(requests) == 4
    grades = [json.loads(line)["score"] for line in (first.path / "grades.jsonl").read_text().splitlines()]
    assert grades == [1, 0, 1, 1]
    assert grade(settle(task), context, answers).key == first.key
    assert len(requests) == 4
    grade(settle(task.replace("model=m", "model=n")), context, answers)
    assert len(requests) == 8


def test_unparsed_verdicts_of_most_answers_are_an_error(
    settle: Callable[..., Experiment], stored: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub_judge(monkeypatch, lambda prompt: "yes" if "\ngood\n" in prompt else "fnord\nfnord")
    experiment = settle(f"{write_lines(tmp_path / 'mine.jsonl', TEN)}:rule=judge,model=m,base_url=http://host/v1")
    context = run_context(tmp_path / "store")
    with pytest.raises(HbvError, match="no readable verdict on 2 of 3 answers; for example, it writes 'fnord") as error:
        grade(experiment, context, stored("good", "bad", "bad"))
    assert "\n" not in str(error.value)
    grade(experiment, context, stored("good", "bad"))  # half is not more than half


def test_interval_of_fractional_scores_uses_the_t_distribution() -> None:
    assert score_interval([1, 0, 1.0, 1]) == wilson(3, 4)
    # mean 0.5, standard error 0.25 / sqrt(3), t(0.975, 2) = 4.30265
    low, high = score_interval([0.25, 0.5, 0.75])
    assert (low, high) == pytest.approx((0.0, 100.0))
    # 20 scores, standard deviation 0.256495, standard error 0.057354, t(0.975, 19) = 2.093024
    low, high = score_interval([0.25, 0.75] * 10)
    assert (low, high) == pytest.approx((50 - 12.0044, 50 + 12.0044), abs=1e-3)
    # equal scores: standard error 1 / 22
    low, high = score_interval([0.5] * 20)
    assert (low, high) == pytest.approx((50 - 9.5137, 50 + 9.5137), abs=1e-3)
    assert score_interval([0.3]) == (0.0, 100.0)


def rendered(view: RenderableType) -> str:
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(view)
    return console.export_text()


def test_unread_grades_are_shown() -> None:
    result = make_result(finetune_accuracy_n=7, counts={"unparsed_grades": {"before": 0, "after": 1}})
    note = "answers to the task with an unread grade, which FA leaves out: 1 after the user stage, 0 before it."
    assert note in rendered(results_table([result]))
    assert "unread" not in rendered(results_table([make_result(counts={"unparsed_grades": {"before": 0, "after": 0}})]))
    rows = [
        {"when": when, "set": "task", "id": "1", **answered("mine")[0], "grade": grade}
        for when, grade in (("before", 0.5), ("after", None))
    ]
    view = rendered(answers_view(result, rows, "task", 1, None))
    assert "grade: 0.5" in view
    assert "grade: unread" in view


@pytest.mark.parametrize("scores", [[1.0, 0.5], [1.0, None]])
def test_item_scores_are_the_grades_of_the_judge(
    settle: Callable[..., Experiment], tmp_path: Path, scores: list[float | None]
) -> None:
    """An item with an unread grade has no score: it counts neither as right nor as wrong."""
    experiment = settle(f"{write_lines(tmp_path / 'mine.jsonl', TEN)}:rule=judge,model=m,base_url=http://host/v1")
    write_lines(
        tmp_path / "artifact" / "answers.jsonl", [{"id": str(n), **row} for n, row in enumerate(answered("a", "right"))]
    )
    write_lines(tmp_path / "artifact" / "grades.jsonl", [{"score": score} for score in scores])
    write_lines(tmp_path / "artifact" / "verdicts.jsonl", [{"flagged": False, "cut": False, "unparsed": False}])
    artifact = Artifact("x", "key", tmp_path / "artifact", 0.0, True)

    model = TrainedModel("base", ModelSpec("base"), {})
    graded = Measurements(model, model, {"after/task": artifact}, {}, artifact, {"after": artifact})
    assert _counts(experiment, graded, ModelPool()).unparsed_grades == {"after": scores.count(None)}
    for rule in ("strict", "flexible"):
        assert _item_scores(experiment, answer_rows(graded), "after", rule) == [s for s in scores if s is not None]
    assert _item_scores(experiment, answer_rows(replace(graded, grades={})), "after", "strict") == [0.0, 1.0]
