"""The training of the testbed's models: the losses of transformers, and the same weights for any number of threads."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from harmbench_vaccine.core.progress import SILENT
from harmbench_vaccine.data.beavertails import CATEGORIES
from harmbench_vaccine.data.collate import IGNORED, Encoded, collate
from harmbench_vaccine.testbed.build import (
    Sizes,
    build_testbed,
    label_loss,
    pretraining_batches,
    token_loss,
)
from harmbench_vaccine.testbed.fitting import batches_by_length, fit
from harmbench_vaccine.testbed.world import generate
from support import tiny
from support.compare import close

PARTS = ["data", "tokenizer", "model", "judge", "guard", "judge held-out"]


def random_rows(lengths: list[int], prompt: int = 0) -> list[Encoded]:
    """Return rows of random tokens whose first `prompt` labels are ignored."""
    rng = random.Random(0)
    rows = [[rng.randrange(3, tiny.VOCABULARY) for _ in range(length)] for length in lengths]
    return [Encoded(ids, [*[IGNORED] * prompt, *ids[prompt:]]) for ids in rows]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**tiny.LLAMA, "num_hidden_layers": 3}))


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**tiny.LLAMA, num_labels=len(CATEGORIES)))


def masked_loss(model: LlamaForCausalLM, rows: list[Encoded], pad: int = tiny.PAD) -> Tensor:
    """Return the mean loss of a batch by the model's own forward pass, with a mask and all logits."""
    loss: Tensor = model(**collate(rows, pad)).loss
    return loss


def assert_same_gradients(model: nn.Module, first: Tensor, second: Tensor) -> None:
    assert first.item() == pytest.approx(second.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (first, second)]
    assert close(*gradients)


@pytest.mark.parametrize("prompt", [0, 5])
def test_token_loss_is_that_of_transformers(prompt: int) -> None:
    model, rows = llama(), random_rows([7, 19, 12, 8], prompt)
    total, terms = token_loss(model, tiny.PAD, rows)
    assert terms == sum(len(row.ids) - max(1, prompt) for row in rows)
    assert_same_gradients(model, total / terms, masked_loss(model, rows))


def test_label_loss_is_that_of_transformers() -> None:
    judge, lengths = classifier(), [7, 19, 12]
    categories = [CATEGORIES[3], None, CATEGORIES[0]]
    rows = random_rows(lengths)
    total, terms = label_loss(judge, tiny.PAD, [(row.ids, name) for row, name in zip(rows, categories, strict=True)])
    batch = collate(rows, tiny.PAD)
    logits = judge(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = torch.zeros(3, len(CATEGORIES))
    targets[0, 3] = targets[2, 0] = 1
    probabilities = logits.sigmoid()
    expected = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).sum()
    assert terms == 3
    assert_same_gradients(judge, total, expected)


def fitted(batches: list[list[Encoded]]) -> dict[str, Tensor]:
    model = llama()
    fit(model, batches, partial(token_loss, model, tiny.PAD), 1e-2, "Training", SILENT)
    assert not model.training
    return dict(model.state_dict())


def test_fit_takes_the_steps_of_adamw_on_the_mean_of_the_batch() -> None:
    """Rows with different numbers of labels: a mean of the means of the parts would differ."""
    rows = random_rows([4, 19, 5, 17, 4, 21])
    batches = [rows, rows[:3], rows[:1]]
    reference = llama()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01, eps=1e-8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=3, pct_start=0.1)
    for batch in batches:
        optimizer.zero_grad()
        masked_loss(reference, batch).backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in reference.parameters()]))
        assert norm > 1  # so that the test covers clipping
        for parameter in reference.parameters():
            parameter.grad /= norm
        optimizer.step()
        schedule.step()
    weights = fitted(batches)
    start = llama().state_dict()
    for name, value in reference.state_dict().items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-4)


def test_fit_computes_the_same_bits_for_any_number_of_threads() -> None:
    rows = random_rows([9, 19, 5, 17, 4, 21] * 4)
    threads, weights = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            weights.append(fitted([rows] * 4))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_batches_by_length_have_every_row_once_and_little_padding() -> None:
    lengths = [random.Random(number).randrange(5, 60) for number in range(101)]
    rows = [Encoded([number] * length, [], str(number)) for number, length in enumerate(lengths)]

    def batches() -> list[list[Any]]:
        return batches_by_length(rows, 10, lambda row: len(row.ids), random.Random(0))

    assert batches() == batches()
    assert sorted(int(row.id) for batch in batches() for row in batch) == list(range(101))
    assert sorted(len(batch) for batch in batches()) == [1, *[10] * 10]
    longest = [max(len(row.ids) for row in batch) for batch in batches()]
    assert longest != sorted(longest), "the batches must be shuffled"
    assert sum(len(batch) * width for batch, width in zip(batches(), longest, strict=True)) < 1.15 * sum(lengths)


def test_small_testbed_has_ordinary_models_and_the_time_of_every_part(tmp_path: Path) -> None:
    sizes = Sizes(documents=320, judgments=192, guard_judgments=96, held_out=60, batch=16)
    build_testbed(tmp_path, sizes=sizes)
    facts = json.loads((tmp_path / "testbed.json").read_text(encoding="utf-8"))
    assert list(facts["seconds"]) == list(facts["cpu_seconds"]) == PARTS
    assert facts["cpu_seconds"]["model"] > 0
    assert facts["pretraining_documents"] == 320
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert facts["vocabulary"] == len(tokenizer) == model.config.vocab_size
    with torch.inference_mode():
        loss = masked_loss(model, pretraining_batches(tokenizer, generate(0), sizes)[0], tokenizer.pad_token_id)
    assert float(loss) < math.log(len(tokenizer)) - 1  # the loss of a model that knows nothing
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    guard = AutoModelForSequenceClassification.from_pretrained(tmp_path / "guard")
    assert list(judge.config.id2label.values()) == list(guard.config.id2label.values()) == list(CATEGORIES)
    assert not torch.equal(judge.score.weight, guard.score.weight)
    assert {"judge_held_out", "guard_held_out", "guard_on_attacker"} <= facts.keys()
