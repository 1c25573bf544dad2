"""SafeDecoding: the chosen tokens compared with sets of tokens, and stored answers with plain passes of both models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses import safe_decoding
from harmbench_vaccine.defenses.safe_decoding import SafeDecoding, common_tokens
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.inference.answer_models import AnswerModels
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.teams import DefenseTeam
from support.answers import (
    SMALL_WORLD,
    Run,
    continued,
    merged,
    mixed_token,
    next_token,
    sample_space,
    settled,
    stripped,
    tokenizer_of,
    trained,
)
from support.runs import run_context
from support.world import make_world

# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_common_tokens_are_those_of_the_smallest_k(data: st.DataObject) -> None:
    """Integers from 0 to 4 give many ties."""
    size, texts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    first, second = (data.draw(st.lists(row, min_size=texts, max_size=texts)) for _ in range(2))
    count = data.draw(st.integers(1, size + 2))
    common = common_tokens(torch.tensor(first).float(), torch.tensor(second).float(), count)
    for number in range(texts):
        assert {*common[number].nonzero().flatten().tolist()} == sample_space(first[number], second[number], count)


class RandomModels(AnswerModels):
    """Models whose probabilities are random numbers that depend on the text alone."""

    def __init__(self, vocabulary: int = 20, ends: Sequence[int] = ()) -> None:
        self.ends = list(ends)
        self.vocabulary = vocabulary
        self.texts: list[list[int]] = []

    def probabilities(self, model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
        self.texts += [list(text) for text in texts] if model == "answering" else []
        return torch.stack([self.row(model, text) for text in texts])

    def row(self, model: str, text: Sequence[int]) -> Tensor:
        seed = hash((model == "aligned", *text)) % 2**31
        return torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(seed)).softmax(-1)


PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8]]


@pytest.mark.parametrize(("alpha", "common", "first"), [(3.0, 5, 2), (0.0, 1, 1), (0.5, 3, 3), (3.0, 50, 2)])
@pytest.mark.parametrize("part", [1, 64])
def test_tokens_equal_those_of_sets(
    alpha: float, common: int, first: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_decoding, "TEXTS", part)
    models = RandomModels()
    expected = []
    for prompt in PROMPTS:
        tokens: list[int] = []
        for _ in range(first):
            text = [*prompt, *tokens]
            tokens.append(mixed_token(models.row("answering", text), models.row("aligned", text), alpha, common))
        expected.append(tokens)
    assert SafeDecoding(alpha=alpha, common=common, first=first).first_tokens(models, PROMPTS) == expected


def test_the_weight_moves_the_choice_to_the_expert() -> None:
    """Weight 0 takes the model's choice and 1 the expert's; a large one, the largest difference."""
    models = RandomModels()
    model, expert = (models.probabilities(name, PROMPTS) for name in ("answering", "aligned"))
    for alpha, best in ((0.0, model), (1.0, expert), (1e6, expert - model)):
        tokens = SafeDecoding(alpha=alpha, common=20, first=1).first_tokens(models, PROMPTS)
        assert [token for (token,) in tokens] == best.argmax(1).tolist()


def test_an_answer_that_ends_gets_no_more_tokens() -> None:
    plain = SafeDecoding(first=4).first_tokens(RandomModels(), PROMPTS)
    ends = [plain[0][0], plain[1][1]]
    models = RandomModels(ends=ends)
    tokens = SafeDecoding(first=4).first_tokens(models, PROMPTS)
    for row, full in zip(tokens, plain, strict=True):
        assert row == full[: next((place + 1 for place, token in enumerate(full) if token in ends), 4)]
    assert len(tokens[0]) == 1
    assert len(models.texts) == sum(map(len, tokens))
    assert SafeDecoding(first=3).first_tokens(RandomModels(ends=range(20)), PROMPTS) == [row[:1] for row in plain]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), SMALL_WORLD)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    return run_context(tmp_path_factory.mktemp("store"))


def expected_rows(run: Run, when: str, first: int, written: Sequence[Sequence[int]] = ()) -> list[dict[str, Any]]:
    """Return text, number of tokens and end of each answer, with the default weight and number of common tokens."""
    expert, model = merged(run.aligned), merged(run.aligned if when == "before" else run.final)
    tokenizer, limit, rows = tokenizer_of(run), run.eval_set.max_new_tokens, []
    end = tokenizer.eos_token_id
    for number, example in enumerate(run.eval_set.examples):
        prompt = tokenizer(run.eval_set.template.render(example))["input_ids"]
        start = list(written[number]) if written else []
        tokens: list[int] = []
        while len(tokens) < min(first, limit) and end not in tokens:
            text = [*prompt, *start, *tokens]
            tokens.append(mixed_token(next_token(model, text), next_token(expert, text), 3.0, 5))
        if end not in tokens:
            tokens += continued(model, [*prompt, *start, *tokens], limit - len(tokens), end)
        text = tokenizer.decode([*start, *tokens], skip_special_tokens=True).strip()
        rows.append({"answer": text, "tokens": len(tokens), "finished": end in tokens})
    return rows


def test_stored_answers_equal_plain_passes(small: Path, context: RunContext) -> None:
    """The final model writes the rest alone; the expert is the aligned model."""
    run, plain = (trained(small, context, defense) for defense in ("safe_decoding", "sft"))
    assert run.final.artifacts["finetune"].key == plain.final.artifacts["finetune"].key
    assert stripped(run.rows()) == expected_rows(run, "after", 2)
    assert run.rows() != plain.rows()


@pytest.mark.parametrize("first", [5, 30])
def test_every_token_may_be_mixed(first: int, small: Path, context: RunContext) -> None:
    """An answer has at most `max_new_tokens` tokens for any m."""
    run = trained(small, context, f"safe_decoding:first={first}")
    assert stripped(run.rows()) == expected_rows(run, "after", 5)
    assert max(row["tokens"] for row in run.rows()) == 5


def test_without_mixed_tokens_answers_are_those_of_sft(small: Path, context: RunContext) -> None:
    run, plain = (trained(small, context, defense) for defense in ("safe_decoding:first=0", "sft"))
    assert run.rows() == plain.rows()


def test_before_the_user_stage_the_expert_is_the_model_itself(small: Path, context: RunContext) -> None:
    run, plain = (trained(small, context, defense) for defense in ("safe_decoding", "sft"))
    assert run.rows("before") == plain.rows("before")


def test_the_tokens_of_an_answer_are_counted_once(
    small: Path, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop token counts, as it does without the defense."""
    run = trained(small, context, "safe_decoding:alpha=0.7")
    end = tokenizer_of(run).eos_token_id

    def chosen(self: Any, models: Any, prompts: list[list[int]]) -> list[list[int]]:
        return [[9, end], [end], *([9, 9] for _ in prompts[2:])]

    monkeypatch.setattr(SafeDecoding, "first_tokens", chosen)
    rows = run.rows()
    assert [(row["tokens"], row["finished"]) for row in rows[:2]] == [(2, True), (1, True)]
    assert rows[1]["answer"] == ""
    assert all(2 < row["tokens"] <= 5 for row in rows[2:])


def test_mixed_tokens_follow_the_tokens_of_an_attack(small: Path, context: RunContext) -> None:
    run = trained(small, context, "safe_decoding", "ratio=0.25+prefill=3")
    tokenizer = tokenizer_of(run)
    written = [
        tokenizer(example.response, add_special_tokens=False)["input_ids"][:3] for example in run.eval_set.examples
    ]
    assert all(len(tokens) == 3 for tokens in written)
    assert stripped(run.rows()) == expected_rows(run, "after", 2, written)


@pytest.mark.parametrize("attack", ["ratio=0.25+weight_noise=0.3", "ratio=0.25+optimizer:full=true"])
def test_the_final_model_may_have_another_base(attack: str, small: Path, context: RunContext) -> None:
    run = trained(small, context, "safe_decoding", attack)
    assert run.final.spec.base != run.aligned.spec.base
    assert stripped(run.rows()) == expected_rows(run, "after", 2)


def test_only_its_answers_have_another_key(small: Path, context: RunContext) -> None:
    def key(defense: str) -> keys.Inputs:
        run = trained(small, context, defense)
        prompts = ["Q"] * len(run.eval_set.examples)
        return keys.answer_key(run.experiment, run.final, run.aligned, run.eval_set, prompts)

    plain = key("sft")
    assert not {"defense", "aligned"} & set(plain)
    assert key("sft+output_guard=refusal_keywords") == plain
    default, other = key("safe_decoding"), key("safe_decoding:common=3")
    assert plain.items() <= default.items()
    assert default != other
    assert default["aligned"] == keys.model_inputs(trained(small, context, "sft").aligned)


# ---------------------------------------------------------------------------------------------------------------------
# Combinations


def test_a_skipped_alignment_is_refused(small: Path) -> None:
    with pytest.raises(BadInput, match="'safe_decoding' needs the alignment adapter"):
        settled(small, "none+safe_decoding")


class Silent(Defense):
    """Another defense that chooses first tokens."""

    def first_tokens(self, models: AnswerModels, prompts: list[list[int]]) -> list[list[int]]:
        return [[] for _ in prompts]


def test_two_defenses_that_choose_first_tokens_are_refused() -> None:
    with pytest.raises(BadInput, match="both set the first tokens of an answer"):
        DefenseTeam(members=(SafeDecoding(), Silent()))
