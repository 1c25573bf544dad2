"""A tiny world for contract checks: a model with random weights, rows of random words, a judge.

It is built in memory in milliseconds from the parts of a real run; only the tokenizer and the judge are simplified.
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

from harmbench_vaccine.core.device import forked_rng, place_model
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.types import Example, Mix, Pools, StageName, TrainSettings, Verdict
from harmbench_vaccine.data.pools import RowPools
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
"""Number of rows of each pool: enough for the defaults of the papers."""
SAMPLES = 158
"""Number of rows that the user uploads, unless the attack changes it."""
CATEGORIES = ("arson", "fraud", "insult", "theft")
"""The harm categories of the harmful and safe rows; each row has one."""
RATIO = 0.13
"""Proportion of harmful rows, unless the attack changes it."""
MICRO = 6
"""Number of micro-batches of a training stage, unless the plug-in changes its rows or epochs."""
LONGEST = 24
"""Maximum number of micro-batches of a stage."""
TARGETS = ("q_proj", "v_proj", "down_proj")
RANK = 4


class HashTokenizer:
    """A tokenizer without a vocabulary: the token of a word is a hash of the word."""

    pad_token_id, eos_token_id = PAD, EOS

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return token ids, without special tokens."""
        return {"input_ids": [2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in text.split()]}


@cache
def _random_rows() -> tuple[Pools, list[Example], list[Example]]:
    """Return the pools, the task rows and the harmful questions: random words from a fixed seed."""
    generator = random.Random(1)

    def words(least: int, most: int) -> str:
        count = generator.randint(least, most)
        return " ".join("".join(generator.choices(ascii_lowercase, k=5)) for _ in range(count))

    def rows(kind: str, count: int, *, harmful: bool = False) -> list[Example]:
        return [Example(f"{kind}:{n}", words(2, 5), words(2, 6), harmful=harmful) for n in range(count)]

    def labeled(kind: str, count: int, *, harmful: bool = False) -> list[Example]:
        examples = rows(kind, count, harmful=harmful)
        return [replace(row, categories=(CATEGORIES[n % len(CATEGORIES)],)) for n, row in enumerate(examples)]

    refusals = labeled("refusal", PAIRED)
    pairs = [(row, replace(row, id=f"un{row.id}", response=words(2, 6), harmful=True)) for row in refusals]
    benign = [replace(row, input=words(1, 3) if n % 3 == 0 else "") for n, row in enumerate(rows("benign", BENIGN))]
    pools = Pools(labeled("safe", ALIGNMENT), pairs, benign, labeled("harmful", ATTACKER, harmful=True))
    task = [replace(row, target=row.response) for row in rows("task", TASK)]
    return pools, task, labeled("question", 6, harmful=True)


class TinyWorld:
    """The data, model and judge that the stages of a check use."""

    def __init__(self, folder: Path) -> None:
        """Create a world that writes its files under `folder`."""
        pools, self.task, questions = _random_rows()
        self.pools = Pools(list(pools.alignment), list(pools.paired), list(pools.benign), list(pools.attacker))
        self.folder = folder
        self.template: PromptTemplate = prompt_template("brief")
        self.questions = [EvalSet("harmful", questions, self.template, 8)]
        self.row_pools = RowPools(
            alignment=list(pools.alignment),
            paired=list(pools.paired),
            attacker=list(pools.attacker),
            benign=list(pools.benign),
            harmful_questions=list(questions),
            benign_questions=[],
            dropped={},
            rows_read={},
        )
        """The same rows before an attack divides them."""

    def new_folder(self) -> Path:
        """Create an empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def uploaded_rows(self, mix: Mix, attack: Attack, seed: int = 0, pools: Pools | None = None) -> list[Example]:
        """Draw the rows that a user uploads; `pools` replaces those of the world."""
        return upload_rows(mix, self.task, pools or self.pools, attack, derive_seed(seed, "user"))

    @cached_property
    def user_rows(self) -> list[Example]:
        """The upload without an attack plug-in: task rows and some harmful rows."""
        return self.uploaded_rows(Mix(SAMPLES, RATIO), Attack())

    def stage_rows(self, stage: StageName) -> list[Example]:
        """Return the rows that a stage trains on, unless a defense changes them."""
        return list(self.pools.alignment if stage == "align" else self.user_rows)

    def encode(self, examples: Sequence[Example], prompt: PromptTemplate, max_length: int) -> list[Encoded]:
        """Encode examples as rows of tokens."""
        from harmbench_vaccine.data.collate import encode_examples

        tokenizer: Any = HashTokenizer()  # simplified: two attributes and a call are enough for encoding
        return encode_examples(tokenizer, prompt, examples, max_length)

    @staticmethod
    def judge(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return verdicts by a hash of the text: about half of all pairs are flagged."""
        odds = [zlib.crc32(f"{question}\n{answer}".encode()) / 2**32 for question, answer in pairs]
        return [Verdict(value > 0.5, ["harm"] if value > 0.5 else [], {"harm": value}, False) for value in odds]

    def settings(self, rows: int, **changes: float) -> TrainSettings:
        """Return the protocol's settings for a stage of `rows` rows: two micro-batches a step, three steps."""
        defaults = TrainSettings(
            lr=5e-3,
            epochs=0.0,
            batch=4,
            accumulation=2,
            weight_decay=0.01,
            lora_rank=RANK,
            lora_alpha=2.0 * RANK,
            lora_dropout=0.1,
            lora_targets=TARGETS,
            max_length=256,
        )
        values: dict[str, Any] = {"epochs": MICRO / -(-rows // defaults.batch), **changes}  # fields of several types
        return replace(defaults, **values)

    def base(self, dtype: str = "float32") -> PreTrainedModel:
        """Return the base model: a Llama of 2 layers, width 64, head size 32, with random weights of a fixed seed."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            initializer_range=0.1,
            pad_token_id=PAD,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
        with forked_rng():
            torch.manual_seed(0)
            model: PreTrainedModel = LlamaForCausalLM(config)
        return place_model(model.to(getattr(torch, dtype))).eval()

    def random_adapter(self, seed: int) -> Adapter:
        """Return a LoRA of random numbers on every target module of the base model."""
        import torch

        from harmbench_vaccine.training.adapters import Adapter

        generator = torch.Generator().manual_seed(seed)

        def random_numbers(*shape: int) -> Tensor:
            return 0.1 * torch.randn(shape, generator=generator)

        modules = [(name, module) for name, module in self.base().named_modules() if name.endswith(TARGETS)]
        weights: dict[str, Any] = {name: module.weight for name, module in modules}
        factors = {
            name: (random_numbers(RANK, weight.shape[1]), random_numbers(weight.shape[0], RANK))
            for name, weight in weights.items()
        }
        return Adapter(factors, 2.0)


POOLS = ("alignment", "paired", "benign", "attacker")


def drawn_pool_rows(pools: Pools, examples: Sequence[Example], inputs: Sequence[Example]) -> dict[str, frozenset[int]]:
    """Find the pool rows that a hook adds.

    Args:
        pools: The pools of the world.
        examples: The rows that the hook returns or encodes.
        inputs: The rows that the hook receives.

    Returns:
        Pool -> numbers of its rows that occur in `examples` but not in `inputs`.
    """
    before = _pool_rows_in(pools, inputs)
    known = set(inputs)
    after = _pool_rows_in(pools, [example for example in examples if example not in known])
    return {name: after[name] - before[name] for name in POOLS}


def _pool_rows_in(pools: Pools, examples: Sequence[Example]) -> dict[str, frozenset[int]]:
    text = "\n".join(f"{row.instruction}\n{row.response}" for row in examples)
    rows = {name: [row[0] if isinstance(row, tuple) else row for row in getattr(pools, name)] for name in POOLS}
    return {
        name: frozenset(number for number, row in enumerate(pool) if row.instruction in text)
        for name, pool in rows.items()
    }
