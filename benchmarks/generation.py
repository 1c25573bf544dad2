"""Measure the answers per second of our vLLM engine relative to vLLM alone, in one run that alternates between them.

    python benchmarks/generation.py                                     # a random model of the testbed's shape
    python benchmarks/generation.py --model DIR --dtype bfloat16 --record       # on a GPU

Both answer the same prompts as text, with the base model, one adapter, two adapters (which are stacked to one of twice
the rank), and the two adapters merged into the weights. A round that is not counted comes first, so that compilation
is excluded; no prompt occurs in two rounds, so that vLLM alone cannot reuse its cache. The ratio on a CPU does not
predict the ratio on a GPU: there, less time is spent in the model.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before torch is imported

import click
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from harmbench_vaccine.core.device import place_model
from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.inference.engine import Engine
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.inference.vllm_engine import VllmEngine
from harmbench_vaccine.inference.vllm_process import CPU_CACHE
from harmbench_vaccine.inference.vllm_runner import VllmRunner
from harmbench_vaccine.training.adapters import Adapter, LoraStack, concatenate
from harmbench_vaccine.training.merging import merge_adapter

GPU_SHARE = 0.2
"""Share of a GPU's memory for each of the four engines, which run at the same time."""


class RawVllm:
    """vLLM alone in a process of its own (`raw_vllm.py`)."""

    def __init__(self, **options: Any) -> None:
        environment = {"VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE), "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("raw_vllm.py")), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def seconds(self, prompts: list[str], tokens: int, adapter: Path | None) -> float:
        """Return the time in which all prompts are answered."""
        assert self._child.stdin
        assert self._child.stdout
        request = {"prompts": prompts, "tokens": tokens, "adapter": adapter and str(adapter)}
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return float(json.loads(self._child.stdout.readline())["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin
        self._child.stdin.close()
        self._child.wait(timeout=60)


@dataclass(frozen=True)
class Setup:
    """Adapters, with the engines that serve them."""

    name: str
    engine: Engine
    adapters: tuple[Path, ...]
    raw: RawVllm
    raw_adapter: Path | None


@click.command()
@click.option(
    "--model", "folder", type=click.Path(path_type=Path, exists=True), default=None, help="Folder of a model."
)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--prompts", "count", default=256, show_default=True, help="Prompts of a round.")
@click.option("--tokens", default=32, show_default=True, help="Most tokens of an answer.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(folder: Path | None, dtype: str, count: int, tokens: int, rounds: int, is_recorded: bool) -> None:
    """Print answers per second, and the ratios of their medians."""
    logging.disable_progress_bar()
    if find_spec("vllm") is None:
        print("vLLM is not installed, so nothing is compared. To install it for a CPU: make vllm.")
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as closed:
        base = folder or _save_model(Path(scratch) / "model")
        tokenizer = AutoTokenizer.from_pretrained(base)
        stack, adapters = _save_adapters(base, Path(scratch), getattr(torch, dtype))
        setups = _setups(str(base), dtype, tokenizer, Path(scratch), adapters, closed)
        in_process = TransformersEngine(stack, tokenizer)
        words = [str(tokenizer.decode([number])) for number in range(100, min(len(tokenizer), 1000))]
        draw = random.Random(0)
        rates: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            prompts = [" ".join(draw.choices(words, k=draw.randint(8, 24))) for _ in range(count)]
            seconds = {"transformers, two adapters": _seconds(in_process, adapters, prompts, tokens)}
            for setup in setups:
                seconds[f"vLLM alone, {setup.name}"] = setup.raw.seconds(prompts, tokens, setup.raw_adapter)
                seconds[f"ours, {setup.name}"] = _seconds(setup.engine, setup.adapters, prompts, tokens)
            if number:  # the first round compiles
                for name, value in seconds.items():
                    rates.setdefault(name, []).append(count / value)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name}: {rate:.1f} answers/s")
    ratios = {setup.name: medians[f"ours, {setup.name}"] / medians[f"vLLM alone, {setup.name}"] for setup in setups}
    for name, ratio in ratios.items():
        print(f"ours / vLLM alone, {name}: {ratio:.2f}{' (goal: 0.95)' if name == 'one adapter' else ''}")
    print(f"two adapters as one / merged weights: {medians['ours, two adapters'] / medians['ours, merged']:.2f}")
    if is_recorded:
        from recording import record

        figures = {"dtype": dtype, "prompts": count, "tokens": tokens, "answers_per_second": medians, "ratios": ratios}
        print(record(f"generation-{base.name if folder else 'testbed'}", figures))


def _setups(
    base: str, dtype: str, tokenizer: Any, scratch: Path, adapters: tuple[Path, ...], closed: ExitStack
) -> list[Setup]:
    """Prepare two engines of ours and two of vLLM alone: with room for adapters, and for the merged weights."""
    stacked, merged = scratch / "stacked", str(scratch / "merged")
    concatenate([Adapter.load(path) for path in adapters]).save(stacked)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    for path in adapters:
        merge_adapter(model, Adapter.load(path))
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    options = {"dtype": dtype, "max_model_len": 1024, "gpu_memory_utilization": GPU_SHARE}
    options["enforce_eager"] = not torch.cuda.is_available()
    raw = closed.enter_context(closing(RawVllm(model=base, enable_lora=True, max_loras=1, **options)))
    raw_merged = closed.enter_context(closing(RawVllm(model=merged, **options)))

    def no_other_way(*_: object) -> Any:
        raise SystemExit("vLLM refuses the model or its adapters, so nothing can be compared.")

    engines = []
    for location in (base, merged):
        runner = VllmRunner(location, dtype, "generate", gpu_memory=GPU_SHARE)
        engines.append(closed.enter_context(closing(VllmEngine(runner, tokenizer, no_other_way, no_other_way))))
    return [
        Setup("no adapter", engines[0], (), raw, None),
        Setup("one adapter", engines[0], adapters[:1], raw, adapters[0]),
        Setup("two adapters", engines[0], adapters, raw, stacked),
        Setup("merged", engines[1], (), raw_merged, None),
    ]


def _seconds(engine: Engine, adapters: tuple[Path, ...], prompts: list[str], tokens: int) -> float:
    start = time.perf_counter()
    engine.generate(adapters, prompts, tokens)
    return time.perf_counter() - start


def _save_model(folder: Path) -> Path:
    """Save a random model of the testbed's shape, whose vocabulary has one word a token."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0").save_pretrained(
        folder
    )
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _save_adapters(base: Path, folder: Path, dtype: torch.dtype) -> tuple[LoraStack, tuple[Path, ...]]:
    """Save two random adapters of rank 8."""
    stack = LoraStack(place_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype)))
    paths = (folder / "aligned", folder / "tuned")
    for path in paths:
        for parameter in stack.train((), TrainSettings(lr=1e-3, epochs=1, batch=1), seed=0).values():
            torch.nn.init.normal_(parameter, std=0.02)
        stack.trained().save(path)
    return stack, paths


if __name__ == "__main__":
    main()
