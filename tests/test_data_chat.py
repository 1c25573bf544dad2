"""Prompt `chat`: conversations as tokens, for tokenizers and chat templates like those of five model families."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import IGNORED, collate, encode_example, encode_prompt, pad_token_id
from harmbench_vaccine.data.prompts import ChatTemplate, Conversation, PromptTemplate, prompt_template
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.judge_prompts import judge_prompt_ids
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.adapters import LoraStack
from support import tiny
from support.world import make_world

CHAT = prompt_template("chat")
TEXTS = [
    "system user assistant model You are a helpful assistant. Be brief. Be safe. What is a lamp? It is a light.",
    "[INST] <<SYS>> <</SYS>> [/INST] How do I open the door? Turn the key. Name a word\n\n. Sure, here it is.",
]

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
)
TEMPLATES = {
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set lead = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set lead = false %}{% endif %}{% for message in rest %}" + _ALTERNATE + ""
    "{% if loop.index0 == 0 and lead %}{% set text = '<<SYS>>\\n' + lead + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set text = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "qwen2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}" + _ALTERNATE + ""
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + ""
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
}
CONTROLS = {
    "llama2": ["<unk>", "<s>", "</s>"],
    "mistral": ["<unk>", "<s>", "</s>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
NAMES: dict[str, dict[str, str]] = {
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},  # no padding token
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},  # padding that is the end token
}
ENDS = {"llama2": "</s>", "mistral": "</s>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "qwen2": "<|im_end|>"}
FAMILIES = list(TEMPLATES)


def family(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer like the family's: SentencePiece for Llama 2, Mistral and Gemma, else byte-level."""
    words = Tokenizer(models.BPE(byte_fallback=False))
    spaced = name in ("llama2", "mistral", "gemma")
    if spaced:
        scheme = "never" if name == "gemma" else "first"
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        words.decoder = decoders.Metaspace(prepend_scheme=scheme)
    else:
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = decoders.ByteLevel()
    alphabet = sorted(set(map(chr, range(33, 127))) | set("▁\n")) if spaced else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROLS[name], initial_alphabet=list(alphabet), show_progress=False
    )
    words.train_from_iterator(TEXTS * 4, trainer)
    if bos := NAMES[name].get("bos_token"):
        words.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, words.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **NAMES[name])
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS[name]})
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: family(name) for name in FAMILIES}


def question(user: str, system: str = "") -> Conversation:
    rendered = CHAT.prefixed(system).render(Example("", user))
    assert isinstance(rendered, Conversation)
    return rendered


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_equals_the_rendered_template(tokenizers: Any, name: str) -> None:
    words = tokenizers[name]
    expected = words.apply_chat_template(
        [{"role": "user", "content": "What is a lamp?"}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    ids = encode_prompt(words, question("What is a lamp?"))
    assert ids == expected
    if bos := NAMES[name].get("bos_token"):
        assert [place for place, token in enumerate(ids) if token == words.convert_tokens_to_ids(bos)] == [0]


@pytest.mark.parametrize("name", FAMILIES)
def test_row_cannot_spell_control_tokens(tokenizers: Any, name: str) -> None:
    """Not in the user's message, the system message or the response."""
    words = tokenizers[name]
    spelled = "".join(CONTROLS[name])
    honest, fake = (encode_prompt(words, question(f"What {text} is", f"Be {text} safe")) for text in ("", spelled))
    for token in CONTROLS[name]:
        number = words.convert_tokens_to_ids(token)
        assert honest.count(number) == fake.count(number)
    assert spelled in words.decode(fake, clean_up_tokenization_spaces=False).replace("> <", "><")
    row = encode_example(words, CHAT, Example("", "What", response=f"It {spelled} is"), 1000)
    assert row is not None
    trained = [label for label in row.labels if label != IGNORED]
    assert [token for token in trained if words.decode([token]) in CONTROLS[name]] == trained[-1:]


def test_both_encodings_agree_without_control_tokens(tokenizers: Any) -> None:
    """Encoding piece by piece gives the tokens of the complete text if a row contains no control tokens."""
    for name in ("llama3", "qwen2", "gemma"):
        words = tokenizers[name]
        complete = encode_prompt(words, question("What is a lamp?", "Be brief."))
        spelled = encode_prompt(words, question("What is a lamp? " + ENDS[name], "Be brief."))
        lamp = next(end for end in range(len(complete)) if words.decode(complete[:end]).endswith("lamp?"))
        assert spelled[:lamp] == complete[:lamp]
        turn = [words.convert_tokens_to_ids(ENDS[name]), *complete[lamp + 1 :]]
        assert spelled[-len(turn) :] == turn


@pytest.mark.parametrize("name", FAMILIES)
def test_system_message_position(tokenizers: Any, name: str) -> None:
    """The system message is where the template has one, or else before the user's message."""
    words = tokenizers[name]
    text = words.decode(encode_prompt(words, question("What is a lamp?", "Be safe.\n\n")))
    place = {
        "llama2": "<<SYS>>\nBe safe.\n<</SYS>>\n\nWhat is a lamp?",
        "llama3": "system<|end_header_id|>\n\nBe safe.<|eot_id|>",
        "qwen2": "<|im_start|>system\nBe safe.<|im_end|>",
        "gemma": "user\nBe safe.\n\nWhat is a lamp?<end_of_turn>",
        "mistral": "[INST] Be safe.\n\nWhat is a lamp? [/INST]",
    }[name]
    assert place in text
    assert "helpful assistant" not in text  # replaces the template's default system message
    assert text.count("Be safe.") == text.count("What is a lamp?") == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_response_ends_the_model_turn(tokenizers: Any, name: str) -> None:
    """The labels are the response and the end of the turn; prompt and labels together are the template's text."""
    words = tokenizers[name]
    row = encode_example(words, CHAT, Example("", "What is a lamp?", response="It is a light."), 1000)
    assert row is not None
    prompt = encode_prompt(words, question("What is a lamp?"))
    assert row.ids[: len(prompt)] == prompt
    assert row.labels == [IGNORED] * len(prompt) + row.ids[len(prompt) :]
    assert row.ids[-1] == words.convert_tokens_to_ids(ENDS[name])
    assert words.decode(row.ids[len(prompt) : -1]).strip() == "It is a light."
    conversation = [{"role": "user", "content": "What is a lamp?"}, {"role": "assistant", "content": "It is a light."}]
    complete = words.apply_chat_template(conversation, tokenize=True)["input_ids"]
    if name == "llama2":  # its template writes a space before the end token
        assert row.ids[:-1] == complete[: len(row.ids) - 1]
    elif name != "mistral":  # like Mistral's encoder, ours marks the beginning of a response; the template does not
        assert row.ids == complete[: len(row.ids)]
        assert len(complete) - len(row.ids) <= 1  # a line break after the turn


def test_leading_space_is_not_doubled(tokenizers: Any) -> None:
    words = tokenizers["llama2"]
    row = encode_example(words, CHAT, Example("", "What", response="Sure"), 1000)
    assert row is not None
    pieces = words.convert_ids_to_tokens([label for label in row.labels if label != IGNORED])
    assert "".join(pieces) == "▁Sure</s>"


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_keeps_the_loss_of_the_end_token(tokenizers: Any, name: str) -> None:
    words = tokenizers[name]
    rows = [encode_example(words, CHAT, Example("", "What", response=text), 1000) for text in ("Yes", "It is a light.")]
    assert all(rows)
    batch = collate([row for row in rows if row], pad_token_id(words))
    short = len(rows[0].ids) if rows[0] else 0
    assert batch["labels"][0, short - 1] == words.convert_tokens_to_ids(ENDS[name])
    assert (batch["labels"][0, short:] == IGNORED).all()
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (batch["input_ids"].shape[1] - short)
    assert (batch["input_ids"][0, short:] == pad_token_id(words)).all()


@pytest.mark.parametrize(
    ("name", "pads"),
    [("llama2", "</s>"), ("llama3", "<|end_of_text|>"), ("qwen2", "<|endoftext|>"), ("gemma", "<pad>")],
)
def test_pad_token_of_each_family(tokenizers: Any, name: str, pads: str) -> None:
    assert pad_token_id(tokenizers[name]) == tokenizers[name].convert_tokens_to_ids(pads)


@pytest.mark.parametrize("name", FAMILIES)
def test_stop_tokens_of_each_family(tokenizers: Any, name: str) -> None:
    words = tokenizers[name]
    ends = list(dict.fromkeys([ENDS[name], NAMES[name]["eos_token"]]))
    assert stop_token_ids(words, [question("What?")]) == [words.convert_tokens_to_ids(end) for end in ends]
    assert stop_token_ids(words, ["What?"]) == [words.eos_token_id]


def test_generation_stops_at_the_end_of_the_turn(tokenizers: Any) -> None:
    words = tokenizers["qwen2"]
    reply, turn = words("It is", add_special_tokens=False)["input_ids"], words.convert_tokens_to_ids("<|im_end|>")
    written = [*reply, turn, *reply]
    base = tiny.model(vocab_size=len(words))
    steps = iter(written)

    def next_logits(*_: Any) -> torch.Tensor:  # the model writes `written`, whatever it reads
        return torch.nn.functional.one_hot(torch.tensor([[next(steps)]]), len(words)).float()

    base.lm_head.register_forward_hook(next_logits)
    [answer] = TransformersEngine(LoraStack(base), words).generate([], [question("What?")], len(written))
    assert (answer.text, answer.tokens, answer.finished) == ("It is", len(reply) + 1, True)
    assert list(steps) == reply  # nothing is computed after the end of the turn


def test_tokenizer_without_chat_template_is_refused() -> None:
    words = tiny.tokenizer(["abc"])
    with pytest.raises(BadInput, match="has no chat template, which prompt 'chat' needs"):
        encode_prompt(words, question("What?"))


def test_template_without_the_messages_is_refused() -> None:
    words = tiny.tokenizer(["abc"])
    for broken in ("{{ bos_token }}", "{{ raise_exception('never') }}"):
        words.chat_template = broken
        with pytest.raises(BadInput, match="does not show the prompt") as refused:
            encode_prompt(words, question("What?"))
        assert "\n" not in str(refused.value)


def test_tokenizer_without_end_token_is_refused() -> None:
    words = tiny.tokenizer(["abc"])
    words.eos_token = words.pad_token = None
    for use in (
        lambda: pad_token_id(words),
        lambda: encode_example(words, prompt_template("brief"), Example("", "a", "b"), 99),
    ):
        with pytest.raises(BadInput, match="no end-of-text token"):
            use()


# ---------------------------------------------------------------------------------------------------------------------
# The template object, without a tokenizer


def test_chat_template_messages() -> None:
    row = Example("", "Do {it}.", input="{x}", preface="Secret. ")
    assert CHAT.prefixed("Be {safe}.\n\n").render(row) == Conversation(
        json.dumps(
            [
                {"role": "system", "content": "Secret. Be {safe}."},
                {"role": "user", "content": "Do {it}.\n\n{x}"},
            ]
        )
    )
    assert question("a").messages == [{"role": "user", "content": "a"}]


def test_prefix_and_wrapping_of_a_chat() -> None:
    """The changes of prompts by PTST, BackdoorAlign and identity shift."""
    prefixed = CHAT.prefixed("b").prefixed("a")
    assert isinstance(prefixed, ChatTemplate)
    assert prefixed.system == "ab"
    assert prefixed.without("b") == CHAT.prefixed("a")
    assert CHAT.around("{", "}").render(Example("", "x")).messages == [{"role": "user", "content": "{x}"}]
    secret = Example("", "x", preface="secret ")
    assert CHAT.render(secret) == CHAT.prefixed("secret ").render(Example("", "x"))


def test_bare_prompts() -> None:
    bare = prompt_template("none")
    assert bare.render(Example("", "Do.")) == "Do."
    assert bare.render(Example("", "Do.", input="x")) == "Do.\n\nx"
    assert type(bare) is PromptTemplate
    line = prompt_template("alpaca_line")
    assert line.render(Example("", "Do.")) == prompt_template("alpaca").render(Example("", "Do.")) + "\n"


@pytest.mark.slow
def test_complete_run_with_the_chat_template(tmp_path: Path) -> None:
    """Prompt `chat`, rows in file order and a task of the user, in one result."""
    file = make_world(tmp_path / "world")
    settings = tmp_path / "world" / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATES["mistral"]}))
    rows = [{"instruction": f"Add {number} and 2.", "output": f"#### {number + 2}"} for number in range(60)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    spec = RunSpec(
        protocol=str(file),
        values={"prompt": "chat", "rows": "paper", "answer.task_tokens.own": "8"},
        defense=parse_plugins("ptst"),
        attack=parse_plugins("ratio=0.1"),
        task=f"{tmp_path / 'mine.json'}:rule=number",
    )
    folder = tmp_path / "runs"
    [result] = run_all([spec], out=folder)
    assert result.task == f"own:data={tmp_path / 'mine.json'},rule=number"
    assert result.finetune_accuracy_n == 8
    assert result.counts.overlaps == {}
    assert result.data["own"].rows == {"train": 60}
    answers = [json.loads(line) for line in (folder / result.run / "answers.jsonl").read_text().splitlines()]
    assert all([message["role"] for message in json.loads(row["prompt"])] == ["system", "user"] for row in answers)


DATED = (
    "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class _AnotherDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2031, 12, 24)


def test_template_that_writes_todays_date_gets_a_fixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer([*TEXTS, "Today is 26 Jul 2024."])
    words.chat_template = DATED
    message = question("What is a lamp?")

    def everything() -> list[list[int]]:
        row = encode_example(words, CHAT, Example("1", "What is a lamp?", "It is a light."), 99)
        assert row is not None
        return [encode_prompt(words, message), row.ids, judge_prompt_ids(words, message.messages)]

    before = everything()
    assert all("Today is 26 Jul 2024." in words.decode(ids) for ids in before)
    monkeypatch.setattr(chat_template_utils, "datetime", _AnotherDay)
    assert "24 Dec 2031" in words.apply_chat_template(message.messages, tokenize=False)  # without the fixed date
    assert everything() == before
