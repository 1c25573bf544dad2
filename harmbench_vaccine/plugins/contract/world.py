"""A tiny world to check plug-ins in: a model with random weights, rows of random words, an aligned adapter.

It is made in memory in milliseconds, of the same parts as a run's: only the tokenizer and the judge are stand-ins.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, Mix, Pools, StageName, TrainSettings, Verdict
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate, prompt_template

from ..attack import Attack
from ..teams import upload_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from harmbench_vaccine.data.collate import Encoded
    from harmbench_vaccine.training.adapters import Adapter

PAD, EOS = 0, 1
VOCABULARY = 96
ALIGNMENT, PAIRED, BENIGN, ATTACKER, TASK = 112, 64, 176, 176, 1024
"""Rows of each pool: enough for what the papers draw."""
SAMPLES = 158
"""Rows that the user uploads, if the attack does not say otherwise."""
RATIO = 0.13
"""Share of harmful rows, if the attack does not say otherwise."""
MICRO = 6
"""Micro-batches of a training stage, if the plug-in does not change its rows or epochs."""
LONGEST = 24
"""Micro-batches at which a stage of a check is cut."""
TARGETS = ("q_proj", "v_proj", "down_proj")
RANK = 4


class Words:
    """A tokenizer without a vocabulary: every word is a token, by a hash."""

    pad_token_id, eos_token_id = PAD, EOS

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Token ids, without special tokens."""
        return {"input_ids": [2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in text.split()]}


@cache
def _rows() -> tuple[Pools, list[Example], list[Example]]:
    """The pools, the task's rows and the harmful questions: random words, always the same."""
    draw = random.Random(1)

    def words(least: int, most: int) -> str:
        return " ".join("".join(draw.choices(ascii_lowercase, k=5)) for _ in range(draw.randint(least, most)))

    def rows(kind: str, count: int, *, harmful: bool = False) -> list[Example]:
        return [Example(f"{kind}:{n}", words(2, 5), words(2, 6), harmful=harmful) for n in range(count)]

    refusals = rows("refusal", PAIRED)
    pairs = [(row, replace(row, id=f"un{row.id}", response=words(2, 6), harmful=True)) for row in refusals]
    benign = [replace(row, input=words(1, 3) if n % 3 == 0 else "") for n, row in enumerate(rows("benign", BENIGN))]
    pools = Pools(rows("safe", ALIGNMENT), pairs, benign, rows("harmful", ATTACKER, harmful=True))
    task = [replace(row, target=row.response) for row in rows("task", TASK)]
    return pools, task, rows("question", 6, harmful=True)


class TinyWorld:
    """Everything that a stage of a check is given."""

    def __init__(self, folder: Path) -> None:
        pools, self.task, questions = _rows()
        self.pools = Pools(list(pools.alignment), list(pools.paired), list(pools.benign), list(pools.attacker))
        self.folder = folder
        self.template: PromptTemplate = prompt_template("brief")
        self.questions = [EvalSet("harmful", questions, self.template, 8)]

    def new_folder(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def uploaded(self, mix: Mix, attack: Attack, seed: int = 0) -> list[Example]:
        """What a user uploads."""
        return upload_rows(mix, self.task, self.pools, attack, derive_seed(seed, "user"))

    @cached_property
    def users(self) -> list[Example]:
        """What a user uploads without an attack of note: task rows and some harmful ones."""
        return self.uploaded(Mix(SAMPLES, RATIO), Attack())

    def given(self, stage: StageName) -> list[Example]:
        """The rows that a stage trains on if no defense changes them."""
        return list(self.pools.alignment if stage == "align" else self.users)

    def encode(self, examples: Sequence[Example], prompt: PromptTemplate, max_length: int) -> list[Encoded]:
        """Examples as rows of tokens."""
        from harmbench_vaccine.data.collate import encode_examples

        tokenizer: Any = Words()
        return encode_examples(tokenizer, prompt, examples, max_length)

    @staticmethod
    def judge(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts by a hash of the text: about half of all pairs are flagged."""
        odds = [zlib.crc32(f"{question}\n{answer}".encode()) / 2**32 for question, answer in pairs]
        return [Verdict(value > 0.5, ["harm"] if value > 0.5 else [], {"harm": value}, False) for value in odds]

    def settings(self, rows: int, **changes: float) -> TrainSettings:
        """The protocol's settings for a stage of that many rows: two micro-batches a step, three steps."""
        plain = TrainSettings(
            lr=5e-3, epochs=0.0, batch=4, accumulation=2, weight_decay=0.01, lora_rank=RANK, lora_alpha=2.0 * RANK,
            lora_dropout=0.1, lora_targets=TARGETS, max_length=256,
        )  # fmt: skip
        given: dict[str, Any] = {"epochs": MICRO / -(-rows // plain.batch), **changes}
        return replace(plain, **given)

    def base(self, dtype: str = "float32") -> PreTrainedModel:
        """The base model: a Llama of 2 layers of width 64, heads of size 32, always with the same random weights."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.1,
            pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        made: PreTrainedModel = model.to(device, getattr(torch, dtype)).eval()
        return made

    @cached_property
    def aligned(self) -> Path:
        """The folder of an aligned model's adapter."""
        from .stages import aligned

        path = self.folder / "aligned"
        aligned().save(path)
        return path

    def adapter(self, seed: int) -> Adapter:
        """A LoRA of random numbers on every target of the base model."""
        import torch

        from harmbench_vaccine.training.adapters import Adapter

        generator = torch.Generator().manual_seed(seed)

        def random_numbers(*shape: int) -> Tensor:
            return 0.1 * torch.randn(shape, generator=generator)

        weights: dict[str, Any] = {
            name: module.weight for name, module in self.base().named_modules() if name.endswith(TARGETS)
        }
        factors = {
            name: (random_numbers(RANK, weight.shape[1]), random_numbers(weight.shape[0], RANK))
            for name, weight in weights.items()
        }
        return Adapter(factors, 2.0)


POOLS = ("alignment", "paired", "benign", "attacker")


def drawn(pools: Pools, examples: Sequence[Example], given: Sequence[Example]) -> dict[str, frozenset[int]]:
    """Pool -> numbers of its rows that stand in the examples but not in those given."""
    before = _found(pools, given)
    known = set(given)
    after = _found(pools, [example for example in examples if example not in known])
    return {name: after[name] - before[name] for name in POOLS}


def _found(pools: Pools, examples: Sequence[Example]) -> dict[str, frozenset[int]]:
    text = "\n".join(f"{row.instruction}\n{row.response}" for row in examples)
    rows = {name: [row[0] if isinstance(row, tuple) else row for row in getattr(pools, name)] for name in POOLS}
    return {
        name: frozenset(number for number, row in enumerate(pool) if row.instruction in text)
        for name, pool in rows.items()
    }
