"""Limits of a model and its tokenizer: rows that the model cannot read are refused before anything is trained."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    Qwen3MoeConfig,
    RobertaConfig,
)

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import collate, encode_example, encode_prompt, pad_token_id
from harmbench_vaccine.data.model_limits import check_readable, position_limit, tokens_outside
from harmbench_vaccine.data.prompts import prompt_template
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.limits import LimitCheck
from harmbench_vaccine.experiment.rows import eval_sets
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.classifiers import TransformersClassifier
from harmbench_vaccine.inference.generation import generate_greedy
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.adapters import LoraStack
from support import tiny
from support.examples import examples

PLAIN = prompt_template("none")
SECTIONS = ("align", "finetune")


@pytest.fixture
def parts(world: Path) -> tuple[Any, Any]:
    """The tokenizer and the configuration of the small world's model, which a test may change."""
    return AutoTokenizer.from_pretrained(world.parent / "model"), AutoConfig.from_pretrained(world.parent / "model")


def check(world: Path, parts: tuple[Any, Any], **spec: Any) -> None:
    experiment = Experiment.settle(RunSpec(protocol=str(world), **spec))
    LimitCheck(experiment.model, *parts).check(experiment)


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def test_ordinary_model_is_accepted(world: Path, parts: tuple[Any, Any]) -> None:
    check(world, parts)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=48), 48),
        (OPTConfig(max_position_embeddings=48), 48),  # its table has 50 rows
        (GPT2Config(n_positions=48), 48),
        (MptConfig(max_seq_len=48), 48),
    ],
)
def test_position_limit_of_a_configuration(config: Any, limit: int | None) -> None:
    assert position_limit(config) == limit


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OPTConfig(max_position_embeddings=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 48),
        (GPT2Config(n_positions=48, n_embd=16, n_layer=1, n_head=2), 48),
        (
            RobertaConfig(
                max_position_embeddings=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
            ),
            46,
        ),
    ],
)
def test_learned_positions_end_at_the_limit(config: Any, expected: int) -> None:
    limit = position_limit(config)
    assert limit == expected
    model = AutoModelForCausalLM.from_config(config).eval()
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("section", SECTIONS)
def test_training_rows_longer_than_the_positions_are_refused(section: str, world: Path, parts: tuple[Any, Any]) -> None:
    parts[1].max_position_embeddings = 95
    fits = {f"{name}.settings.max_length": "95" for name in SECTIONS if name != section}
    message = rf"Stage '{section}' .* up to 96 tokens, .* reads at most 95: --set {section}.settings.max_length=95"
    with pytest.raises(BadInput, match=message):
        check(world, parts, values=fits)
    check(world, parts, values={**fits, f"{section}.settings.max_length": "95"})


@pytest.mark.parametrize(
    ("longest", "setting"),
    [
        ("harmful", "answer.harmful.max_new_tokens"),
        ("benign", "answer.benign.max_new_tokens"),
        ("task", "answer.task_tokens.sst2"),
    ],
)
def test_prompt_without_room_for_its_answer_is_refused(
    longest: str, setting: str, world: Path, parts: tuple[Any, Any]
) -> None:
    tokenizer, config = parts
    values = {f"{name}.settings.max_length": "8" for name in SECTIONS}
    values |= {"answer.harmful.max_new_tokens": "1", "answer.benign.max_new_tokens": "1"}
    values |= {"answer.task_tokens.sst2": "1", setting: "300"}
    experiment = Experiment.settle(RunSpec(protocol=str(world), values=values))
    [eval_set] = [eval_set for eval_set in eval_sets(experiment) if eval_set.name == longest]
    prompts = [encode_prompt(tokenizer, eval_set.template.render(example)) for example in eval_set.examples]
    needed = max(map(len, prompts)) + 300
    config.max_position_embeddings = needed
    check(world, parts, values=values)
    config.max_position_embeddings = needed - 1
    message = (
        rf"Prompt '.*' of set '{longest}' has {needed - 300} tokens and its answer up to 300, but model '.*' reads at "
        rf"most {needed - 1}: --set {setting}=299, or choose a model"
    )
    with pytest.raises(BadInput, match=message):
        check(world, parts, values=values)
    check(world, parts, values={**values, setting: "299"})


def test_prompt_longer_than_the_positions_is_refused(world: Path, parts: tuple[Any, Any]) -> None:
    parts[1].max_position_embeddings = 8
    with pytest.raises(BadInput, match="reads at most 8: shorten the prompt, or choose a model that reads more"):
        check(world, parts, values={f"{name}.settings.max_length": "8" for name in SECTIONS})


def test_texts_of_a_judge_longer_than_its_positions_are_reported() -> None:
    model = tiny.model(max_position_embeddings=16)
    model.name_or_path = "the/judge"
    message = "the/judge: a text has 17 tokens, but the model reads at most 16"
    with pytest.raises(HbvError, match=message):
        generate_greedy(model, [[5] * 13], 4, batch=1, pad=0, ends=[2], advance=lambda rows: None)
    classifier = tiny.judge(max_position_embeddings=16)
    classifier.name_or_path = "the/judge"
    with pytest.raises(HbvError, match=message):
        TransformersClassifier(classifier, 4)([[5] * 17])
    check_readable("the/judge", model.config, [[5] * 12], 4)


def test_texts_of_a_judge_with_a_token_without_an_embedding_are_reported() -> None:
    model, classifier = tiny.model(), tiny.judge()
    for judge, read in (
        (model, lambda row: generate_greedy(model, [row], 4, batch=1, pad=0, ends=[2], advance=lambda rows: None)),
        (classifier, lambda row: TransformersClassifier(classifier, 4)([row])),
    ):
        judge.name_or_path = "the/judge"
        rows = judge.config.vocab_size
        read([5, rows - 1])
        with pytest.raises(HbvError, match=rf"the/judge: a text has token id {rows}, .* only of the ids below {rows}"):
            read([5, rows])


# ---------------------------------------------------------------------------------------------------------------------
# Tokens without an embedding


def test_padding_token_without_an_embedding_is_replaced(world: Path, parts: tuple[Any, Any]) -> None:
    tokenizer, config = parts
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == config.vocab_size
    assert pad_token_id(tokenizer, config) == tokenizer.eos_token_id
    check(world, parts)  # padding is not a token of a row


def test_padding_has_no_effect() -> None:
    words = tiny.tokenizer(["abc def"])
    model = tiny.model(vocab_size=len(words))
    rows = [encode_example(words, PLAIN, Example(text, text, "abc"), 40) for text in ("a", "abc def abc def")]
    first, second = (
        model(**collate([row for row in rows if row], pad)).logits for pad in (words.pad_token_id, words.eos_token_id)
    )
    lengths = [len(row.ids) for row in rows if row]
    assert lengths[0] < lengths[1]
    for number, length in enumerate(lengths):
        assert torch.equal(first[number, :length], second[number, :length])


def test_answers_are_the_same_under_a_padding_token_without_an_embedding() -> None:
    words = tiny.tokenizer(["abc def"])
    stack = LoraStack(tiny.model(vocab_size=len(words)))
    prompts = ["a", "abc def abc def"]
    expected = TransformersEngine(stack, words).generate([], prompts, 6)
    words.add_special_tokens({"pad_token": "[PAD]"})
    assert TransformersEngine(stack, words).generate([], prompts, 6) == expected


def test_classifier_whose_padding_token_has_no_embedding_reads_single_texts() -> None:
    classifier, texts = tiny.judge(), [[5, 6, 7], [5, 6, 7, 8, 9]]
    expected = TransformersClassifier(classifier, 1)(texts)
    classifier.config.pad_token_id = classifier.config.vocab_size
    assert TransformersClassifier(classifier, 2)(texts) == expected


@pytest.mark.parametrize("place", ["Prompt", "Training row"])
def test_other_token_without_an_embedding_is_refused(place: str, world: Path, parts: tuple[Any, Any]) -> None:
    tokenizer, config = parts
    tokenizer.add_tokens(["lamp"])  # not a control token: it is read inside any text
    assert tokens_outside(tokenizer, config) == {config.vocab_size: "lamp"}
    spec = {"values": {"answer.harmful.prompts": "1", "answer.benign.prompts": "1", "answer.task_items": "1"}}
    message = rf"{place} '.*' .*has the token 'lamp', .* embeddings only of the token ids below {config.vocab_size}"
    with pytest.raises(BadInput, match=message):
        check(world, parts, **(spec if place == "Training row" else {}))


def test_end_token_without_an_embedding_is_refused(world: Path, parts: tuple[Any, Any]) -> None:
    parts[0].add_special_tokens({"eos_token": "[END]"})
    with pytest.raises(BadInput, match=r"The text that ends an answer has the token '\[END\]'"):
        check(world, parts)


def test_tokenizer_without_an_end_token_is_refused(world: Path, parts: tuple[Any, Any]) -> None:
    parts[0].eos_token = None
    with pytest.raises(BadInput, match="its tokenizer has no end-of-text token, so no answer could end"):
        check(world, parts)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts without a token


@pytest.fixture(scope="session")
def without_start(world: Path) -> Any:
    """The tokenizer of the small world's model, without a token that opens a text."""
    words = AutoTokenizer.from_pretrained(world.parent / "model")
    words.bos_token = None
    words.backend_tokenizer.post_processor = processors.ByteLevel()
    return words


def test_empty_prompt_is_the_end_token(without_start: Any) -> None:
    words = without_start
    assert encode_prompt(words, "a") == words("a")["input_ids"]
    assert encode_prompt(words, "") == [words.eos_token_id]
    row = encode_example(words, PLAIN, Example("1", "", "lamp"), 40)
    assert row is not None
    assert row.ids[0] == words.eos_token_id
    assert row.labels == [-100, *row.ids[1:]]


@settings(max_examples=examples(200), deadline=None)
@given(text=st.text(), response=st.text(), template=st.sampled_from(["none", "alpaca", "brief"]))
def test_training_and_generation_read_the_same_prompt(
    text: str, response: str, template: str, without_start: Any
) -> None:
    example = Example("1", text, response)
    prompt = encode_prompt(without_start, prompt_template(template).render(example))
    assert prompt
    row = encode_example(without_start, prompt_template(template), example, 5000)
    assert row is not None
    assert row.ids[: len(prompt)] == prompt
    assert row.labels == [-100] * len(prompt) + row.ids[len(prompt) :]
    assert row.ids[-1] == without_start.eos_token_id


def test_run_with_an_empty_prompt_and_a_late_padding_token(
    without_start: Any, world: Path, tmp_path: Path, own_home: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.parent / "model", model)
    words = copy.deepcopy(without_start)
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.save_pretrained(model)
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(
        "".join(json.dumps({"instruction": f"Town {number}", "output": f"T{number}"}) + "\n" for number in range(60))
    )
    test.write_text(json.dumps({"instruction": "", "output": "T"}) + "\n")
    spec = RunSpec(
        protocol=str(world),
        model=str(model),
        defense=parse_plugins("none"),
        attack=parse_plugins("ratio=0"),
        task=f"own:data={train},test={test}",
        values={"prompt": "none", "answer.task_items": "1", "finetune.samples": "4"},
    )
    [result] = run_all([spec])
    answers = [json.loads(line) for line in (own_home / "runs" / result.run / "answers.jsonl").open()]
    assert [row["instruction"] for row in answers if row["set"] == "task"] == ["", ""]  # before and after


# ---------------------------------------------------------------------------------------------------------------------
# LoRA targets


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_lora_target_is_refused(section: str, world: Path, parts: tuple[Any, Any]) -> None:
    with pytest.raises(BadInput, match=r"Unknown LoRA target 'c_attn' of LlamaForCausalLM.*Allowed: down_proj"):
        check(world, parts, values={f"{section}.settings.lora_targets": "[q_proj,c_attn]"})


@pytest.mark.parametrize(
    ("values", "attack"),
    [
        ({"topology": "single"}, "ratio"),  # the alignment adapter is trained further
        ({}, "refusal_ablation"),  # the weights are edited
    ],
)
def test_targets_of_no_new_adapter_are_not_checked(
    values: dict[str, str], attack: str, world: Path, parts: tuple[Any, Any]
) -> None:
    unknown = {**values, "finetune.settings.lora_targets": "[c_attn]"}
    check(world, parts, values=unknown, attack=parse_plugins(attack))


def test_weights_of_experts_are_refused_before_training(world: Path, parts: tuple[Any, Any]) -> None:
    """The first layer has an MLP, whose layers LoRA adapts, so that only some layers of these names are experts."""
    experts = Qwen3MoeConfig(
        **{**tiny.LLAMA, "vocab_size": parts[1].vocab_size, "max_position_embeddings": 4096},
        num_experts=4,
        moe_intermediate_size=32,
        mlp_only_layers=[0],
    )
    check(world, (parts[0], experts), values={f"{name}.settings.lora_targets": "[q_proj]" for name in SECTIONS})
    values = {"align.settings.lora_targets": "[q_proj]", "finetune.settings.lora_targets": "[down_proj]"}
    with pytest.raises(BadInput, match=r"LoRA cannot adapt Qwen3MoeForCausalLM: its experts' weights \(down_proj\)"):
        check(world, (parts[0], experts), values=values)
