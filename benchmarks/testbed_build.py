"""Measure the time to build the testbed, and a step of its training next to a plain loop.

    python benchmarks/testbed_build.py
    python benchmarks/testbed_build.py --rounds 10 --record

The build runs in a new process and an empty home. Each part is shown with its wall time and its CPU time; the rest is
the start of Python and the import of the libraries.

The plain loop computes the loss with the model's own forward pass (an attention mask, logits at every position) on
whole batches, with all threads in every operation. Each round runs the same 20 batches with both, so that other work
on the machine slows both alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before torch is imported

import click
import torch
from transformers import LlamaForCausalLM

from harmbench_vaccine.core.progress import SILENT
from harmbench_vaccine.data.collate import Encoded, collate, pad_token_id
from harmbench_vaccine.testbed import build
from harmbench_vaccine.testbed.fitting import fit

GOAL = 90.0
BATCHES = 20

Batches = Sequence[list[Encoded]]


class Times(NamedTuple):
    """Wall time and CPU time in seconds."""

    wall: float
    cpu: float


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds of 20 steps.")
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(rounds: int, is_recorded: bool) -> None:
    """Print the time of every part of the build, and the time of a step with its ratio to the plain loop."""
    parts = build_parts()
    print(f"{'part':<16} {'wall':>8} {'CPU':>8}   goal {GOAL:.0f} s")
    for name, times in parts.items():
        print(f"{name:<16} {times.wall:>6.1f} s {times.cpu:>6.1f} s", flush=True)
    steps = compare_steps(rounds)
    for name, times in steps.items():
        print(f"step, {name:<10} {times.wall * 1e3:>5.0f} ms {times.cpu * 1e3:>5.0f} ms")
    ours, plain = steps["ours"], steps["plain"]
    print(f"plain / ours: {plain.wall / ours.wall:.2f} (wall), {plain.cpu / ours.cpu:.2f} (CPU)")
    if is_recorded:
        from recording import record

        figures = {
            name: {key: times._asdict() for key, times in table.items()}
            for name, table in (("parts", parts), ("steps", steps))
        }
        print(record("testbed-build", {"goal_s": GOAL, **figures}))


def build_parts() -> dict[str, Times]:
    """Build the testbed in a new process, and return the times of its parts and in total."""
    with tempfile.TemporaryDirectory() as home:
        start, before = time.monotonic(), os.times()
        subprocess.run(
            [sys.executable, "-m", "harmbench_vaccine", "testbed", "build"],
            env={**os.environ, "HBV_HOME": home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        total = Times(time.monotonic() - start, cpu)
        (file,) = Path(home).glob("store/testbed/*/testbed.json")
        facts = json.loads(file.read_text(encoding="utf-8"))
    parts = {name: Times(facts["seconds"][name], facts["cpu_seconds"][name]) for name in facts["seconds"]}
    walls, cpus = zip(*parts.values(), strict=True)
    return {**parts, "rest": Times(total.wall - sum(walls), total.cpu - sum(cpus)), "total": total}


def compare_steps(rounds: int) -> dict[str, Times]:
    """Return the median times of a step of pre-training, by the plain loop and by ours."""
    world = build.generate(build.SEED)
    tokenizer = build.train_tokenizer(build.tokenizer_texts(world))
    batches = build.pretraining_batches(tokenizer, world, build.Sizes(documents=build.Sizes().batch * BATCHES * rounds))
    pad = pad_token_id(tokenizer)
    models = [build.base_model(tokenizer) for _ in range(2)]
    loops: dict[str, Callable[[Batches], None]] = {
        "plain": partial(plain_loop, models[0], pad),
        "ours": lambda part: fit(
            models[1], part, partial(build.token_loss, models[1], pad), build.RATE, "Training", SILENT
        ),
    }
    times: dict[str, list[Times]] = {name: [] for name in loops}
    for start in range(0, len(batches) - BATCHES + 1, BATCHES):
        for name, loop in loops.items():
            times[name].append(measured(partial(loop, batches[start : start + BATCHES])))
    return {
        name: Times(*(statistics.median(values) / BATCHES for values in zip(*results, strict=True)))
        for name, results in times.items()
    }


def plain_loop(model: LlamaForCausalLM, pad: int, batches: Batches) -> None:
    """Train as `fit` does, with the model's own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=build.RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, build.RATE, total_steps=len(batches), pct_start=0.1)
    for batch in batches:
        optimizer.zero_grad()
        model(**collate(batch, pad)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def measured(call: Callable[[], Any]) -> Times:
    """Return the time of a call."""
    start, cpu_start = time.monotonic(), time.process_time()
    call()
    return Times(time.monotonic() - start, time.process_time() - cpu_start)


if __name__ == "__main__":
    main()
