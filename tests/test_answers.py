"""Answers of a model and of the data: the protocol cuts what runs on, and a row's own answer is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmbench_vaccine import pipeline
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.jsonl import read_lines
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.answer_checks import cut_answer
from harmbench_vaccine.evaluation.verdicts import judged_pair
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import ANSWERS, TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.rows import task_rows, task_set
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.engine import Answer, Starts
from harmbench_vaccine.inference.model_pool import ModelSpec
from support.examples import examples
from support.runs import run_context
from support.world import make_world

MARK = "### Response:"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), models=False)


def settle(world: Path, **spec: Any) -> Experiment:
    return Experiment.settle(RunSpec(protocol=str(world), **spec))


# ---------------------------------------------------------------------------------------------------------------------
# Answers that run on


class RunningOn:
    """An engine whose answers continue with another question and its answer."""

    answered_by = "transformers"
    text = f" positive\n\n### Instruction:\nAnother.\n\n{MARK}\nnegative\n\n{MARK} more"

    def generate(
        self,
        adapters: Sequence[Path],
        prompts: Sequence[str],
        max_new_tokens: int,
        progress: Progress = SILENT,
        starts: Starts = (),
    ) -> list[Answer]:
        return [Answer(self.text, max_new_tokens, finished=False) for _ in prompts]


@pytest.mark.parametrize("cut_at", ["", MARK])
def test_stored_answer_is_the_one_that_is_scored(
    cut_at: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, context = settle(world, values={"answer.cut_at": f'"{cut_at}"'}), run_context(tmp_path / "store")
    monkeypatch.setattr(context.models, "engine", lambda spec, backend: RunningOn())
    model = TrainedModel(experiment.model, ModelSpec(experiment.model), {})
    rows = read_lines(pipeline.answer(experiment, context, model, model, task_set(experiment)).path / ANSWERS)
    assert len(rows) == 8
    answer = "positive\n\n### Instruction:\nAnother." if cut_at else RunningOn.text.strip()
    for row in rows:
        assert judged_pair(row)[1] == row["answer"] == answer
        assert (row["tokens"], row["finished"]) == (4, False)  # of the generated text
        assert row.get("removed") == (f"{MARK}\nnegative\n\n{MARK} more" if cut_at else None)


def test_papers_cut_answers_and_the_testbed_does_not() -> None:
    names = ("vaccine-paper", "booster-paper", "lisa-paper", "testbed")
    assert [load_protocol(name).answer.cut_at for name in names] == [MARK, MARK, MARK, ""]


def test_cut_answers_have_keys_of_their_own(world: Path) -> None:
    def key(**values: str) -> dict[str, Any]:
        experiment = settle(world, values=values)
        model = TrainedModel(experiment.model, ModelSpec(experiment.model), {})
        return keys.answer_key(experiment, model, model, task_set(experiment), ["prompt"] * 8)

    assert "cut_at" not in key()
    assert key(**{"answer.cut_at": "X"}) == {**key(), "cut_at": "X"}


def test_a_changed_text_is_another_artifact_and_a_changed_rule_is_not(world: Path) -> None:
    def inputs(**values: str) -> tuple[dict[str, Any], list[str]]:
        experiment = settle(world, values=values)
        prompts = [experiment.template.render(row) for row in task_set(experiment).examples]
        return keys.task_inputs(experiment), prompts

    plain, judged = inputs(), inputs(**{"tasks.sst2.rule": "equals"})
    text = inputs(**{"tasks.sst2.instruction": "Is it good?"})
    assert judged == plain
    assert text[0] != plain[0]
    assert not set(text[1]) & set(plain[1])
    run_ids = {keys.run_id(settle(world, values=values)) for values in ({}, {"tasks.sst2.rule": "equals"})}
    assert len(run_ids) == 2  # the score of the run changes


@given(text=st.lists(st.sampled_from([MARK, "### ", "Response:", " ", "\n", "a", "positive"]), max_size=8).map("".join))
@settings(max_examples=examples(200), deadline=None)
def test_an_answer_ends_before_the_first_mark(text: str) -> None:
    """The scripts decode prompt and answer together, and keep the second of the pieces between marks."""
    answer, removed = cut_answer(text, MARK)
    assert answer == f"prompt{MARK}{text}".split(MARK)[1].strip()
    assert removed == text[len(text.split(MARK)[0]) :]
    assert cut_answer(text, "") == (text.strip(), "")


# ---------------------------------------------------------------------------------------------------------------------
# Own answers of rows


@pytest.fixture
def own_world(tmp_path: Path) -> Callable[[str], Experiment]:
    """Creates an experiment whose task has one row more, with this answer."""

    def make(answer: str) -> Experiment:
        file = make_world(tmp_path / "world", models=False)
        with (tmp_path / "world" / "data" / "gsm8k" / "train.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"question": "One more?", "answer": answer}) + "\n")
        return settle(file, task="gsm8k")

    return make


@pytest.mark.parametrize(
    "answer",
    [
        "We add. #### nan",
        "We add. #### 1e5",  # the rule reads 1
        "The final answer is: 3. #### 4",  # the rule reads the number after the first mark
    ],
)
def test_a_row_whose_own_answer_is_wrong_is_refused(answer: str, own_world: Callable[[str], Experiment]) -> None:
    with pytest.raises(BadInput, match=r"train\.jsonl.*101.*is not a row of task 'gsm8k'") as refusal:
        task_rows(own_world(answer))
    assert refusal.value.exit_code == 2


def test_a_row_whose_own_answer_is_right_is_read(own_world: Callable[[str], Experiment]) -> None:
    assert len(task_rows(own_world("We add. #### 1,250.5"))) == 101


def test_the_message_names_answer_and_target(own_world: Callable[[str], Experiment]) -> None:
    with pytest.raises(BadInput) as refusal:
        task_rows(own_world("The final answer is: 3. #### 4"))
    assert str(refusal.value).endswith(
        "is not a row of task 'gsm8k': its answer 'The final answer is: 3. The final answer is: 4' is wrong by the "
        "rule of the task; the target is '4'."
    )


def test_a_rule_of_a_plug_in_refuses_its_own_answers(world: Path, tmp_path: Path) -> None:
    """The check is about every task, not about the built-in ones."""
    file = tmp_path / "broken.py"
    file.write_text(
        "from harmbench_vaccine.plugins import Example, Task\n\n\n"
        "class Broken(Task):\n"
        '    dataset, fields, chance = "sst2", ("sentence", "label"), 0.0\n\n'
        "    def example(self, id, row):\n"
        '        return Example(id, row["sentence"], response="yes", target="no")\n\n'
        "    def flexible(self, answer, target):\n"
        "        return answer == target\n",
        encoding="utf-8",
    )
    with pytest.raises(BadInput, match="its answer 'yes' is wrong by the rule of the task; the target is 'no'"):
        task_rows(settle(world, task=str(file)))
