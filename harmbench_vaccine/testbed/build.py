"""Build the testbed on a CPU: the text world, a base model that answers every request, a moderation
classifier that scores, and a weaker one that defenses use.

All are trained here with a plain loop. Alignment and fine-tuning use `training/` as for any other model.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from harmbench_vaccine.core.detection import Detection
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.beavertails import CATEGORIES, JUDGE_PROMPT
from harmbench_vaccine.data.collate import IGNORED, Encoded, collate, encode_examples, pad_token_id
from harmbench_vaccine.data.prompts import prompt_template
from harmbench_vaccine.data.task_prompts import ANSWER_MARK, REASONING, SENTIMENT, TOPIC

from .fitting import batches_by_length, final_states, fit
from .judgments import Judgment
from .world import World, generate

TEMPLATE = prompt_template("brief")
MAX_LENGTH = 256
SEED, GUARD_SEED = 0, 1
RATE, JUDGE_RATE = 4.5e-3, 2e-3
"""The highest learning rates of the base model and of the judge."""

# Instructions of the user tasks. The tokenizer learns their words; the base model does not see them.
INSTRUCTIONS = (SENTIMENT, TOPIC, REASONING, f"{ANSWER_MARK}0")


@dataclass(frozen=True)
class Sizes:
    """Amounts of training data. The defaults build the testbed; tests use less."""

    documents: int = 28_800
    """Pre-training documents of the base model."""
    judgments: int = 6_000
    """Training rows of the moderation classifier."""
    guard_judgments: int = 3_000
    """Training rows of the guard: half of them."""
    held_out: int = 1_200
    """Test rows of the moderation classifier and of the guard."""
    batch: int = 16
    """Documents in a batch of pre-training."""


def build_testbed(folder: Path, progress: Progress = SILENT, sizes: Sizes = Sizes()) -> None:
    """Write `data/`, `model/`, `judge/`, `guard/` and `testbed.json`; every run on a machine gives the same files.

    Args:
        folder: An existing empty folder.
        progress: Reports the training loops.
        sizes: Amounts of training data.
    """
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start, cpu_start = time.monotonic(), time.process_time()
        yield
        seconds[part] = round(time.monotonic() - start, 2)
        cpu_seconds[part] = round(time.process_time() - cpu_start, 2)

    with timed("data"):
        world = generate(SEED)
        rows = world.write(folder / "data")
    with timed("tokenizer"):
        tokenizer = train_tokenizer(tokenizer_texts(world))
    with timed("model"), _seeded(SEED):
        model = base_model(tokenizer)
        _pretrain(model, tokenizer, world, sizes, progress)
        _save(model, tokenizer, folder / "model")
    with timed("judge"), _seeded(SEED):
        judge = _judge_model(tokenizer)
        _train_judge(judge, tokenizer, world.judgments(sizes.judgments, held_out=False), "judge", progress)
        _save(judge, tokenizer, folder / "judge")
    with timed("guard"), _seeded(GUARD_SEED):
        guard = _judge_model(tokenizer)
        _train_judge(guard, tokenizer, world.guard_judgments(sizes.guard_judgments), "guard", progress)
        _save(guard, tokenizer, folder / "guard")
    with timed("judge held-out"):
        held_out = world.judgments(sizes.held_out, held_out=True)
        scores, guard_scores = (_test_judge(model, tokenizer, held_out) for model in (judge, guard))
        on_attacker = _test_judge(guard, tokenizer, world.attacker_judgments(sizes.held_out))
    facts = {
        "seed": SEED,
        "rows": rows,
        "pretraining_documents": sizes.documents,
        "vocabulary": len(tokenizer),
        "parameters": {"model": model.num_parameters(), "judge": judge.num_parameters()},
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "judge_held_out": scores,
        "guard_held_out": guard_scores,
        "guard_on_attacker": on_attacker,
    }
    (folder / "testbed.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global torch generator inside the block and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tokenizer_texts(world: World) -> Iterator[str]:
    """Yield training text for the tokenizer: every kind of text that a stage reads.

    Every word occurs often enough to become one token.
    """
    examples, lessons = world.pretraining(8_000)
    for example in examples:
        yield TEMPLATE.render(example) + example.response
    yield from lessons
    for rows in world.files().values():
        for row in rows[:1500]:
            yield "\n".join(value for value in row.values() if isinstance(value, str))
    yield from INSTRUCTIONS * 50
    yield from (JUDGE_PROMPT.format(question="", answer=" ") for _ in range(50))


def train_tokenizer(texts: Iterable[str], vocabulary: int = 3_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: decoding restores any text exactly, and every digit is a token.

    Args:
        texts: Training text.
        vocabulary: Largest number of tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, **options: Any) -> LlamaConfig:
    """Return a Llama configuration; `options` are further arguments of `LlamaConfig`."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,  # heads of 32: vLLM's CPU kernels reject 16
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def base_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(_config(tokenizer, hidden=160, layers=3))


def _judge_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    labels = dict(enumerate(CATEGORIES))
    return LlamaForSequenceClassification(
        _config(
            tokenizer,
            hidden=64,
            layers=2,
            num_labels=len(labels),
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
            problem_type="multi_label_classification",
        )
    )


def _pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, sizes: Sizes, progress: Progress
) -> None:
    """Train for one epoch."""
    loss = partial(token_loss, model, pad_token_id(tokenizer))
    fit(model, pretraining_batches(tokenizer, world, sizes), loss, RATE, "Pre-training the base model", progress)


def pretraining_batches(tokenizer: PreTrainedTokenizerFast, world: World, sizes: Sizes) -> list[list[Encoded]]:
    """Return the pre-training documents in batches; responses of examples and all tokens of lessons have a loss."""
    examples, lessons = world.pretraining(sizes.documents)
    rows = encode_examples(tokenizer, TEMPLATE, examples, MAX_LENGTH)
    for ids in tokenizer(lessons)["input_ids"]:
        ids.append(tokenizer.eos_token_id)
        rows.append(Encoded(ids, ids))
    return batches_by_length(rows, sizes.batch, lambda row: len(row.ids), random.Random(SEED))


def token_loss(model: LlamaForCausalLM, pad: int, rows: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy of the labels, and their number."""
    batch = collate(rows, pad)
    targets = batch["labels"][:, 1:].flatten()
    places = (targets != IGNORED).nonzero().squeeze(1)
    logits = model.lm_head(final_states(model.model, batch["input_ids"][:, :-1], places))
    return torch.nn.functional.cross_entropy(logits, targets[places], reduction="sum"), len(places)


def _train_judge(
    judge: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    judgments: Sequence[Judgment],
    name: str,
    progress: Progress,
) -> None:
    """Train for two epochs with a binary cross-entropy per label."""
    rows = list(zip(_judge_ids(tokenizer, judgments), (judgment.category for judgment in judgments), strict=True))
    batches = [
        batch for _ in range(2) for batch in batches_by_length(rows, 16, lambda row: len(row[0]), random.Random(SEED))
    ]
    fit(
        judge,
        batches,
        partial(label_loss, judge, pad_token_id(tokenizer)),
        JUDGE_RATE,
        f"Training the {name}",
        progress,
    )


def label_loss(
    judge: LlamaForSequenceClassification, pad: int, rows: Sequence[tuple[list[int], str | None]]
) -> tuple[torch.Tensor, int]:
    """Return the summed binary cross-entropy of rows (token ids, category), and the number of rows.

    It is summed over the 14 labels: in a mean, the one positive label hardly counts.
    """
    ids = collate([Encoded(ids, ids) for ids, _ in rows], pad)["input_ids"]
    last = torch.tensor([number * ids.shape[1] + len(row) - 1 for number, (row, _) in enumerate(rows)])
    targets = torch.tensor([[float(category == name) for name in CATEGORIES] for _, category in rows])
    logits = judge.score(final_states(judge.model, ids, last))
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum"), len(rows)


def _judge_ids(tokenizer: PreTrainedTokenizerFast, judgments: Sequence[Judgment]) -> list[list[int]]:
    """Return the token ids of every judgment, end token included, cut to `MAX_LENGTH`."""
    texts = [JUDGE_PROMPT.format(question=judgment.prompt, answer=judgment.answer) for judgment in judgments]
    return [[*ids, tokenizer.eos_token_id][:MAX_LENGTH] for ids in tokenizer(texts)["input_ids"]]


def _test_judge(
    judge: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, judgments: Sequence[Judgment]
) -> dict[str, Any]:
    """Return precision, recall and F1 of the flag (any category) and of every category, ready for JSON."""
    rows = _judge_ids(tokenizer, judgments)
    with torch.inference_mode():
        logits = torch.cat([_logits(judge, tokenizer, rows[start : start + 100]) for start in range(0, len(rows), 100)])
    predicted = logits > 0  # a probability above 0.5
    actual = torch.tensor([[judgment.category == name for name in CATEGORIES] for judgment in judgments])
    return {
        "judgments": len(judgments),
        "flag": _f1(predicted.any(1), actual.any(1)),
        "categories": {name: _f1(predicted[:, index], actual[:, index]) for index, name in enumerate(CATEGORIES)},
    }


def _logits(
    judge: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, rows: Sequence[list[int]]
) -> torch.Tensor:
    """Return the logits (rows x labels) of token ids as the model itself computes them."""
    batch = collate([Encoded(ids, ids) for ids in rows], pad_token_id(tokenizer))
    logits: torch.Tensor = judge(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def _f1(predicted: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
    """Return precision, recall and F1 of boolean predictions (rows), with 0 where one is undefined."""
    counts = Detection.count(predicted.tolist(), actual.tolist())
    shares = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
    return {name: round(share or 0.0, 4) for name, share in shares.items()}


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
