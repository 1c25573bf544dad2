"""Time two processes that train at the same time, next to one alone, for several values of GOMP_SPINCOUNT.

    python benchmarks/two_processes.py
    python benchmarks/two_processes.py --spin 1000 --spin 10000 --rounds 5 --record

An OpenMP thread that waits for the other threads of its process spins for that number of rounds before it falls asleep.
While it spins, it blocks a core. Each process makes the same forward and backward passes of a model with the testbed's
shape. On a machine with as many cores as a process has threads, two processes need at least twice the time of one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median
from typing import NamedTuple

import click

from harmbench_vaccine.core.library_settings import library_defaults

PASSES = 60
CODE = f"""
import time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=1500, hidden_size=128, intermediate_size=384, num_hidden_layers=3))
ids = torch.randint(1500, (10, 50))
def passes(number):
    for _ in range(number):
        model(input_ids=ids, labels=ids).loss.backward()
passes(10)
start = time.perf_counter()
passes({PASSES})
print(time.perf_counter() - start)
"""


class Times(NamedTuple):
    """Medians over the rounds, in seconds."""

    alone: float
    together: float

    @property
    def ratio(self) -> float:
        """The time of two processes to that of one; 2 if they lose nothing."""
        return self.together / self.alone


@click.command()
@click.option("--spin", "spins", type=click.IntRange(0), multiple=True, help="Values of GOMP_SPINCOUNT.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Measurements of each value.")
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(spins: tuple[int, ...], rounds: int, is_recorded: bool) -> None:
    """Print the time of one process and of two for each value; without --spin, for the product's and ten times it."""
    with library_defaults():
        default = int(os.environ["GOMP_SPINCOUNT"])
        environments = {spin: {**os.environ, "GOMP_SPINCOUNT": str(spin)} for spin in spins or (default, 10 * default)}
    samples: dict[int, list[tuple[float, float]]] = {spin: [] for spin in environments}
    for _ in range(rounds):
        for spin, environment in environments.items():
            samples[spin].append((_seconds(1, environment), _seconds(2, environment)))
    times = {spin: Times(*map(median, zip(*values, strict=True))) for spin, values in samples.items()}
    print(f"{'GOMP_SPINCOUNT':<16} {'alone':>8} {'together':>10} {'ratio':>6}   {PASSES} passes, default {default}")
    for spin, row in times.items():
        print(f"{spin:<16} {row.alone:>6.2f} s {row.together:>8.2f} s {row.ratio:>6.2f}")
    if is_recorded:
        from recording import record

        figures = {spin: {**row._asdict(), "ratio": row.ratio} for spin, row in times.items()}
        print(record("two-processes", {"passes": PASSES, "spins": figures}))


def _seconds(number: int, environment: dict[str, str]) -> float:
    """Return the longest time of a number of processes that run at the same time."""
    processes = [
        subprocess.Popen([sys.executable, "-c", CODE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(number)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise click.ClickException("A process failed.")
    return max(map(float, outputs))


if __name__ == "__main__":
    main()
