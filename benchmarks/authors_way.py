"""Compare a sweep of the testbed with scripts as the papers publish them: the same rows, steps and prompts in one run.

    python benchmarks/authors_way.py                           # a tenth of the training steps
    python benchmarks/authors_way.py --steps 1 --record        # all steps of the testbed's protocol

The scripts load the models again in every stage, and run every stage again in every cell (a defense under an attack):

    1. train the alignment adapter by peft, with an attention mask and logits of every token; Vaccine by two full passes
    2. load the model, merge the alignment adapter, train the adapter of the user's rows
    3. load the model, merge one adapter, then both, and answer one prompt at a time by `model.generate`
    4. load the judge, and judge one answer at a time

Every N-th prompt is answered and judged (`--share`), and the time is multiplied by N. The stages run in one process;
the start of a script with its imports is measured once and counted for each of the six scripts of a cell. The sweep
also measures drift, which the scripts do not. The second ratio is to scripts that align once for all attacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before torch is imported

import click
import torch
import yaml
from batched_answers import answer_singly
from peft import LoraConfig, PeftModel, get_peft_model
from testbed_sweep import sweep, testbed_home, write_suite
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, get_scheduler
from transformers.utils import logging

from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.data.collate import Encoded, collate, encode_examples
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets, harmful_sets, plugin_pools, user_rows
from harmbench_vaccine.inference.judge_prompts import filled_prompt_ids
from harmbench_vaccine.inference.loading import load_judge, load_model, load_tokenizer_and_config
from harmbench_vaccine.plugins.scorers.beaver_dam import JUDGE_PROMPT, SLOTS
from harmbench_vaccine.sweeps.suite import Suite
from harmbench_vaccine.training.adapters import available_targets
from harmbench_vaccine.training.trainer import batch_order

GOAL = 5
DEFENSES, ATTACKS = ("sft", "vaccine"), ("ratio=0,0.1,0.2",)
RHO = 2.0
SCRIPTS = 6
"""Scripts of a cell: two that train, and for each model one that answers and one that judges."""
IMPORTS = "from peft import PeftModel; from transformers import AutoModelForCausalLM, Trainer"


@dataclass
class Clock:
    """Seconds of the scripts by stage: wall time and CPU time."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str, scale: float = 1.0) -> Iterator[None]:
        """Add the time of the block to a stage, multiplied by `scale`."""
        wall, cpu = time.perf_counter(), sum(os.times()[:4])  # of this process and of its children
        yield
        self.wall[stage] = self.wall.get(stage, 0.0) + scale * (time.perf_counter() - wall)
        self.cpu[stage] = self.cpu.get(stage, 0.0) + scale * (sum(os.times()[:4]) - cpu)


def load(experiment: Experiment, *adapters: Path) -> Any:
    """Load the model, and merge adapters into its weights one after the other."""
    model = load_model(AutoModelForCausalLM, experiment.model, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.generation_config = GenerationConfig()
    return model


def train(model: Any, rows: Sequence[Encoded], settings: TrainSettings, pad: int, folder: Path, rho: float) -> None:
    """Train a new adapter on rows by a plain loop, with Vaccine's shifts of length `rho` if it is not 0."""
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=int(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        target_modules=available_targets(model, settings.lora_targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    batches = batch_order(len(rows), settings, seed=0)
    schedule = get_scheduler(settings.schedule, optimizer, round(settings.warmup * len(batches)), len(batches))
    for batch in batches:
        inputs = collate([rows[number] for number in batch], pad)
        shifts = vaccine_shifts(model, inputs, rho) if rho else []
        with hooked(model, [partial(torch.add, shift) for shift in shifts]):
            model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def vaccine_shifts(model: Any, inputs: dict[str, Tensor], rho: float) -> list[Tensor]:
    """Return the shifts of all attention outputs from a first pass, whose other gradients are dropped."""
    outputs: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        hidden.retain_grad()
        outputs.append(hidden)
        return hidden

    with hooked(model, [keep] * len(attention_blocks(model))):
        model(**inputs).loss.backward()
    model.zero_grad()
    gradients = [output.grad for output in outputs if output.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return [rho * gradient / (norm + 1e-7) for gradient in gradients]


def attention_blocks(model: Any) -> list[Any]:
    """Return the attention modules in order."""
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


@contextmanager
def hooked(model: Any, changes: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change the outputs of the attention blocks inside the block, one change each; none if there are no changes."""
    handles = [
        block.register_forward_hook(lambda _, __, output, change=change: (change(output[0]), *output[1:]))
        for block, change in zip(attention_blocks(model), changes, strict=bool(changes))
    ]
    yield
    for handle in handles:
        handle.remove()


def run_cell(experiment: Experiment, folder: Path, share: int, clock: Clock) -> None:
    """Run all scripts of one cell."""
    logging.disable_progress_bar()
    align, finetune = experiment.stages["align"], experiment.stages["finetune"]
    aligned, tuned = folder / "aligned", folder / "tuned"
    with clock.time("align"):
        model, tokenizer, pools = load(experiment), load_tokenizer(experiment), plugin_pools(experiment)
        rows = encode_examples(tokenizer, align.template, pools.alignment, align.settings.max_length)
        rho = RHO if experiment.defense == "vaccine" else 0.0
        train(model, rows, align.settings, tokenizer.pad_token_id, aligned, rho)
    with clock.time("finetune"):
        model, tokenizer, pools = load(experiment, aligned), load_tokenizer(experiment), plugin_pools(experiment)
        rows = encode_examples(tokenizer, finetune.template, user_rows(experiment, pools), finetune.settings.max_length)
        train(model, rows, finetune.settings, tokenizer.pad_token_id, tuned, 0.0)
    for adapters in ([aligned], [aligned, tuned]):
        with clock.time("answer"):
            model, tokenizer = load(experiment, *adapters).eval(), load_tokenizer(experiment)
        pairs = []
        harmful = [eval_set.name for eval_set in harmful_sets(experiment)]
        for eval_set in eval_sets(experiment):
            prompts = [eval_set.template.render(example) for example in eval_set.examples]
            with clock.time("answer", len(prompts) / len(prompts[::share])):
                answers = answer_singly(model, tokenizer, prompts[::share], eval_set.max_new_tokens)
            if eval_set.name in harmful:
                instructions = [example.instruction for example in eval_set.examples[::share]]
                pairs += list(zip(instructions, answers, strict=True))
        with clock.time("score"):
            judge_tokenizer, judge = load_judge(experiment.protocol.score.judge, "classifier", "float32")
        with clock.time("score", share), torch.inference_mode():
            for ids in filled_prompt_ids(judge_tokenizer, JUDGE_PROMPT, SLOTS, pairs):
                judge(input_ids=torch.tensor([[*ids, judge_tokenizer.eos_token_id]])).logits.sigmoid().tolist()


def load_tokenizer(experiment: Experiment) -> Any:
    """Load the tokenizer of the model."""
    return load_tokenizer_and_config(experiment.model, "Model")[0]


@click.command()
@click.option("--steps", type=click.FloatRange(0, 1, min_open=True), default=0.1, help="Share of the training steps.")
@click.option("--share", type=click.IntRange(1), default=25, help="One prompt in SHARE is answered by the scripts.")
@click.option("--workers", type=click.IntRange(1), default=2, help="Workers of the sweep.")
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(steps: float, share: int, workers: int, is_recorded: bool) -> None:
    """Print the time of the sweep and of the scripts, and their ratio."""
    clock = Clock()
    with testbed_home() as folder:
        values = {"align.settings.epochs": 3 * steps, "finetune.settings.epochs": 4 * steps}
        suite = write_suite(folder, DEFENSES, ATTACKS, values)
        experiments = Suite.model_validate(yaml.safe_load(suite.read_text(encoding="utf-8"))).settle()
        times = sweep(suite, folder, "--workers", str(workers))
        print(f"sweep with {workers} workers: {times.wall:.1f} s, {times.cpu:.1f} s of CPU time", flush=True)
        with clock.time("start", SCRIPTS * len(experiments)):
            subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        for experiment in experiments:
            run_cell(experiment, folder / experiment.defense / experiment.attack, share, clock)
    wall, cpu = sum(clock.wall.values()), sum(clock.cpu.values())
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in clock.wall.items())
    print(f"scripts for {len(experiments)} cells: {wall:.1f} s ({stages}), {cpu:.1f} s of CPU time")
    print(f"  (one answer and verdict of {share} measured, and scaled)")
    repeated = (clock.wall["align"] + clock.wall["start"] / SCRIPTS) * (1 - len(DEFENSES) / len(experiments))
    figures = {
        "ratio": wall / times.wall,
        "ratio_aligned_once": (wall - repeated) / times.wall,
        "cpu_ratio": cpu / times.cpu,
    }
    print(
        f"ratio {figures['ratio']:.1f} (goal {GOAL}); {figures['ratio_aligned_once']:.1f} if each defense is aligned "
        f"once; {figures['cpu_ratio']:.1f} in CPU time"
    )
    if is_recorded:
        from recording import record

        figures |= {"goal": GOAL, "steps": steps, "share": share, "workers": workers}
        print(record("authors-way", figures | {"sweep_s": times.wall, "scripts_s": clock.wall}))


if __name__ == "__main__":
    main()
