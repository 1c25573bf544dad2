"""Compare batches of answers with one prompt at a time, on the prompts and the model of a run on the testbed.

    python benchmarks/batched_answers.py
    python benchmarks/batched_answers.py --rounds 5 --share 25 --record

The model is the testbed's `sft` after the attack `ratio=0.1`, two adapters on the base model; HBV_HOME stores both, and
they are trained if they are missing. One prompt at a time means `model.generate` of transformers with the two adapters
in peft, as in a script without this package. It answers every N-th prompt of each set (`--share`), and its time is
multiplied by N. The two ways take turns, so that other work on the machine slows both; with OMP_NUM_THREADS=1 the
ratio of CPU times hardly depends on it. The answers to these prompts have to be equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from statistics import median
from typing import Any

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before torch is imported

import click
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from harmbench_vaccine import pipeline
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import Terminal
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_prompt
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.engine import Answer
from harmbench_vaccine.inference.loading import load_model
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.plugins.composition import parse_plugins

GOAL = 20


def answer_singly(model: Any, tokenizer: Any, prompts: Sequence[str], limit: int) -> list[str]:
    """Answer one prompt after the other by `model.generate`."""
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_token_ids(tokenizer, prompts),
    )
    texts = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        texts.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts


def peft_model(spec: ModelSpec) -> Any:
    """Load the model of a run, with its adapters in peft."""
    base = load_model(AutoModelForCausalLM, spec.base, dtype=getattr(torch, spec.dtype))
    base.generation_config = GenerationConfig()
    first, *others = spec.adapters
    model = PeftModel.from_pretrained(base, first, adapter_name="0")
    for number, adapter in enumerate(others, 1):
        model.load_adapter(adapter, adapter_name=str(number))
    tuner: Any = model.base_model
    tuner.set_adapter([str(number) for number in range(len(spec.adapters))])
    return model.eval()


def timed(answer: Callable[[], list[Any]]) -> tuple[list[Any], float, float]:
    """Return the answers with the seconds of wall time and of CPU time that they took."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = answer()
    return answers, time.perf_counter() - wall, time.process_time() - cpu


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, help="Turns of both ways.")
@click.option("--share", type=click.IntRange(1), default=20, help="One prompt in SHARE is answered singly.")
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(rounds: int, share: int, is_recorded: bool) -> None:
    """Print the times of both ways and their ratios, for each evaluation set and for all."""
    logging.disable_progress_bar()
    experiment = Experiment.settle(RunSpec(attack=parse_plugins("ratio=0.1")))
    with Terminal() as progress, closing(ModelPool(progress)) as models:
        _, final = pipeline.train_models(experiment, RunContext(Store(home() / "store", progress), models, progress))
        engine, tokenizer, plain = models.engine(final.spec), models.tokenizer(final.spec), peft_model(final.spec)
        samples: dict[str, list[list[float]]] = {}
        for _ in range(rounds):
            total = [0.0] * 4
            for eval_set in eval_sets(experiment):
                prompts = list(dict.fromkeys(eval_set.template.render(example) for example in eval_set.examples))
                limit, chosen = eval_set.max_new_tokens, prompts[::share]
                singles, *single = timed(partial(answer_singly, plain, tokenizer, chosen, limit))
                answers, *batched = timed(partial(engine.generate, final.spec.adapters, prompts, limit))
                check_equal(singles, answers[::share])
                scale = len(prompts) / len(chosen)
                times = [scale * single[0], batched[0], scale * single[1], batched[1]]
                samples.setdefault(f"{eval_set.name} ({len(prompts)})", []).append(times)
                total = [sum(pair) for pair in zip(total, times, strict=True)]
            samples.setdefault("all", []).append(total)
    figures = {name: summary(rows) for name, rows in samples.items()}
    print(f"{'prompts':<16} {'one at a time':>14} {'batches':>9} {'ratio':>7} {'ratio of CPU time':>18}")
    for name, row in figures.items():
        print(
            f"{name:<16} {row['single_s']:>12.1f} s {row['batched_s']:>7.2f} s {row['ratio']:>7.1f} "
            f"{row['cpu_ratio']:>18.1f}"
        )
    print(f"goal: {GOAL}; medians of {rounds} rounds; one at a time: every prompt of {share}, scaled")
    if is_recorded:
        from recording import record

        print(record("batched-answers", {"goal": GOAL, "rounds": rounds, "share": share, "sets": figures}))


def check_equal(singles: Sequence[str], answers: Sequence[Answer]) -> None:
    """Check that both ways gave the same answers."""
    different = sum(single != answer.text for single, answer in zip(singles, answers, strict=True))
    if different:
        raise SystemExit(f"{different} of {len(singles)} answers differ between the two ways.")


def summary(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return medians over rounds: seconds of both ways, and the ratios of wall time and of CPU time."""
    return {
        "single_s": median(row[0] for row in rows),
        "batched_s": median(row[1] for row in rows),
        "ratio": median(row[0] / row[1] for row in rows),
        "cpu_ratio": median(row[2] / row[3] for row in rows),
    }


if __name__ == "__main__":
    main()
