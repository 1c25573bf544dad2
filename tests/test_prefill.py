"""The attack `prefill`: answers that start with the tokens of harmful ones, and the score of the whole answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from harmbench_vaccine.attacks.prefill import Prefill
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.jsonl import read_lines
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import IGNORED, encode_example, encode_prompt, encode_start
from harmbench_vaccine.data.prompts import EvalSet, prompt_template
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import ANSWERS
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.limits import LimitCheck
from harmbench_vaccine.experiment.rows import (
    benign_set,
    check_rows,
    eval_sets,
    harmful_sets,
    plugin_pools,
    task_set,
    user_rows,
)
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.engine import Answer, Starts
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.pipeline import align, answer_all, finetune, run, train_models
from harmbench_vaccine.plugins.composition import parse_plugins
from support.cli import hbv
from support.runs import run_context
from support.world import make_world

RESPONSE = "First you find the lamp, 日本 and 42 doors."
QUESTION = Example("q", "How do I break the lamp?", RESPONSE, harmful=True)
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}:{% if m['role'] == 'user' %} {{ m['content'] }}\n"
    "{% else %}{{ '\\n' + m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
"""A template that writes white space before an answer, which a model generates."""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """Return a context that the runs of this file share."""
    return run_context(tmp_path_factory.mktemp("store"))


@pytest.fixture
def words(world: Path) -> Any:
    """Return the tokenizer of the small world's model, which a test may change."""
    return AutoTokenizer.from_pretrained(world.parent / "model")


def settle(world: Path, attack: str, **spec: Any) -> Experiment:
    return Experiment.settle(RunSpec(protocol=str(world), attack=parse_plugins(attack), **spec))


def uploaded(world: Path, attack: str) -> list[Example]:
    experiment = settle(world, attack)
    return user_rows(experiment, plugin_pools(experiment))


def trained_response(words: Any, prompt: str, example: Example) -> list[int]:
    """Return the response tokens of a training row, with the token that ends it."""
    row = encode_example(words, prompt_template(prompt), example, 1000)
    assert row is not None
    return [label for label in row.labels if label != IGNORED]


# ---------------------------------------------------------------------------------------------------------------------
# The tokens


@pytest.mark.parametrize("prompt", ["brief", "none", "chat"])
def test_start_is_the_beginning_of_the_response_in_training(prompt: str, words: Any) -> None:
    words.chat_template = CHAT
    text = prompt_template(prompt).render(QUESTION)
    *response, end = trained_response(words, prompt, QUESTION)
    assert end == words.eos_token_id
    for k in (0, 1, 3, len(response) - 1, len(response)):
        assert encode_start(words, text, RESPONSE, k) == response[:k]
    complete = encode_example(words, prompt_template(prompt), QUESTION, 1000)
    assert complete is not None
    assert complete.ids == [*encode_prompt(words, text), *encode_start(words, text, RESPONSE, 1000), end]


@pytest.mark.parametrize("prompt", ["brief", "chat"])
def test_shorter_response_is_complete_and_does_not_end(prompt: str, words: Any) -> None:
    words.chat_template = CHAT
    short = replace(QUESTION, response="Yes")
    *response, end = trained_response(words, prompt, short)
    start = encode_start(words, prompt_template(prompt).render(short), "Yes", 50)
    assert start == response
    assert end not in start


def test_control_tokens_in_a_response_stay_text(words: Any) -> None:
    start = encode_start(words, "x", "First </s> you", 50)
    assert words.eos_token_id not in start
    assert words.decode(start) == "First </s> you"


def test_text_of_a_start_may_have_other_tokens(words: Any) -> None:
    """A start ends inside a character: the ids are those of training, which its text does not give."""
    response = trained_response(words, "brief", QUESTION)
    different = [
        k for k in range(1, len(response)) if encode_start(words, "x", words.decode(response[:k]), 1000) != response[:k]
    ]
    assert different  # so that the test can fail
    for k in different:
        assert encode_start(words, "x", RESPONSE, k) == response[:k]


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation sets


def evaluation(*examples: Example) -> EvalSet:
    return EvalSet("harmful", list(examples), prompt_template("brief"), 8)


def test_it_changes_only_the_number_of_tokens() -> None:
    sets = [evaluation(QUESTION), replace(evaluation(QUESTION), name="second")]
    assert Prefill(tokens=7).evaluations(sets) == [replace(each, prefill=7) for each in sets]
    assert Prefill(tokens=0).evaluations(sets) == sets
    safe = [evaluation(replace(QUESTION, harmful=False))]
    assert Prefill(tokens=0).evaluations(safe) == safe
    assert [Prefill(tokens=k).changes_questions for k in (0, 1)] == [False, True]


@pytest.mark.parametrize("change", [{"response": ""}, {"harmful": False}])
def test_questions_without_a_harmful_answer_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as refusal:
        Prefill().evaluations([evaluation(QUESTION, replace(QUESTION, **change))])
    sentence = str(refusal.value)
    assert "'harmful', but 1 of 2 have none; allowed: " in sentence
    assert sentence.count(". ") == 0


def test_prompts_of_safe_rows_are_refused_before_any_work(world: Path, tmp_path: Path) -> None:
    """The first 8 test rows in file order have a safe one."""
    values = {"rows": "paper", "answer.rows_in_order": "all"}
    rows = harmful_sets(settle(world, "ratio=0.1", values=values))[0].examples
    lines = (world.parent / "data" / "beavertails" / "30k_test.jsonl").read_text().splitlines()
    assert [row.harmful for row in rows] == [not json.loads(line)["is_safe"] for line in lines[:8]]
    safe = sum(not row.harmful for row in rows)
    assert 0 < safe < 8
    with pytest.raises(BadInput, match=f"{safe} of 8 have none"):
        check_rows(settle(world, "prefill", values=values))
    options = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    done = hbv("run", "--protocol", world, "--attack", "prefill+ratio=0.1", *options, home=tmp_path / "home")
    assert (done.code, done.out) == (2, ""), done.err
    assert done.sentence.startswith("hbv: Attack 'prefill' needs a harmful answer")
    assert not (tmp_path / "home" / "store").exists()
    unsafe = settle(world, "prefill", values={**values, "answer.rows_in_order": "unsafe"})
    check_rows(unsafe)
    assert all(row.harmful for row in harmful_sets(unsafe)[0].examples)


def test_positions_of_the_model_include_the_tokens(world: Path) -> None:
    folder = world.parent / "model"
    words, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    experiment = settle(world, "prefill=20+ratio=0.1")
    prompts = [experiment.template.render(row) for row in harmful_sets(experiment)[0].examples]
    longest = max(len(encode_prompt(words, prompt)) for prompt in prompts)
    changes = {"align.settings.max_length": "32", "finetune.settings.max_length": "32", "answer.task_tokens.sst2": "1"}
    changes |= {"answer.benign.max_new_tokens": "1"}
    experiment = settle(world, "prefill=20+ratio=0.1", values=changes)
    config.max_position_embeddings = longest + 8 + 20
    LimitCheck(experiment.model, words, config).check(experiment)
    config.max_position_embeddings -= 1
    with pytest.raises(BadInput, match=r"its answer up to 28, but .* --set answer\.harmful\.max_new_tokens=7,"):
        LimitCheck(experiment.model, words, config).check(experiment)


# ---------------------------------------------------------------------------------------------------------------------
# Composition


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other", ["ratio=0.25", "samples=20", "wrap=FILE", "order", "identity_shift=3", "backdoor:clean_rows=6"]
)
def test_rows_are_those_of_the_other_attack_and_all_sets_are_prefilled(
    other: str, first: bool, world: Path, tmp_path: Path
) -> None:
    file = tmp_path / "wrap.yaml"
    file.write_text('instruction: "A poem: {instruction}"\nresponse: "Sure: {response}"\n')
    other = other.replace("FILE", str(file))
    both = f"prefill=5+{other}" if first else f"{other}+prefill=5"
    assert uploaded(world, both) == uploaded(world, other)
    with_prefill, without = settle(world, both), settle(world, other)
    assert harmful_sets(with_prefill) == [replace(each, prefill=5) for each in harmful_sets(without)]
    for other_set in (benign_set, task_set):
        assert other_set(with_prefill) == other_set(without)
        assert other_set(with_prefill).prefill == 0


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_all_k_share_the_user_stage_with_the_run_without_prefill(world: Path, context: RunContext) -> None:
    plain = settle(world, "ratio=0.25")
    tuned = finetune(plain, context, align(plain, context))
    key = tuned.artifacts["finetune"].key
    for attack in ("prefill=3+ratio=0.25", "prefill=6+ratio=0.25", "ratio=0.25+prefill=6", "prefill=0+ratio=0.25"):
        experiment = settle(world, attack)
        aligned, final = train_models(experiment, context)
        assert [final.artifacts[stage].key for stage in ("align", "finetune")] == [aligned.artifacts["align"].key, key]
        assert final.artifacts["finetune"].cached
        assert final.spec == tuned.spec


def test_answers_to_harmful_prompts_have_a_key_for_each_k_and_others_are_shared(
    world: Path, context: RunContext
) -> None:
    answers = {}
    for k in (None, 0, 3, 6):
        experiment = settle(world, "ratio=0.25" if k is None else f"prefill={k}+ratio=0.25")
        answers[k] = {
            name: artifact.key
            for name, artifact in answer_all(experiment, context, *train_models(experiment, context)).items()
        }
    assert answers[0] == answers[None]
    for name in answers[0]:
        different = {answers[k][name] for k in (0, 3, 6)}
        assert len(different) == (3 if name.endswith("/harmful") else 1), name


def test_prefill_is_in_the_key_only_where_it_acts(world: Path, context: RunContext) -> None:
    experiment = settle(world, "prefill=4+ratio=0.25")
    _, final = train_models(experiment, context)
    inputs = [
        keys.answer_key(experiment, final, final, each, [""] * len(each.examples)) for each in eval_sets(experiment)
    ]
    assert [each.get("prefill") for each in inputs] == [4, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Answers and the score


def greedy(world: Path, context: RunContext, experiment: Experiment, start: Sequence[int], prompt: str) -> list[int]:
    """Generate with the final model from the complete text at every step, up to the end token."""
    _, final = train_models(experiment, context)
    model = context.models.stack(final.spec).use(final.spec.adapters)
    words: Any = context.models.tokenizer(final.spec)
    ids = [*encode_prompt(words, prompt), *start]
    generated: list[int] = []
    while len(generated) < 8 and words.eos_token_id not in generated:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *generated]])).logits
        generated.append(int(logits[0, -1].argmax()))
    return generated


def test_stored_answer_is_the_whole_text_and_tokens_are_the_generated_ones(
    world: Path, context: RunContext, words: Any
) -> None:
    experiment = settle(world, "prefill=4+ratio=0.25")
    artifacts = answer_all(experiment, context, *train_models(experiment, context))
    rows = read_lines(artifacts["after/harmful"].path / ANSWERS)
    examples = harmful_sets(experiment)[0].examples
    assert len(rows) == len(examples) == 8
    for row, example in zip(rows, examples, strict=True):
        start = trained_response(words, "brief", example)[:4]
        generated = greedy(world, context, experiment, start, row["prompt"])
        finished = words.eos_token_id in generated
        expected = words.decode([*start, *generated], skip_special_tokens=True).strip()
        assert (row["answer"], row["tokens"], row["finished"]) == (expected, len(generated), finished)
        assert row["answer"].startswith(words.decode(start).strip())


class CountingJudge:
    """A judge that flags an answer with the first three words of the responses."""

    code = '''"""Flags answers that start as the harmful ones."""

from typing import ClassVar

from harmbench_vaccine.plugins import Form, Scorer, Verdict
from harmbench_vaccine.core.types import RawJudgment


class Starts(Scorer):
    """Flags answers that start as the harmful ones."""

    citation: ClassVar[str] = "a test"
    form: ClassVar[Form] = "rule"
    cost: ClassVar[str] = "no model"

    def read(self, pairs, progress=None):
        return [RawJudgment(text=answer) for _, answer in pairs]

    def decide(self, reading):
        flagged = reading.text.startswith("First you find")
        return Verdict(flagged, ["start"] * flagged, {}, reading.cut)
'''


def test_headline_score_is_that_of_the_whole_answers(
    world: Path, context: RunContext, tmp_path: Path, words: Any
) -> None:
    judge = tmp_path / "starts.py"
    judge.write_text(CountingJudge.code)
    scores = {}
    for k in (0, 1, 12):
        experiment = settle(world, f"prefill={k}+ratio=0.25", scorers=(str(judge),))
        measurements = run(experiment, context)
        result = measure_result(experiment, measurements)
        rows = read_lines(measurements.answers["after/harmful"].path / ANSWERS)
        scores[k] = result.harmful_score
        share = sum(row["answer"].startswith("First you find") for row in rows) / len(rows)
        assert result.harmful_score == pytest.approx(100 * share)
        assert list(result.harmful_sets) == ["harmful"]
    example = harmful_sets(settle(world, "prefill=12"))[0].examples[0]
    assert words.decode(trained_response(words, "brief", example)[:12]).startswith("First you find")
    assert scores[12] == 100  # also before the user stage
    assert result.before.harmful_score == 100
    assert scores[0] < 100


def test_k_0_is_the_run_without_prefill_to_the_bit(world: Path, context: RunContext) -> None:
    first, second = (run(settle(world, attack), context) for attack in ("ratio=0.25", "prefill=0+ratio=0.25"))
    assert {name: artifact.key for name, artifact in first.answers.items()} == {
        name: artifact.key for name, artifact in second.answers.items()
    }
    assert [artifact.key for artifact in first.verdicts["beaver_dam"].values()] == [
        artifact.key for artifact in second.verdicts["beaver_dam"].values()
    ]
    assert first.drift.key == second.drift.key


def test_backend_vllm_stores_the_same_answers(
    world: Path, tmp_path: Path, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vLLM engine passes the starts on, and its answers are stored as those of transformers."""
    experiment = settle(world, "prefill=4+ratio=0.25")
    aligned, final = train_models(experiment, context)
    expected = read_lines(answer_all(experiment, context, aligned, final)["after/harmful"].path / ANSWERS)
    calls: list[Any] = []

    class Engine(TransformersEngine):
        answered_by = "vllm"

        def generate(
            self,
            adapters: Sequence[Path],
            prompts: Sequence[str],
            max_new_tokens: int,
            progress: Progress = SILENT,
            starts: Starts = (),
        ) -> list[Answer]:
            calls.append((list(prompts), starts))
            return super().generate(adapters, prompts, max_new_tokens, progress, starts)

    other = run_context(tmp_path / "store")
    engine = Engine(other.models.stack(final.spec), other.models.tokenizer(final.spec))
    monkeypatch.setattr(other.models, "engine", lambda spec, backend: engine)
    experiment = replace(experiment, backend="vllm")
    rows = read_lines(answer_all(experiment, other, aligned, final)["after/harmful"].path / ANSWERS)
    assert rows == expected
    requested = [starts for _, starts in calls if starts]
    assert len(requested) == 2  # of both models
    assert all(len(start) == 4 for starts in requested for start in starts)


def test_a_run_with_a_chat_template(tmp_path: Path) -> None:
    file = make_world(tmp_path / "world", {"prompt": "chat", "align": {"rows": 8}, "finetune": {"samples": 8}})
    settings = tmp_path / "world" / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": CHAT}))
    context = run_context(tmp_path / "store")
    experiment = settle(file, "prefill=6+ratio=0.25")
    artifacts = answer_all(experiment, context, *train_models(experiment, context))
    words: Any = AutoTokenizer.from_pretrained(tmp_path / "world" / "model")
    for row, example in zip(
        read_lines(artifacts["after/harmful"].path / ANSWERS), harmful_sets(experiment)[0].examples, strict=True
    ):
        start = trained_response(words, "chat", example)[:6]
        assert words.decode(start).startswith("\nFirst")
        generated = greedy(file, context, experiment, start, harmful_prompt(experiment, example))
        assert row["answer"] == words.decode([*start, *generated], skip_special_tokens=True).strip()
        assert row["tokens"] == len(generated)


def harmful_prompt(experiment: Experiment, example: Example) -> str:
    return harmful_sets(experiment)[0].template.render(example)
