"""Batched greedy answers, compared with a loop over single prompts without cache or padding."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from harmbench_vaccine.inference.batch_size import cache_bytes, rows_that_fit
from harmbench_vaccine.inference.engine import Answer
from harmbench_vaccine.inference.generation import cut_at_stop, generate_greedy
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from support import tiny

TEXT = "the red lamp and a blue door rest in some old garden by this quiet river"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[start : start + length]) for length in (1, 2, 3, 5, 8, 13, 15) for start in (0, 2)]
LIMIT = 12


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer([TEXT] * 3)


def model(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    return tiny.model(
        architecture,
        vocab_size=len(tokenizer()),
        pad_token_id=tokenizer().pad_token_id,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        **changes,
    )


def greedy(model: PreTrainedModel, prompt: str, limit: int, end: int) -> list[int]:
    """Append the most likely token until the end token or the limit."""
    prompt_ids, ids = tokenizer()(prompt)["input_ids"], []
    while len(ids) < limit and (not ids or ids[-1] != end):
        with torch.no_grad():
            ids.append(
                int(model(input_ids=torch.tensor([prompt_ids + ids], device=model.device)).logits[0, -1].argmax())
            )
    return ids


def expected(model: PreTrainedModel, prompt: str, limit: int, end: int) -> Answer:
    ids = greedy(model, prompt, limit, end)
    finished = ids[-1] == end
    return Answer(tokenizer().decode(ids[: len(ids) - finished], skip_special_tokens=True), len(ids), finished)


def with_end(token: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer with another end token."""
    changed = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, bos_token="<s>", pad_token="<pad>")
    changed.eos_token = tokenizer().convert_ids_to_tokens(token)
    assert changed.eos_token_id == token
    return changed


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3"])
@pytest.mark.parametrize("batch", [1, 4, None])
def test_batched_answers_equal_single_ones(architecture: str, batch: int | None) -> None:
    base = model(architecture)
    answers = TransformersEngine(LoraStack(base), tokenizer(), batch).generate([], PROMPTS, LIMIT)
    end = tokenizer().eos_token_id
    assert answers == [expected(base, prompt, LIMIT, end) for prompt in PROMPTS]
    assert len({answer.text for answer in answers}) > len(PROMPTS) / 2  # the answers depend on the prompts


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_answer_stops_at_the_end_token(architecture: str) -> None:
    base = model(architecture)
    # The token that ends some answers early and is missing from others.
    runs = [greedy(base, prompt, LIMIT, end=-1) for prompt in PROMPTS]
    counts = {token: sum(token in run for run in runs) for run in runs for token in run[1:]}
    end = max((token for token in counts if counts[token] < len(PROMPTS)), key=counts.__getitem__)
    answers = TransformersEngine(LoraStack(base), with_end(end), batch=5).generate([], PROMPTS, LIMIT)
    assert answers == [expected(base, prompt, LIMIT, end) for prompt in PROMPTS]
    assert {answer.finished for answer in answers} == {True, False}
    for answer, run in zip(answers, runs, strict=True):
        assert answer.tokens == (run.index(end) + 1 if end in run else LIMIT)


def test_answer_that_ends_at_the_limit_is_finished() -> None:
    base = model()
    run = next(run for prompt in PROMPTS if len(set(run := greedy(base, prompt, 4, end=-1))) == 4)
    prompt = next(prompt for prompt in PROMPTS if greedy(base, prompt, 4, end=-1) == run)
    engine = TransformersEngine(LoraStack(base), with_end(run[-1]))
    assert engine.generate([], [prompt], 4)[0] == Answer(tokenizer().decode(run[:-1]), 4, True)
    assert engine.generate([], [prompt], 3)[0] == Answer(tokenizer().decode(run[:-1]), 3, False)


# Architectures with other positions, caches or inputs than those of `tiny`: ALiBi, a state space, no cache at all.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 2}),
    "gpt_neox": ("GPTNeoX", {**tiny.LLAMA, "num_hidden_layers": 2}),
    "mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "phi3": ("Phi3", tiny.LLAMA),
    "openai": ("OpenAIGPT", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}),
}


def other_model(name: str) -> PreTrainedModel:
    prefix, sizes = OTHERS[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **tokens, "vocab_size": len(tokenizer())})
    suffix = "LMHeadModel" if name == "openai" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: PreTrainedModel = getattr(transformers, f"{prefix}{suffix}")(config)
    return network.eval()


@pytest.mark.parametrize("prefix", [[], list(range(20, 32))], ids=["no_prefix", "prefix"])
@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *OTHERS])
def test_rows_that_end_leave_the_batch_without_a_change_of_others(architecture: str, prefix: list[int]) -> None:
    window = WINDOW if architecture in WINDOWED else {}
    base = other_model(architecture) if architecture in OTHERS else model(architecture, **window)
    prompts = [prefix + tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    # The longest answers without a stop token, one prompt at a time, by the generator of transformers.
    runs = [generate_of_transformers(base, prompt, LIMIT) for prompt in prompts]
    ends = stops_of_some(runs)
    rows_per_step: list[int] = []
    base.register_forward_pre_hook(
        lambda _, __, inputs: rows_per_step.append(len(inputs["input_ids"])), with_kwargs=True
    )
    generated = generate_greedy(base, prompts, LIMIT, batch=len(prompts), pad=0, ends=ends, advance=lambda rows: None)
    assert generated == [cut_at_stop(run, ends) for run in runs]
    lengths = [len(row.tokens) + row.finished for row in generated]
    assert len(set(lengths)) > 1
    if prefix and architecture not in (*WINDOWED, "mamba", "openai"):
        assert rows_per_step.pop(0) == 1  # one row reads the prefix where no layer has a window or a state
    assert rows_per_step == [sum(length > step for length in lengths) for step in range(max(lengths))]


WINDOWED = ("gemma2", "gemma3", "mistral")
WINDOW = {"sliding_window": 8}  # shorter than prompts with their answers


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "bloom"])
def test_rows_of_one_length_share_a_prefix(architecture: str, length: int) -> None:
    base = other_model(architecture) if architecture in OTHERS else model(architecture)
    prompts = [[*range(20, 32), *range(40 + number, 40 + number + length)] for number in range(6)]
    reads: list[tuple[int, ...]] = []
    base.register_forward_pre_hook(lambda _, __, inputs: reads.append(inputs["input_ids"].shape), with_kwargs=True)
    generated = generate_greedy(base, prompts, 4, batch=6, pad=0, ends=[], advance=lambda rows: None)
    assert reads == [(1, 12), (6, length), (6, 1), (6, 1), (6, 1)]
    assert [row.tokens for row in generated] == [generate_of_transformers(base, prompt, 4) for prompt in prompts]


def generate_of_transformers(base: PreTrainedModel, prompt: list[int], limit: int) -> list[int]:
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, pad_token_id=0, eos_token_id=None)
    base.generation_config = GenerationConfig()
    ids = torch.tensor([prompt], device=base.device)
    return base.generate(input_ids=ids, generation_config=config)[0, len(prompt) :].tolist()


def stops_of_some(runs: list[list[int]]) -> list[int]:
    """Return two tokens that end some of the answers, at different positions."""
    counts = {token: sum(token in run for run in runs) for run in runs for token in run}
    frequent = [token for token in sorted(counts, key=counts.__getitem__, reverse=True) if counts[token] < len(runs)]
    return frequent[:2]


@pytest.mark.parametrize("batch", [1, 14])
def test_log_probabilities_are_those_of_the_whole_text(batch: int) -> None:
    base = model().double()
    prompts = [tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    ends = stops_of_some([generate_of_transformers(base, prompt, LIMIT) for prompt in prompts])
    watched = [7, 300, ends[0]]
    rows = generate_greedy(
        base, prompts, LIMIT, batch=batch, pad=0, ends=ends, advance=lambda rows: None, watched=watched
    )
    for prompt, row in zip(prompts, rows, strict=True):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([prompt + row.tokens], device=base.device)).logits[
                0, len(prompt) - 1 :
            ]
        expected = logits.log_softmax(-1)[: len(row.tokens) + row.finished, watched].cpu()
        torch.testing.assert_close(torch.tensor(row.log_probs, dtype=torch.float64), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_batch_takes_half_of_the_free_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model().config
    row = cache_bytes(config, "bfloat16", 1, 50) + 50 * 2 * (4 * 64 + 3 * 96) + 8 * len(tokenizer())
    decoder = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device(device))
    reserved, allocated = 7 * row, 4 * row

    def rows_with_free(count: float) -> int:
        free = 2 * count * row
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - (reserved - allocated), 1 << 40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        return rows_that_fit(decoder, 50)

    most = {"cpu": 128, "cuda": 256}[device]
    assert [rows_with_free(count) for count in (0, 1, 3.9, 4, 40, 1e6)] == [1, 1, 2, 4, 32, most]


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_answers_respect_the_limit(limit: int) -> None:
    base = model()
    answers = TransformersEngine(LoraStack(base), tokenizer()).generate([], PROMPTS, limit)
    assert max(answer.tokens for answer in answers) == limit
    assert answers == [expected(base, prompt, limit, tokenizer().eos_token_id) for prompt in PROMPTS]


def test_equal_prompts_get_equal_answers_in_order() -> None:
    engine = TransformersEngine(LoraStack(model()), tokenizer(), batch=2)
    prompts = [PROMPTS[9], PROMPTS[0], PROMPTS[9], PROMPTS[4], PROMPTS[0]]
    answers = dict(zip(PROMPTS, engine.generate([], PROMPTS, LIMIT), strict=True))
    assert engine.generate([], prompts, LIMIT) == [answers[prompt] for prompt in prompts]


def test_no_prompts_give_no_answers() -> None:
    assert TransformersEngine(LoraStack(model()), tokenizer()).generate([], [], LIMIT) == []


def test_answers_come_from_the_requested_adapters(tmp_path: Path) -> None:
    base = model()
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: (torch.randn(2, 64, generator=generator), torch.randn(module.out_features, 2, generator=generator))
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.endswith("q_proj")
    }
    Adapter(factors, 0.5).save(tmp_path)
    engine, end = TransformersEngine(LoraStack(base), tokenizer(), batch=4), tokenizer().eos_token_id
    plain = engine.generate([], PROMPTS, LIMIT)
    adapted = engine.generate([tmp_path], PROMPTS, LIMIT)
    assert engine.generate([], PROMPTS, LIMIT) == plain
    merged = model()
    with torch.no_grad():
        for name, (a, b) in factors.items():
            merged.get_submodule(name).weight += 0.5 * (b @ a)
    assert adapted == [expected(merged, prompt, LIMIT, end) for prompt in PROMPTS]
    assert adapted != plain


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": LIMIT},
        {"do_sample": True, "top_k": 5},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_generation_settings_of_the_model_are_ignored(setting: dict[str, Any]) -> None:
    # For example, Qwen's generation_config.json has a repetition penalty.
    base = model()
    for key, value in setting.items():
        setattr(base.generation_config, key, value)
    runs = [greedy(base, prompt, LIMIT, end=-1) for prompt in PROMPTS]
    end = next(token for run in runs for token in run[1:-1])
    answers = TransformersEngine(LoraStack(base), with_end(end)).generate([], PROMPTS, LIMIT)
    assert answers == [expected(base, prompt, LIMIT, end) for prompt in PROMPTS]
