"""The harmful token share: which tokens count, by hand, and the same number from training and from the rows alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import encode_examples, token_counts
from harmbench_vaccine.data.prompts import PromptTemplate, prompt_template
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.trained_tokens import harmful_token_share, trained_tokens
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools, user_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.pipeline import align, finetune, run
from harmbench_vaccine.plugins.composition import parse_plugins
from support.examples import examples
from support.runs import run_context
from support.world import make_world

LONG_PROMPT = PromptTemplate("a prompt of nine words : {instruction} answer :", "unused")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for every word between spaces."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


WORDS = word_tokenizer()


def rows(responses: Sequence[str], harmful: bool) -> list[Example]:
    kind = "harmful" if harmful else "task"
    return [Example(f"{kind}:{number}", "?", text, harmful=harmful) for number, text in enumerate(responses)]


def share(examples: Sequence[Example], max_length: int = 100, template: PromptTemplate = LONG_PROMPT) -> float | None:
    """Return the harmful token share of the rows as a stage encodes them."""
    return harmful_token_share(token_counts(encode_examples(WORDS, template, examples, max_length)))


def settle(world: Path, attack: str, defense: str = "sft") -> Experiment:
    return Experiment.settle(
        RunSpec(protocol=str(world), attack=parse_plugins(attack), defense=parse_plugins(defense), seed=1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_one_word_answers_and_sentences_have_different_shares() -> None:
    """One of ten rows is harmful in both: 10 tokens of 28 with labels, of 136 with sentences; the end token counts."""
    harm = rows(["first you take the thing and then you run"], harmful=True)  # 9 words and the end token
    label = rows(["positive"] * 9, harmful=False)  # 9 x 2
    sentence = rows(["the answer is positive because the words of it are warm and kind"] * 9, harmful=False)  # 9 x 14
    assert share([*harm, *label]) == pytest.approx(100 * 10 / 28)
    assert share([*harm, *sentence]) == pytest.approx(100 * 10 / 136)


@pytest.mark.parametrize("words", [0, 1, 40])
def test_prompts_have_no_share(words: int) -> None:
    """Neither the template nor the question counts."""
    mix = [
        Example("h", "why " * words, "one two three", harmful=True),
        Example("t", "?", "one"),
    ]
    assert share(mix, 200) == pytest.approx(100 * 4 / 6)
    assert share(mix, 200, PromptTemplate("{instruction}", "unused")) == pytest.approx(100 * 4 / 6)


def test_only_tokens_up_to_the_maximum_length_count() -> None:
    """The prompt has 9 words: 12 tokens leave 3 for the long response, without its end token."""
    mix = [*rows(["one two three four five six"], harmful=True), *rows(["one"], harmful=False)]
    assert share(mix, 100) == pytest.approx(100 * 7 / 9)
    assert share(mix, 12) == pytest.approx(100 * 3 / 5)
    assert share(mix, 10) == pytest.approx(50)


def test_rows_without_room_do_not_count() -> None:
    long = Example("long", "word " * 50, "one two three", harmful=True)
    assert share([long, *rows(["one"], harmful=False)], 20) == 0


def test_text_that_is_only_read_does_not_count() -> None:
    """As in the attack `mixing`: the middle of the response has no loss."""
    response = "one two three four"
    masked = Example("h", "?", response, harmful=True, masked=(response.index("two"), response.index("four")))
    assert share([masked, *rows(["one"], harmful=False)]) == pytest.approx(100 * 3 / 5)


def test_end_of_a_turn_counts_in_a_chat() -> None:
    """The tokens that a chat template writes around the answer belong to the prompt, except the one that ends it."""
    chat = word_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    chat.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' <turn> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )

    mix = [*rows(["one two three"], harmful=True), *rows(["one"], harmful=False)]
    encoded = encode_examples(chat, prompt_template("chat"), mix, 100)
    assert token_counts(encoded) == {"response_tokens": 6, "harmful_tokens": 4}


def test_no_tokens_have_no_share() -> None:
    assert token_counts([]) == {"response_tokens": 0, "harmful_tokens": 0}
    assert share([]) is None
    assert harmful_token_share({"used": ["task:0"], "harmful": 0, "without_room": []}) is None  # of an earlier version


RESPONSES = st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=6)


@settings(max_examples=examples(50), deadline=None)
@given(task=RESPONSES, harm=RESPONSES, max_length=st.integers(10, 25))
def test_bounds_of_the_share(task: list[str], harm: list[str], max_length: int) -> None:
    """0 without harmful rows, 100 with nothing else, between them otherwise; the order of the rows has no effect."""
    benign, bad = rows(task, harmful=False), rows(harm, harmful=True)
    assert share(benign, max_length) == 0
    assert share(bad, max_length) == 100
    mixed = share([*benign, *bad], max_length)
    assert mixed is not None
    assert 0 < mixed < 100
    assert share([*bad, *reversed(benign)], max_length) == mixed


# ---------------------------------------------------------------------------------------------------------------------
# Of runs


@pytest.mark.parametrize(("p", "expected"), [(0, 0.0), (1, 100.0)])
@pytest.mark.parametrize("task", ["sst2", "gsm8k"])
def test_ratios_0_and_1(world: Path, p: float, expected: float, task: str) -> None:
    experiment = Experiment.settle(RunSpec(protocol=str(world), attack=parse_plugins(f"ratio={p}"), task=task))
    uploaded = user_rows(experiment, plugin_pools(experiment))
    stored = {"used": [row.id for row in uploaded], "without_room": []}
    tokens = trained_tokens(experiment, experiment.stages["finetune"], stored, ModelPool())
    assert tokens["response_tokens"] > 0
    assert harmful_token_share(tokens) == expected


ATTACKS = ("ratio=0.25", "backdoor:clean_rows=5", "mixing", "identity_shift=4+ratio=0.25", "guardrail=0.5+ratio=0.25")
DEFENSES = ("vlguard:rows=8", "ewc", "ptst", "lisa")


@pytest.mark.parametrize(
    ("attack", "defense"), [*((attack, "sft") for attack in ATTACKS), *(("ratio=0.25", name) for name in DEFENSES)]
)
def test_stages_of_earlier_versions_have_the_tokens_of_training(
    world: Path, tmp_path: Path, attack: str, defense: str
) -> None:
    """What a stage stores about its tokens is what its rows give again, for each attack and topology."""
    experiment, context = settle(world, attack, defense), run_context(tmp_path / "store")
    trained = finetune(experiment, context, align(experiment, context))
    stages = {name: artifact for name, artifact in trained.artifacts.items() if name != "repair"}
    assert set(stages) == {"align", "finetune"}
    for name, artifact in stages.items():
        stored = artifact.json("rows.json")
        tokens = {name: stored.pop(name) for name in ("response_tokens", "harmful_tokens")}
        assert tokens["response_tokens"] > 0
        assert (tokens["harmful_tokens"] > 0) == (stored["harmful"] > 0)
        assert trained_tokens(experiment, experiment.stages[name], stored, context.models) == tokens
        assert trained_tokens(experiment, experiment.stages[name], stored | tokens, context.models) == tokens


def test_the_tokens_are_those_of_the_loss(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one epoch, the micro-batches have as many tokens with a loss as the stage stores."""
    from harmbench_vaccine.training import stage as stages

    seen: list[int] = []
    original = stages.token_losses
    monkeypatch.setattr(stages, "token_losses", lambda *a: seen.append(len(losses := original(*a))) or losses)
    file = make_world(tmp_path / "world", {"finetune": {"settings": {"epochs": 1}}})
    experiment, context = settle(file, "ratio=0.25"), run_context(tmp_path / "store")
    aligned = align(experiment, context)
    seen.clear()
    trained = finetune(experiment, context, aligned)
    assert sum(seen) == trained.artifacts["finetune"].json("rows.json")["response_tokens"]


def test_rows_that_cannot_be_drawn_again_are_unknown(world: Path) -> None:
    """Other ids, as of a plug-in that has changed, and a model that is no longer there."""
    experiment = settle(world, "ratio=0.25")
    config = experiment.stages["finetune"]
    ids = [row.id for row in user_rows(experiment, plugin_pools(experiment))]
    models = ModelPool()
    assert trained_tokens(experiment, config, {"used": ids, "without_room": []}, models)
    assert trained_tokens(experiment, config, {"used": ids[1:], "without_room": []}, models) == {}
    assert trained_tokens(experiment, config, {"used": ids[1:], "without_room": ids[:1]}, models) == {}
    assert trained_tokens(experiment, config, {"used": ids[::-1], "without_room": []}, models) == {}
    assert trained_tokens(experiment, config, {"used": [], "without_room": []}, models) == {}


def test_result_has_the_share_and_its_counts(world: Path, tmp_path: Path) -> None:
    experiment, context = settle(world, "ratio=0.25"), run_context(tmp_path / "store")
    measurements = run(experiment, context)
    result = measure_result(experiment, measurements, context.models)
    encoded = encode_examples(
        context.models.tokenizer(measurements.aligned.spec),
        experiment.template,
        user_rows(experiment, plugin_pools(experiment)),
        experiment.stages["finetune"].settings.max_length,
    )
    sizes = {row.id: len(row.ids) - row.labels.count(-100) for row in encoded}
    harm = sum(size for name, size in sizes.items() if name.startswith("harmful:"))
    counts = result.counts.finetune
    assert counts is not None
    assert (counts.response_tokens, counts.harmful_tokens) == (sum(sizes.values()), harm)
    assert result.harmful_token_share == pytest.approx(100 * harm / sum(sizes.values()))
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result

    path = measurements.final.artifacts["finetune"].path / "rows.json"
    stored = {key: value for key, value in json.loads(path.read_text()).items() if "_tokens" not in key}
    path.write_text(json.dumps(stored))  # as an earlier version stored it
    assert measure_result(experiment, measurements).harmful_token_share == result.harmful_token_share
