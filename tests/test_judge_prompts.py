"""Prompts of judges: chat templates, templates with slots, control tokens, and empty answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.inference.generators import Continuation
from harmbench_vaccine.inference.judge_prompts import break_control_tokens, filled_prompt_ids, judge_prompt_ids
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins import scorers
from harmbench_vaccine.plugins.registry import SCORERS
from support import tiny
from support.examples import examples

# ---------------------------------------------------------------------------------------------------------------------
# Chat templates

TEMPLATES = {
    "llama3": "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    "no opening token": "{% for m in messages %}<|head|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}",
    "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'].strip() }}"
    " [/INST]{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}",
    "parts": "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}",
    "both forms": "{% for m in messages %}<|head|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][0]['text'] }}{% endif %}<|end|>{% endfor %}{{ bos_token }}",
    "guard": "{{ bos_token }}[INST] Is the last message of {{ messages[-1]['role'] }} safe?\n\n<BEGIN>\n"
    "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] | trim }}\n\n{% endfor %}<END>\n\nAnswer: [/INST]",
    "bare": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
}
SPECIAL = ("<unk>", "<s>", "</s>", "<|head|>", "<|/head|>", "<|end|>")
SCHEMES = ("bytes", "first", "always", "never")


@cache
def tokenizer_of(scheme: str, opens: bool) -> Any:
    """Return a tokenizer of bytes, or one like SentencePiece, which writes a space before (the first piece of) a text.

    Args:
        scheme: "bytes", or where a space is prepended.
        opens: Whether the tokenizer puts its opening token before a text.
    """
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme == "bytes":
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = decoders.ByteLevel()
    else:
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        words.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *map(chr, range(33, 127)), "▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=sorted(set(alphabet)), show_progress=False
    )
    words.train_from_iterator(["Is the last message safe or unsafe? How do I open a door?"], trainer)
    if opens:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", words.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|head|>", "<|/head|>", "<|end|>"]})
    return tokenizer


@contextmanager
def with_template(tokenizer: Any, template: str) -> Iterator[Any]:
    tokenizer.chat_template = template
    yield tokenizer
    tokenizer.chat_template = None


PIECES = (
    *SPECIAL,
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<|eot_id|>",
    "<think>",
    "safe",
    "door",
    " ",
    "\n",
    "<",
    "|end|>",
    "é",
    "",
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


@settings(max_examples=examples(200), deadline=None)
@given(
    st.sampled_from(list(product(SCHEMES, (False, True)))),
    st.sampled_from(list(TEMPLATES)),
    st.lists(TEXTS, min_size=1, max_size=4),
)
def test_ids_of_a_chat_are_those_of_its_template(kind: tuple[str, bool], name: str, texts: list[str]) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    with with_template(tokenizer_of(*kind), TEMPLATES[name]) as tokenizer:
        ids = judge_prompt_ids(tokenizer, messages)
        shown: Any = [{**m, "content": break_control_tokens(m["content"], tokenizer)} for m in messages]
        if name == "parts":
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in shown]
        assert ids == tokenizer.apply_chat_template(shown, tokenize=True, add_generation_prompt=True, return_dict=False)
        plain = judge_prompt_ids(tokenizer, [{**message, "content": "a"} for message in messages])
        special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL if token != "<unk>"}
        assert [token for token in ids if token in special] == [token for token in plain if token in special]


@settings(max_examples=examples(200), deadline=None)
@given(TEXTS)
def test_control_tokens_change_the_text_only_where_they_are(text: str) -> None:
    tokenizer = tokenizer_of("bytes", True)
    shown = break_control_tokens(text, tokenizer)
    assert break_control_tokens(shown, tokenizer) == shown
    assert not any(token in shown for token in (*SPECIAL, "[INST]", "[/INST]", "<<SYS>>", "<|eot_id|>", "<think>"))
    if shown != text:
        start = next(place for place, letter in enumerate(shown) if letter != text[place : place + 1])
        assert text[start - 1] in "<["  # the first change is a space inside a token
    assert shown.replace(" ", "") == text.replace(" ", "")


def test_text_without_control_tokens_is_shown_as_it_is() -> None:
    text = "1 < 2 > 0, [x], <b>, a|b, f<|g, [INS T], if (a < s) return </sup>\u200b"
    assert break_control_tokens(text, tokenizer_of("bytes", True)) == text


@pytest.mark.parametrize(
    ("text", "shown"), [("<｜User｜>", "< ｜User｜>"), ("<tool_call>", "< tool_call>"), ("<b>", "<b>")]
)
def test_tokens_of_a_template_are_control_tokens(text: str, shown: str) -> None:
    tokenizer = tiny.tokenizer(["a"])
    tokenizer.add_tokens(["<｜User｜>", "<tool_call>", "<b>"])  # not special, as in DeepSeek's, Qwen's and Gemma's
    tokenizer.chat_template = "<tool_call>{{ messages[0]['content'] }}<｜User｜>"
    assert break_control_tokens(f"a{text}b", tokenizer) == f"a{shown}b"


def test_template_that_fails_on_a_text_is_reported() -> None:
    content = "messages[0]['content']"
    template = f"{{% if 'door' in {content} %}}{{{{ raise_exception('no doors') }}}}{{% endif %}}{{{{ {content} }}}}"
    with (
        with_template(tokenizer_of("bytes", True), template) as tokenizer,
        pytest.raises(HbvError, match="does not show the text to judge: no doors"),
    ):
        judge_prompt_ids(tokenizer, [{"role": "user", "content": "a door"}])


@pytest.mark.parametrize("kind", list(product(SCHEMES, (False, True))))
def test_slots_get_the_shown_text(kind: tuple[str, bool]) -> None:
    tokenizer = tokenizer_of(*kind)
    [ids] = filled_prompt_ids(tokenizer, "Q {q} A {a}", ("q", "a"), [("a</s>[INST]", "{q}<s>")])
    expected = tokenizer("Q a< /s>[ INST] A {q}< s>", add_special_tokens=kind[1])["input_ids"]
    assert ids == expected


# ---------------------------------------------------------------------------------------------------------------------
# Empty answers: judged like any other text, by every judge

WILDGUARD = "Harmful request: yes\nResponse refusal: no\nHarmful response: {}"
OUTPUTS = {
    "beaver_dam": ("3", "-3"),
    "llama_guard": ("unsafe\nS1", "safe"),
    "shieldgemma": ("3", "-3"),
    "harmbench": ("yes", "no"),
    "wildguard": (WILDGUARD.format("yes"), WILDGUARD.format("no")),
    "strongreject": ("1.b 0\n2.b 5\n3.b 5", "1.b 0\n2.b 1\n3.b 1"),
    "refusal_keywords": ("", None),
}
"""Scorer -> the output of its judge that flags an answer and the one that does not."""

PROMPTS = {
    "beaver_dam": "<s>BEGINNING OF CONVERSATION: USER: Name one. ASSISTANT:{}</s>",
    "llama_guard": "|Name one.||{}|",
    "shieldgemma": "|Name one.||{}|No lamps.",
    "harmbench": "<s>Name one.|{}|",
    "wildguard": "<s>"
    + (Path(scorers.__path__[0]) / "wildguard.txt")
    .read_text()
    .replace("{prompt}", "Name one.")
    .replace("{response}", "{}"),
    "strongreject": "|Name one.|{}||",
    "refusal_keywords": "",
}
"""Scorer -> the prompt of its judge."""


class Judge:
    """A judge that writes one text, or has one logit, and records its prompts."""

    def __init__(self, output: str) -> None:
        self.output, self.prompts = output, [""]
        self.tokenizer = tiny.tokenizer(["safe unsafe Yes No"])
        self.tokenizer.chat_template = "{% for m in messages %}|{{ m['content'] }}|{% endfor %}{{ guideline }}"

    def generate(self, prompts: Any, max_new_tokens: int, watched: Any = (), progress: Any = None) -> Any:
        self.prompts = [self.tokenizer.decode(ids) for ids in prompts]
        logit = [float(self.output), 0.0] if len(watched) == 2 else [-1.0] * len(watched)
        return [Continuation(self.output, [5], [dict(zip(watched, logit, strict=True))]) for _ in prompts]

    def classify(self, texts: Any, progress: Any) -> list[list[float]]:
        self.prompts = [self.tokenizer.decode(ids) for ids in texts]
        return [[float(self.output)] * 14 for _ in texts]


def parameters(folder: Path) -> dict[str, dict[str, str]]:
    files = {
        "harmbench.txt": "{behavior}|{generation}|",
        "strongreject.txt": "{forbidden_prompt}|{response}|",
        "policies.json": '{"p": "No lamps."}',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return {
        "harmbench": {"template": str(folder / "harmbench.txt")},
        "strongreject": {"template": str(folder / "strongreject.txt"), "model": "m"},
        "shieldgemma": {"policies": str(folder / "policies.json")},
    }


@pytest.mark.parametrize("name", list(OUTPUTS))
@pytest.mark.parametrize("answer", ["", " \n"])
def test_empty_answer_is_judged_like_any_other(
    name: str, answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert set(OUTPUTS) == set(SCORERS.loadable())
    scorer = SCORERS.get(name)(**parameters(tmp_path).get(name, {}))
    for output, flagged in zip(OUTPUTS[name], (True, False), strict=True):
        if output is None:  # a rule without a model has one verdict
            continue
        judge = Judge(output)
        monkeypatch.setattr(ModelPool, "judge_generator", lambda *args, judge=judge: judge)
        monkeypatch.setattr(ModelPool, "judge_classifier", lambda *args, judge=judge: judge.classify)
        head = (judge.tokenizer, list(map(str, range(14))))
        monkeypatch.setattr("harmbench_vaccine.inference.classifiers.multi_label_head", lambda *args, head=head: head)
        [verdict] = scorer.judge([("Name one.", answer)])
        assert verdict.flagged is flagged
        assert judge.prompts == [PROMPTS[name].format(answer)]
