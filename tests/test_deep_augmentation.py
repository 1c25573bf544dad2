"""Deep augmentation: the rows of every visit are built from the triples, and their gradients by plain autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.defenses.deep_augmentation import DeepAugmentation
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Defense, Example, Pools
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.stage import Batch, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import gradient_at
from support.compare import same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

PROMPT, HARMFUL, REFUSAL = [50, 51, 52], list(range(10, 17)), [80, 81, 82, 83]
"""The tokens of a triple, without the token that ends a response."""


def encode(examples: Sequence[Example]) -> list[Encoded]:
    """Encode examples with a token that ends every response."""
    return [replace(row, ids=[*row.ids, tiny.EOS], labels=[*row.labels, tiny.EOS]) for row in tiny.encode(examples)]


def text(tokens: Sequence[int]) -> str:
    """Return the text that `tiny.encode` encodes as these tokens."""
    return "".join(chr(token - 3 + 90) for token in tokens)


def one_triple(harmful: Sequence[int] = HARMFUL) -> Pools:
    prompt = text(PROMPT)
    return Pools(paired=[(Example("r", prompt, text(REFUSAL)), Example("h", prompt, text(harmful), harmful=True))])


def align_stage(pools: Pools, **changes: Any) -> TrainingStage:
    settings = tiny.settings(**changes)
    stage, _ = tiny.stage(trained_with=settings, stirred=True, pools=pools)
    stage.encode = encode
    return stage


def visits(defense: DeepAugmentation, pools: Pools, count: int, **changes: Any) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of the only triple at each of its visits, without padding."""
    stage = align_stage(pools, **changes)
    stage.rows = encode(defense.train_on("align", [], pools))
    plain, visited = {**stage.collated(stage.rows), "rows": torch.tensor([0])}, []
    for stage.step in range(1, count + 1):
        batch = defense.batch(stage, plain)
        assert torch.equal(batch["rows"], plain["rows"])
        assert batch["attention_mask"].all()
        visited.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return visited


def expected_visit(k: int, harmful: Sequence[int] = HARMFUL) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of a visit with k tokens of the harmful answer."""
    answer = [*REFUSAL, tiny.EOS]
    return [*PROMPT, *harmful[:k], *answer], [IGNORED] * (len(PROMPT) + k) + answer


def lengths_of_beginnings(
    visited: Sequence[tuple[list[int], list[int]]], harmful: Sequence[int] = HARMFUL
) -> Counter[int]:
    """Count the visits with each k, after a comparison of all tokens and labels."""
    counts = Counter(len(ids) - len(PROMPT) - len(REFUSAL) - 1 for ids, _ in visited)
    for ids, labels in visited:
        assert (ids, labels) == expected_visit(len(ids) - len(PROMPT) - len(REFUSAL) - 1, harmful)
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Visits of a triple


def test_the_beginning_has_no_labels_and_a_uniform_length() -> None:
    """The probability is 0.3, and the length is uniform on 1, ..., 4 of the 7 tokens."""
    counts = lengths_of_beginnings(visits(DeepAugmentation(triples=1, p=0.3, longest=4), one_triple(), 2000))
    assert counts.keys() == {0, 1, 2, 3, 4}
    assert counts[0] / 2000 == pytest.approx(0.7, abs=0.05)
    assert all(counts[k] / 2000 == pytest.approx(0.075, abs=0.025) for k in range(1, 5))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_beginning_may_be_the_entire_answer_without_its_last_token(length: int) -> None:
    """The token that ends a response is not in the middle of a row."""
    pools = one_triple(HARMFUL[:length])
    counts = lengths_of_beginnings(visits(DeepAugmentation(triples=1, p=1.0), pools, 100), HARMFUL[:length])
    assert counts.keys() == set(range(1, length + 1))


@pytest.mark.parametrize("room", [0, 1, 3])
def test_the_beginning_leaves_room_for_the_refusal(room: int) -> None:
    longest = len(PROMPT) + len(REFUSAL) + 1 + room
    counts = lengths_of_beginnings(visits(DeepAugmentation(triples=1, p=1.0), one_triple(), 60, max_length=longest))
    assert counts.keys() == (set(range(1, room + 1)) or {0})


def test_every_micro_batch_draws_again_and_an_interruption_does_not() -> None:
    first, again = (visits(DeepAugmentation(triples=1), one_triple(), 30) for _ in range(2))
    assert first == again
    stage, defense = align_stage(one_triple()), DeepAugmentation(triples=1, p=1.0)
    stage.rows = encode(defense.train_on("align", [], one_triple()))
    batch = {**stage.collated(stage.rows), "rows": torch.tensor([0])}
    drawn = set()
    for stage.micro in range(20):
        state = torch.get_rng_state()
        drawn.add(defense.batch(stage, batch)["input_ids"].shape[1])
        assert torch.equal(torch.get_rng_state(), state)  # the dropout masks of SFT
    assert len(drawn) == len(HARMFUL)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the stage


POOLS = tiny.example_pools(40)


def test_refusals_of_different_triples_join_the_alignment_rows() -> None:
    rows = DeepAugmentation(triples=9).train_on("align", list(POOLS.alignment), POOLS)
    refusals = [row for row in rows if row not in POOLS.alignment]
    assert sorted(row.id for row in rows if row in POOLS.alignment) == sorted(row.id for row in POOLS.alignment)
    assert len({row.id for row in refusals}) == 9
    texts = {(safe.instruction, safe.response) for safe, _ in POOLS.paired}
    assert all((row.instruction, row.response) in texts for row in refusals)
    assert not any(row.harmful for row in rows)


def test_missing_triples_are_refused() -> None:
    with pytest.raises(BadInput, match="equested 41 pairs, but only 40 are available"):
        DeepAugmentation(triples=41).train_on("align", [], POOLS)
    with pytest.raises(BadInput):
        DeepAugmentation().train_on("align", list(POOLS.alignment), Pools(alignment=POOLS.alignment))


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Recording(DeepAugmentation):
    """Records the row numbers and the batch of every micro-batch."""

    _batches: list[Batch] = PrivateAttr(default_factory=list)

    def batch(self, stage: TrainingStage, batch: Batch) -> Batch:
        self._batches.append(super().batch(stage, batch))
        return self._batches[-1]


def run_stage(
    defense: Defense, folder: Path, examples: list[Example] | None = None, salt: int = 0, **changes: Any
) -> tuple[TrainingStage, Any]:
    """Train a stage on the rows that the defense returns, in a team as in the pipeline."""
    torch.manual_seed(salt)
    stage = align_stage(POOLS, **changes)
    examples = defense.train_on("align", list(POOLS.alignment[:6]), POOLS) if examples is None else examples
    team = DefenseTeam(members=(defense,))
    return stage, train(stage, team, encode(examples), stage.settings, folder, pad=tiny.PAD)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_steps_equal_plain_pytorch(accumulation: int, tmp_path: Path) -> None:
    """The batches are built from the texts; only k is read from the rows on which the model was trained."""
    defense = Recording(triples=12 * accumulation - 6, p=0.6, longest=5)
    changes: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0, "epochs": 1}
    stage, log = run_stage(defense, tmp_path, accumulation=accumulation, **changes)
    assert len(log) == 3
    triples = {f"deep_augmentation:{pair[0].id}": pair for pair in POOLS.paired}
    kinds: Counter[str] = Counter()

    def built(recorded: Batch) -> Batch:
        rows = []
        for number, mask in zip(recorded["rows"].tolist(), recorded["attention_mask"], strict=True):
            row = stage.rows[number]
            if row.id in triples:
                (x, h), (_, r) = (tokens_of(example) for example in reversed(triples[row.id]))
                k = int(mask.sum()) - len(x) - len(r) - 1
                kinds["heads" if k else "tails"] += 1
                row = Encoded(x + h[:k] + r + [tiny.EOS], [IGNORED] * (len(x) + k) + r + [tiny.EOS])
            else:
                kinds["anchor"] += 1
            rows.append(row)
        return tiny.collated(rows)

    def tokens_of(example: Example) -> tuple[list[int], list[int]]:
        (row,) = tiny.encode([example])
        return row.ids[: len(example.instruction)], row.ids[len(example.instruction) :]

    twin = align_stage(POOLS, **changes)

    def mean(batches: Sequence[Batch]) -> list[Tensor]:
        micro = [gradient_at(twin, built(batch), twin.values()) for batch in batches]
        return [torch.stack(values).mean(0) for values in zip(*micro, strict=True)]

    batches = defense._batches
    assert len(batches) == 3 * accumulation
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    assert_equal_where_firm(stage, twin, plain_adamw(twin, [partial(mean, step) for step in steps]))
    assert min(kinds[kind] for kind in ("heads", "tails", "anchor")) >= 2


def values_and_log(run: tuple[TrainingStage, Any]) -> tuple[dict[str, Tensor], Any]:
    return dict(zip(run[0].trainable, run[0].values(), strict=True)), run[1]


def test_p_0_equals_sft_on_the_refusals_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    """The coins use no random number of the steps."""
    rows = DeepAugmentation(triples=9).train_on("align", list(POOLS.alignment[:6]), POOLS)
    sft = run_stage(SFT(), tmp_path / "sft", rows, lora_dropout=0.1)
    tails = run_stage(DeepAugmentation(triples=9, p=0.0), tmp_path / "tails", lora_dropout=0.1)
    assert_same(values_and_log(tails), values_and_log(sft))
    heads = run_stage(DeepAugmentation(triples=9, p=1.0), tmp_path / "heads", lora_dropout=0.1)
    assert not same(heads[0].values(), sft[0].values())


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    defense = DeepAugmentation(triples=9)
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2, "lora_dropout": 0.1}
    complete = run_stage(defense, tmp_path / "complete", **changes)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(defense, "batch", 7), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    resumed = run_stage(DeepAugmentation(triples=9), tmp_path / "cut", salt=2, **changes)
    assert_same(values_and_log(resumed), values_and_log(complete))
