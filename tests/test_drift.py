"""Embedding drift and alignment loss, on shifts whose size is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmbench_vaccine.evaluation.drift import Drift, measure_drift
from support import tiny

LENGTHS = [(9, 5, 7), (4, 4), (12,)]
TOKENS = sum(map(sum, LENGTHS))
BATCHES = [tiny.batch(lengths, seed=number) for number, lengths in enumerate(LENGTHS)]
V = torch.randn(64, generator=torch.Generator().manual_seed(5))
SIZE = float(V.norm())


def moved(layer: int, architecture: str = "llama", v: Tensor = V) -> nn.Module:
    """The tiny model with v added to every output of one attention block: in the bias of its output projection."""
    model = with_bias(architecture)
    projection = next(m for name, m in model.named_modules() if f".{layer}.self_attn.o" in f".{name}")
    with torch.no_grad():
        projection.bias += v  # type: ignore[union-attr, operator]
    return model


def with_bias(architecture: str = "llama") -> nn.Module:
    return tiny.model(architecture) if architecture == "opt" else tiny.model(architecture, attention_bias=True)


def drift(reference: nn.Module, model: nn.Module, batches: Any = BATCHES) -> Drift:
    return measure_drift(lambda: reference, lambda: model, batches)[1]


def test_a_model_does_not_drift_from_itself() -> None:
    model = tiny.model()
    assert drift(model, model) == Drift(0.0, [0.0, 0.0], 0.0, 0.0)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_shift_of_the_last_block_counts_once_for_every_real_token(architecture: str) -> None:
    found = drift(with_bias(architecture), moved(1, architecture))
    assert found.total == pytest.approx(SIZE * math.sqrt(TOKENS), rel=1e-5)
    assert found.per_token == pytest.approx(SIZE, rel=1e-5)
    assert found.per_layer == pytest.approx([0.0, SIZE * math.sqrt(TOKENS)], rel=1e-5)
    assert found.per_layer[0] == 0.0


def test_a_shift_of_the_first_block_moves_the_later_ones_too() -> None:
    found = drift(with_bias(), moved(0))
    assert found.per_layer[0] == pytest.approx(SIZE * math.sqrt(TOKENS), rel=1e-5)
    assert found.per_layer[1] > 0.1
    assert found.total == pytest.approx(math.hypot(*found.per_layer), rel=1e-12)
    assert found.per_token == pytest.approx(found.total / math.sqrt(TOKENS), rel=1e-12)


def test_padding_changes_nothing_but_the_authors_own_figure() -> None:
    wide = [tiny.batch(lengths, seed=number, width=20) for number, lengths in enumerate(LENGTHS)]
    reference, model = with_bias(), moved(0)
    narrow_loss, narrow = measure_drift(lambda: reference, lambda: model, BATCHES)
    wide_loss, padded = measure_drift(lambda: reference, lambda: model, wide)
    assert wide_loss == pytest.approx(narrow_loss, rel=1e-6)
    assert padded.total == pytest.approx(narrow.total, rel=1e-5)
    assert padded.per_layer == pytest.approx(narrow.per_layer, rel=1e-5)
    assert padded.per_token == pytest.approx(narrow.per_token, rel=1e-5)
    assert padded.paper_sum > narrow.paper_sum * 1.1


def test_the_cut_into_batches_changes_nothing() -> None:
    batch = tiny.batch((9, 5, 7))
    apart = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    reference, model = with_bias(), moved(0)
    loss, whole = measure_drift(lambda: reference, lambda: model, [batch])
    loss_apart, parts = measure_drift(lambda: reference, lambda: model, apart)
    assert loss_apart == pytest.approx(loss, rel=1e-6)  # a mean over tokens, not over batches
    assert parts.per_layer == pytest.approx(whole.per_layer, rel=1e-5)


def test_the_authors_figure_is_the_squares_of_ten_batches_with_their_padding() -> None:
    batches = [tiny.batch((6, 3), seed=number) for number in range(12)]
    found = drift(with_bias(), moved(1), batches)
    assert found.paper_sum == pytest.approx(SIZE**2 * 10 * 2 * 6, rel=1e-4)
    assert found.total == pytest.approx(SIZE * math.sqrt(12 * 9), rel=1e-5)


def test_the_drift_is_taken_in_the_order_reference_then_model_for_every_batch() -> None:
    # Two cells of one stack share their weights: each must be put in place anew.
    model, calls = with_bias(), []
    projection = next(m for name, m in model.named_modules() if name.endswith("1.self_attn.o_proj"))

    def place(name: str, bias: Tensor) -> nn.Module:
        calls.append(name)
        with torch.no_grad():
            projection.bias.copy_(bias)
        return model

    _, found = measure_drift(lambda: place("reference", torch.zeros(64)), lambda: place("model", V), BATCHES)
    assert calls == ["reference", "model"] * len(BATCHES)
    assert found.per_token == pytest.approx(SIZE, rel=1e-5)


def test_alignment_loss_is_the_mean_over_response_tokens_of_the_model() -> None:
    reference, model = tiny.model(seed=1), tiny.model(seed=2)
    surprise, count = 0.0, 0
    for batch in BATCHES:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            row = ids[mask.bool()]  # alone and without padding
            with torch.no_grad():
                probabilities = model(input_ids=row[None]).logits[0].double().softmax(-1)
            for place in range(1, len(row)):
                if labels[place] != -100:
                    surprise -= math.log(probabilities[place - 1, row[place]])
                    count += 1
    assert count == TOKENS - 2 * sum(map(len, LENGTHS))  # two prompt tokens in each row
    loss, _ = measure_drift(lambda: reference, lambda: model, BATCHES)
    assert loss == pytest.approx(surprise / count, rel=1e-5)
