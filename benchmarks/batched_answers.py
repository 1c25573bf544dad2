"""Measure the speedup of answering prompts in batches instead of one at a time, in one process.

python benchmarks/batched_answers.py
"""

from __future__ import annotations

import os
import random
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.training.adapters import LoraStack

PROMPTS, TOKENS = 64, 32


def main() -> None:
    """Print the seconds of both batch sizes and their ratio."""
    torch.manual_seed(0)
    vocabulary = {f"w{number}": number for number in range(1000)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    )
    stack = LoraStack(LlamaForCausalLM(config))
    generator = random.Random(0)
    prompts = [" ".join(generator.choices(sorted(vocabulary), k=generator.randint(8, 24))) for _ in range(PROMPTS)]
    seconds = {}
    for batch in (1, PROMPTS):
        start = time.perf_counter()
        TransformersEngine(stack, tokenizer, batch).generate((), prompts, TOKENS)
        seconds[batch] = time.perf_counter() - start
    print(f"{PROMPTS} prompts: {seconds[1]:.1f} s one at a time, {seconds[PROMPTS]:.1f} s in one batch")
    print(f"ratio {seconds[1] / seconds[PROMPTS]:.1f}")


if __name__ == "__main__":
    main()
