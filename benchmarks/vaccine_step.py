"""How much longer a Vaccine step is than an SFT step: the ratio, from one run that takes them in turn.

    python benchmarks/vaccine_step.py

The paper's table 5 gives 0.73 s / 0.37 s = 1.97 for Llama-2-7B on an A100. The model here has the testbed's shape and
random weights; only the ratio means anything.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.registry import DEFENSES
from harmbench_vaccine.training.adapters import Stack
from harmbench_vaccine.training.stage import TrainingStage

ROWS, LENGTH, PAIRS = 10, 52, 30


def main() -> None:
    """Prints the medians and the ratio."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1200, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    )
    stack = Stack(LlamaForCausalLM(config))
    trainable = stack.train((), TrainSettings(lr=1e-3, epochs=1, batch=ROWS, lora_dropout=0.1), seed=0)
    stage = TrainingStage("align", stack, trainable, seed=0)
    stage.model.train()
    ids = torch.randint(0, 1200, (ROWS, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    seconds: dict[str, list[float]] = {"sft": [], "vaccine": []}
    for number in range(PAIRS + 3):
        for name, times in seconds.items():
            defense: Defense = DEFENSES.get(name)()
            start = time.perf_counter()
            defense.gradient(stage, batch)
            if number >= 3:  # the first ones warm up
                times.append(time.perf_counter() - start)
    sft, vaccine = (statistics.median(times) for times in seconds.values())
    print(f"SFT {1000 * sft:.1f} ms, Vaccine {1000 * vaccine:.1f} ms a step (medians of {PAIRS})")
    print(f"ratio {vaccine / sft:.2f} (paper: 1.97)")


if __name__ == "__main__":
    main()
