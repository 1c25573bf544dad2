"""Measure the time and memory of a training step of each defense next to a bare peft loop, in rounds of one process.

    python benchmarks/training_step.py                                      # the testbed's shape
    python benchmarks/training_step.py --shape smollm2 --rounds 5 --record
    python benchmarks/training_step.py --shape llama-2-7b --even --record   # on a GPU

A step is the gradient, clipping and AdamW. The bare loop has peft's LoRA layers, an attention mask and logits at every
position, as a script without this package has. Every round runs each step once, so that other work on the machine slows
all alike. Weights are random: the time depends on shapes only.

Rows are as long as real ones: in batches of Alpaca, BeaverTails and GSM8K they have 0.57 to 0.78 of the tokens of the
longest row, and a third of the tokens are the response. With --even all rows have the same length, and every token is
in the loss.

The column `passes` is the time that the passes of a defense (`cost`) take if each costs what it costs SFT. The paper of
Vaccine (table 5) gives, for batches of 5 rows, 0.73 s / 0.37 s = 1.97 for Llama-2-7B on an A100 (38.57 and 38.45 GB),
and its appendix 0.17 s / 0.09 s for OPT-6.7B on an H100.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before torch is imported

import click
import torch
from peft import LoraConfig, get_peft_model
from recording import record
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from harmbench_vaccine.core.types import Example, Pools
from harmbench_vaccine.data.collate import IGNORED, Encoded, collate
from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.dropout import forget_masks
from harmbench_vaccine.training.hooks import PlainFinetuning
from harmbench_vaccine.training.stage import Batch, TrainingStage

WARM_UP = 2
BARE, FORWARD = "bare loop", "forward of sft"


@dataclass(frozen=True)
class Shape:
    """A model with random weights, and a batch."""

    model_class: Any
    config: Any
    rows: int
    length: int
    """Tokens of the longest row."""
    targets: tuple[str, ...] = TrainSettings(1, 1, 1).lora_targets

    def model(self) -> Any:
        """Return the model: in bfloat16 on a GPU, else in float32."""
        gpu = torch.cuda.is_available()
        with torch.device("cuda" if gpu else "cpu"):
            return self.model_class._from_config(self.config, dtype=torch.bfloat16 if gpu else torch.float32)

    def encoded(self, count: int, even: bool) -> list[Encoded]:
        """Return rows of random tokens; with `even`, as long as the longest and without a prompt."""
        rows = []
        for number in range(count):
            length = self.length if even else round(self.length * (1 - number % self.rows / self.rows * 2 / 3))
            prompt = 0 if even else round(0.6 * length)
            ids = torch.randint(3, self.config.vocab_size, (length,)).tolist()
            rows.append(Encoded(ids, [IGNORED] * prompt + ids[prompt:], str(number)))
        return rows


SHAPES = {
    "testbed": Shape(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=1200, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
        ),
        10,
        52,
    ),
    "smollm2": Shape(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        10,
        150,
    ),
    "llama-2-7b": Shape(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
        ),
        5,
        200,
    ),
    "opt-6.7b": Shape(
        OPTForCausalLM,
        OPTConfig(
            vocab_size=50272,
            hidden_size=4096,
            ffn_dim=16384,
            word_embed_proj_dim=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        5,
        200,
        ("q_proj", "k_proj", "v_proj"),
    ),
}


class Steps:
    """The optimizer steps of all defenses on one model and one adapter: each has its own stage and optimizer."""

    def __init__(self, shape: Shape, rows: Sequence[Encoded]) -> None:
        self.rows = rows
        self.settings = TrainSettings(lr=1e-4, epochs=1, batch=shape.rows, lora_dropout=0.1, lora_targets=shape.targets)
        self.stack = LoraStack(shape.model())
        self.trainable = self.stack.train((), self.settings, seed=0)
        device = next(iter(self.trainable.values())).device
        self.batch: Batch = {
            **{name: value.to(device) for name, value in collate(rows[: shape.rows], 0).items()},
            "rows": torch.arange(shape.rows, device=device),
        }

    def of(self, name: str) -> Callable[[], None]:
        """Return a function that runs one step of a defense."""
        defense: Defense = DEFENSES.get(name)()
        examples = [Example(str(number), "") for number in range(len(self.rows))]
        half = len(examples) // 2
        pools = Pools(alignment=examples, paired=list(zip(examples[:half], examples[half:], strict=True)))
        stage = TrainingStage(
            "align" if "align" in defense.stages else "finetune",
            self.stack,
            self.trainable,
            seed=0,
            settings=self.settings,
            pools=pools,
            encode=lambda drawn: [self.rows[int(example.id)] for example in drawn],
            rows=self.rows,
            steps=1000,
        )
        stage.model.train()
        with stage.isolated("before"):
            defense.before(stage)
        parameters = list(self.trainable.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

        def step() -> None:
            stage.step += 1
            for parameter in parameters:  # T-Vaccine freezes some
                parameter.requires_grad_(True)
            defense.before_step(stage)
            hooks = defense if defense.takes_gradient(stage.name) else PlainFinetuning()
            gradient = hooks.gradient(stage, self.batch)
            forget_masks()
            for parameter, value in zip(parameters, gradient.values, strict=True):
                parameter.grad = value
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0, foreach=True)
            optimizer.step()
            defense.after_step(stage)

        return step

    def forward(self) -> None:
        """Run the forward pass of SFT alone."""
        stage = TrainingStage("align", self.stack, self.trainable, seed=0, settings=self.settings)
        stage.model.train()
        stage.loss(self.batch)


def bare_step(shape: Shape, rows: Sequence[Encoded]) -> Callable[[], None]:
    """Return a function that runs one step of a loop with peft and transformers alone."""
    config = LoraConfig(r=8, lora_alpha=4, lora_dropout=0.1, target_modules=list(shape.targets), task_type="CAUSAL_LM")
    model = get_peft_model(shape.model(), config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    batch = {name: value.to(parameters[0].device) for name, value in collate(rows[: shape.rows], 0).items()}

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step: Callable[[], None]) -> float:
    """Return the seconds of a step."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the memory that a step needs at its peak beyond what was in use before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())), default=0)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_defenses() -> list[str]:
    """Return the defenses that train step by step in the alignment or in the user stage."""
    plugins = DEFENSES.loadable()
    return [name for name, plugin in plugins.items() if plugin.trains and {"align", "finetune"} & set(plugin.stages)]


@click.command()
@click.option("--shape", "shape_name", type=click.Choice(list(SHAPES)), default="testbed", show_default=True)
@click.option("--defense", "names", multiple=True, help="Defenses to measure with sft and vaccine; without it, all.")
@click.option("--rounds", default=30, show_default=True, help="Steps of each.")
@click.option("--even", is_flag=True, help="Rows of one length, with every token in the loss.")
@click.option("--record", "records", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(shape_name: str, names: tuple[str, ...], rounds: int, even: bool, records: bool) -> None:
    """Print the medians, the ratios and the memory."""
    torch.manual_seed(0)
    shape = SHAPES[shape_name]
    rows = shape.encoded(120, even)
    steps = Steps(shape, rows)
    order = list(dict.fromkeys(["sft", "vaccine", *(names or step_defenses())]))
    run = {BARE: bare_step(shape, rows), FORWARD: steps.forward, **{name: steps.of(name) for name in order}}
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for number in range(rounds + WARM_UP):
        for name, step in run.items():
            taken = seconds_of(step)
            if number >= WARM_UP:
                seconds[name].append(taken)
    peaks = {name: peak_bytes(step) for name, step in run.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    figures: dict[str, Any] = {"rows": shape.rows, "tokens": shape.length, "even": even, "rounds": rounds, "steps": {}}
    print(f"{shape_name}, {shape.rows} rows of {'' if even else 'at most '}{shape.length} tokens, medians of {rounds}")
    print(f"{'step':22}{'ms':>9}{'x sft':>8}{'x bare':>8}{'passes':>9}{'x passes':>10}{'memory MB':>11}{'x sft':>7}")
    for name in run:
        passes = passes_seconds(name, median)
        row = {
            "seconds": median[name],
            "per_sft": median[name] / median["sft"],
            "per_bare": median[name] / median[BARE],
            "passes_seconds": passes,
            "per_passes": passes and median[name] / passes,
            "peak_bytes": peaks[name],
            "peak_per_sft": peaks[name] / max(1, peaks["sft"]),
        }
        figures["steps"][name] = row
        print(
            f"{name:22}{1e3 * median[name]:9.2f}{row['per_sft']:8.2f}{row['per_bare']:8.2f}"
            + (f"{1e3 * passes:9.2f}{row['per_passes']:10.2f}" if passes else " " * 19)
            + f"{peaks[name] / 1e6:11.1f}{row['peak_per_sft']:7.2f}"
        )
    if records:
        print(record(f"training_step-{shape_name}{'-even' if even else ''}", figures))


def passes_seconds(name: str, median: Mapping[str, float]) -> float | None:
    """Return the time of a defense's passes, if each costs what it costs SFT, and the rest of the step once."""
    if name in (BARE, FORWARD):
        return None
    cost = re.findall(r"(\d+)([FB])", DEFENSES.get(name)().passes(DEFENSES.get(name).stages[0]))
    counts = {kind: int(count) for count, kind in cost}
    return counts["F"] * median[FORWARD] + counts["B"] * (median["sft"] - median[FORWARD])


if __name__ == "__main__":
    main()
