"""Measure the time of a Vaccine step relative to an SFT step, in one process that alternates between them.

    python benchmarks/vaccine_step.py                                         # the testbed's shape
    python benchmarks/vaccine_step.py --shape llama-2-7b --record             # on a GPU

The paper's table 5 gives, for batches of 5 rows, 0.73 s / 0.37 s = 1.97 for Llama-2-7B on an A100 (38.57 and 38.45 GB),
and its appendix 0.17 s / 0.09 s for OPT-6.7B on an H100. Weights are random here: the time depends on shapes only.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.stage import TrainingStage

SHAPES: dict[str, tuple[Any, dict[str, Any], int, int]] = {
    "testbed": (
        LlamaForCausalLM,
        {
            "vocab_size": 1200,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        10,
        52,
    ),
    "llama-2-7b": (
        LlamaForCausalLM,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
        5,
        200,
    ),
    "opt-6.7b": (
        OPTForCausalLM,
        {
            "vocab_size": 50272,
            "hidden_size": 4096,
            "ffn_dim": 16384,
            "word_embed_proj_dim": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        5,
        200,
    ),
}
"""Name -> model class, configuration, rows and tokens of a batch."""

WARM_UP = 3


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="testbed", show_default=True)
@click.option("--pairs", default=30, show_default=True, help="Steps of each defense.")
@click.option(
    "--record", is_flag=True, help="Write the figures to a file in benchmarks/results, named after the machine."
)
def main(shape: str, pairs: int, record: bool) -> None:
    """Print the medians, the peak memory on a GPU, and the ratio."""
    torch.manual_seed(0)
    model_class, values, rows, length = SHAPES[shape]
    gpu = torch.cuda.is_available()
    config_class: Any = LlamaConfig if model_class is LlamaForCausalLM else OPTConfig
    with torch.device("cuda" if gpu else "cpu"):
        model = model_class._from_config(config_class(**values), dtype=torch.bfloat16 if gpu else torch.float32)
    targets = ("q_proj", "k_proj", "v_proj") if "opt" in shape else TrainSettings(1, 1, 1).lora_targets
    settings = TrainSettings(lr=1e-3, epochs=1, batch=rows, lora_dropout=0.1, lora_targets=targets)
    stack = LoraStack(model)
    stage = TrainingStage("align", stack, stack.train((), settings, seed=0), seed=0, settings=settings)
    stage.model.train()
    ids = torch.randint(3, values["vocab_size"], (rows, length), device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    seconds: dict[str, list[float]] = {"sft": [], "vaccine": []}
    peak = dict.fromkeys(seconds, 0.0)
    for number in range(pairs + WARM_UP):
        for name, times in seconds.items():
            defense: Defense = DEFENSES.get(name)()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            defense.gradient(stage, batch)
            if gpu:
                torch.cuda.synchronize()
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 1e9)
            if number >= WARM_UP:
                times.append(time.perf_counter() - start)
    sft, vaccine = (statistics.median(times) for times in seconds.values())
    memory = f", {peak['sft']:.2f} and {peak['vaccine']:.2f} GB at the peak" if gpu else ""
    print(f"{shape}: SFT {sft:.4f} s, Vaccine {vaccine:.4f} s a step (medians of {pairs}){memory}")
    print(f"ratio {vaccine / sft:.2f} (paper: 1.97)")
    if record:
        machine = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, CPU"
        figures = {
            "shape": shape,
            "machine": machine,
            "torch": torch.__version__,
            "rows": rows,
            "tokens": length,
            "dtype": str(model.dtype),
            "seconds": {"sft": sft, "vaccine": vaccine},
            "peak_gb": peak if gpu else None,
        }
        file = Path(__file__).parent / "results" / f"vaccine_step-{shape}-{machine.replace(' ', '_')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
