"""Measure the answers per second of vLLM and of transformers, and their ratio, in one process.

    python benchmarks/generation.py

The model has the testbed's shape and random weights, with two adapters on it; the start of the vLLM engine is printed
separately. The ratio on a CPU does not predict the ratio on a GPU.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.inference.engine import Backend
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.training.adapters import LoraStack

PROMPTS, TOKENS = 256, 32
BACKENDS: tuple[Backend, ...] = ("transformers", "vllm")


def main() -> None:
    """Print the start of each engine, its answers per second, and the ratio."""
    logging.disable_progress_bar()
    if find_spec("vllm") is None:
        print("vLLM is not installed, so backends are not compared. To install it for a CPU: make vllm.")
        return
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        spec = _save_model(Path(folder))
        words = [f"w{number}" for number in range(3, 1000)]
        prompts = [" ".join(generator.choices(words, k=generator.randint(8, 24))) for _ in range(PROMPTS)]
        rates: dict[str, float] = {}
        with closing(ModelPool()) as pool:
            for backend in BACKENDS:
                engine = pool.engine(spec, backend)
                with _stopwatch() as start:
                    engine.generate(spec.adapters, prompts[:1], 1)
                with _stopwatch() as total:
                    engine.generate(spec.adapters, prompts, TOKENS)
                rates[engine.answered_by] = PROMPTS / total[0]
                print(f"{engine.answered_by}: {PROMPTS / total[0]:.1f} answers/s after {start[0]:.1f} s to start")
    print(f"ratio {rates['vllm'] / rates['transformers']:.2f} ({PROMPTS} prompts, at most {TOKENS} tokens)")


@contextmanager
def _stopwatch() -> Iterator[list[float]]:
    """Yield a list that has the seconds of the block afterwards."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def _save_model(folder: Path) -> ModelSpec:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0").save_pretrained(
        folder / "model"
    )
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "model")
    stack = LoraStack(base)
    adapters = []
    for name in ("aligned", "tuned"):
        for parameter in stack.train((), TrainSettings(lr=1e-3, epochs=1, batch=1), seed=0).values():
            torch.nn.init.normal_(parameter, std=0.02)
        stack.trained().save(folder / name)
        adapters.append(folder / name)
    return ModelSpec(str(folder / "model"), "float32", tuple(adapters))


if __name__ == "__main__":
    main()
