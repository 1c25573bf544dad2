"""Embedding drift and alignment loss, for shifts of known size."""

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


def shifted(layer: int, architecture: str = "llama", v: Tensor = V) -> nn.Module:
    """Return the tiny model with v added to every output of an attention block (in the bias of its projection)."""
    model = with_bias(architecture)
    projection = next(m for name, m in model.named_modules() if f".{layer}.self_attn.o" in f".{name}")
    with torch.no_grad():
        projection.bias += v  # type: ignore[union-attr, operator]
    return model


def with_bias(architecture: str = "llama") -> nn.Module:
    return tiny.model(architecture) if architecture == "opt" else tiny.model(architecture, attention_bias=True)


def drift(reference: nn.Module, model: nn.Module, batches: Any = BATCHES) -> Drift:
    return measure_drift(lambda: reference, lambda: model, batches)[1]


def test_equal_models_have_no_drift() -> None:
    model = tiny.model()
    assert drift(model, model) == Drift(0.0, [0.0, 0.0], 0.0, 0.0)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_shift_of_the_last_block_counts_every_real_token_once(architecture: str) -> None:
    measured = drift(with_bias(architecture), shifted(1, architecture))
    assert measured.total == pytest.approx(SIZE * math.sqrt(TOKENS), rel=1e-5)
    assert measured.per_token == pytest.approx(SIZE, rel=1e-5)
    assert measured.per_layer == pytest.approx([0.0, SIZE * math.sqrt(TOKENS)], rel=1e-5)
    assert measured.per_layer[0] == 0.0


def test_shift_of_the_first_block_changes_later_blocks() -> None:
    measured = drift(with_bias(), shifted(0))
    assert measured.per_layer[0] == pytest.approx(SIZE * math.sqrt(TOKENS), rel=1e-5)
    assert measured.per_layer[1] > 0.1
    assert measured.total == pytest.approx(math.hypot(*measured.per_layer), rel=1e-12)
    assert measured.per_token == pytest.approx(measured.total / math.sqrt(TOKENS), rel=1e-12)


def test_padding_changes_only_the_sum_of_the_paper() -> None:
    wide = [tiny.batch(lengths, seed=number, width=20) for number, lengths in enumerate(LENGTHS)]
    reference, model = with_bias(), shifted(0)
    narrow_loss, narrow = measure_drift(lambda: reference, lambda: model, BATCHES)
    wide_loss, padded = measure_drift(lambda: reference, lambda: model, wide)
    assert wide_loss == pytest.approx(narrow_loss, rel=1e-6)
    assert padded.total == pytest.approx(narrow.total, rel=1e-5)
    assert padded.per_layer == pytest.approx(narrow.per_layer, rel=1e-5)
    assert padded.per_token == pytest.approx(narrow.per_token, rel=1e-5)
    assert padded.paper_sum > narrow.paper_sum * 1.1


def test_drift_does_not_depend_on_the_batches() -> None:
    batch = tiny.batch((9, 5, 7))
    single_rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    reference, model = with_bias(), shifted(0)
    loss, together = measure_drift(lambda: reference, lambda: model, [batch])
    loss_of_rows, parts = measure_drift(lambda: reference, lambda: model, single_rows)
    assert loss_of_rows == pytest.approx(loss, rel=1e-6)  # a mean over tokens, not over batches
    assert parts.per_layer == pytest.approx(together.per_layer, rel=1e-5)


def test_sum_of_the_paper_is_the_squares_of_ten_padded_batches() -> None:
    batches = [tiny.batch((6, 3), seed=number) for number in range(12)]
    measured = drift(with_bias(), shifted(1), batches)
    assert measured.paper_sum == pytest.approx(SIZE**2 * 10 * 2 * 6, rel=1e-4)
    assert measured.total == pytest.approx(SIZE * math.sqrt(12 * 9), rel=1e-5)


def test_models_that_share_weights_take_turns() -> None:
    # Two experiments of one stack share their weights, so each batch needs the other model to be activated.
    model, calls = with_bias(), []
    projection = next(m for name, m in model.named_modules() if name.endswith("1.self_attn.o_proj"))

    def load(name: str, bias: Tensor) -> nn.Module:
        calls.append(name)
        with torch.no_grad():
            projection.bias.copy_(bias)
        return model

    _, measured = measure_drift(lambda: load("reference", torch.zeros(64)), lambda: load("model", V), BATCHES)
    assert calls == (["reference", "model"] * len(BATCHES))[: len(BATCHES) + 1]
    assert measured.per_token == pytest.approx(SIZE, rel=1e-5)


def test_alignment_loss_is_the_mean_over_response_tokens() -> None:
    reference, model = tiny.model(seed=1), tiny.model(seed=2)
    surprise, count = 0.0, 0
    for batch in BATCHES:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            row = ids[mask.bool()]  # one row without padding
            with torch.no_grad():
                probabilities = model(input_ids=row[None]).logits[0].double().softmax(-1)
            for place in range(1, len(row)):
                if labels[place] != -100:
                    surprise -= math.log(probabilities[place - 1, row[place]])
                    count += 1
    assert count == TOKENS - 2 * sum(map(len, LENGTHS))  # two prompt tokens in each row
    loss, _ = measure_drift(lambda: reference, lambda: model, BATCHES)
    assert loss == pytest.approx(surprise / count, rel=1e-5)
